"""Checks of a saved adapter, one by one; test_hostile_files.py drives them through whole files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from setar_peft import SeTARConfig
from setar_peft.decomposition import Residual, SplitSettings, decompose
from setar_peft.tuner import adapter_file
from setar_peft.tuner.checkpoint import TensorFacts, all_finite, check_adapter_tensors, check_base
from setar_peft.tuner.linear import SeTARLinear
from tests.tuner.models import MLP, assert_unchanged, inputs, snapshot

RATIOS = {"fc1": 0.25, "fc2": 0.5}
PREFIX = "base_model.model."


def _tensors(finetune: bool = False) -> dict[str, Tensor]:
    tensors = {}
    for name, (m, n, rank) in {"fc1": (16, 12, 3), "fc2": (12, 16, 6)}.items():
        for kind in ("0", "") if finetune else ("0",):
            tensors[f"{PREFIX}{name}.setar_B{kind}"] = torch.randn(m, rank)
            tensors[f"{PREFIX}{name}.setar_A{kind}"] = torch.randn(rank, n)
        tensors[f"{PREFIX}{name}.setar_ratio"] = torch.tensor(RATIOS[name])
    return tensors


def _facts(tensors: dict[str, Tensor]) -> dict[str, TensorFacts]:
    return {name: TensorFacts.of(tensor) for name, tensor in tensors.items()}


class TestTensors:
    @pytest.mark.parametrize("finetune", [False, True])
    def test_shapes_of_the_weights_are_told(self, finetune: bool) -> None:
        assert check_adapter_tensors(_facts(_tensors(finetune)), RATIOS, finetune=finetune) == {
            "fc1": (16, 12),
            "fc2": (12, 16),
        }

    def test_trained_factors_are_expected_where_components_are_removed(self) -> None:
        tensors = _tensors(finetune=True)
        tensors |= {
            "head.setar_B0": torch.zeros(3, 0),
            "head.setar_A0": torch.zeros(0, 12),
            "head.setar_ratio": torch.tensor(0.0),
        }
        check_adapter_tensors(_facts(tensors), {**RATIOS, "head": 0.0}, finetune=True)

    @pytest.mark.parametrize(
        ("damage", "fragments"),
        [
            (lambda t: t.pop(f"{PREFIX}fc2.setar_A0"), ["missing fc2.setar_A0"]),
            (lambda t: t.update({f"{PREFIX}fc3.setar_A0": torch.ones(1, 1)}), ["unexpected fc3.setar_A0"]),
            (lambda t: t.pop(f"{PREFIX}fc2.setar_ratio"), ["missing fc2.setar_ratio"]),
            (lambda t: t.update({f"{PREFIX}fc1.setar_B0": torch.ones(3, 16)}), ["factors of fc1", "(3, 16)"]),
            (lambda t: t.update({f"{PREFIX}fc1.setar_B0": torch.ones(3)}), ["factors of fc1", "(3,)"]),
            (
                lambda t: t.update(
                    {f"{PREFIX}fc1.setar_B0": torch.ones(16, 5), f"{PREFIX}fc1.setar_A0": torch.ones(5, 12)}
                ),
                ["rank 5", "removes 3 components"],
            ),
            (lambda t: t.update({f"{PREFIX}fc1.setar_ratio": torch.tensor(0.4)}), ["fc1", "0.4", "0.25"]),
            (lambda t: t[f"{PREFIX}fc2.setar_B0"].fill_(torch.nan), ["fc2.setar_B0", "finite"]),
            (lambda t: t[f"{PREFIX}fc2.setar_A0"].fill_(torch.inf), ["fc2.setar_A0", "finite"]),
            (lambda t: t.update({f"{PREFIX}fc1.setar_B0": torch.ones(16, 3).int()}), ["fc1.setar_B0", "torch.int32"]),
            (
                lambda t: t.update({f"{PREFIX}fc1.setar_B0": torch.ones(16, 3).to(torch.float8_e4m3fn)}),
                ["fc1.setar_B0", "torch.float8_e4m3fn", "bfloat16"],
            ),
        ],
    )  # fmt: skip
    def test_what_contradicts_the_config_is_named(
        self, damage: Callable[[dict[str, Tensor]], object], fragments: list[str]
    ) -> None:
        tensors = _tensors()
        damage(tensors)
        with pytest.raises(ValueError, match=r"\w") as error:
            check_adapter_tensors(_facts(tensors), RATIOS, finetune=False)
        assert all(fragment in str(error.value) for fragment in fragments), error.value

    def test_a_trained_factor_of_another_shape(self) -> None:
        tensors = _tensors(finetune=True)
        tensors[f"{PREFIX}fc1.setar_B"] = torch.ones(16, 4)
        with pytest.raises(ValueError, match=r"fc1\.setar_B has shape \(16, 4\); expected \(16, 3\)"):
            check_adapter_tensors(_facts(tensors), RATIOS, finetune=True)


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS)).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.99])
    def test_a_truncated_file(self, folder: Path, kept: float, low_cpu_mem_usage: bool) -> None:
        path = folder / "adapter_model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
        base = MLP()
        before = snapshot(base)
        with pytest.raises(ValueError, match="is not a whole file") as error:
            PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert str(path) in str(error.value)
        assert_unchanged(base, before)

    def test_a_file_of_another_config(self, folder: Path) -> None:
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "rank_ratios": {"fc1": 0.25, "fc2": 0.25}}))
        base = MLP()
        before = snapshot(base)
        with pytest.raises(ValueError, match="do not belong together") as error:
            PeftModel.from_pretrained(base, folder)
        assert "fc2" in str(error.value)
        assert_unchanged(base, before)

    def test_a_file_that_would_write_to_the_base(self, folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({**load_file(path), f"{PREFIX}head.weight": torch.zeros(3, 12)}, path)
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "weights_sha256": None}))
        base = MLP()
        before = snapshot(base)
        with pytest.raises(ValueError, match=r"head\.weight"):
            PeftModel.from_pretrained(base, folder)
        assert_unchanged(base, before)

    def test_a_missing_file(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(Exception, match=r"\w"):
            PeftModel.from_pretrained(MLP(), folder)


class TestBase:
    def _layer(self, seed: int = 0) -> tuple[SeTARLinear, Residual]:
        torch.manual_seed(seed)
        layer = SeTARLinear(torch.nn.Linear(12, 16), "default")
        return layer, layer.split_base_weight(SplitSettings(0.25, "minor", 0, "fc1"))

    def test_says_nothing_of_the_right_one(self) -> None:
        layer, residual = self._layer()
        check_base([("fc1", layer.weight, residual)], strict=True)
        check_base([("fc1", layer.weight.bfloat16(), residual)], strict=True)

    def test_names_each_misfit_with_its_value(self) -> None:
        (first, right), (second, _) = self._layer(), self._layer(1)
        with pytest.raises(ValueError, match="another base model") as error:
            check_base([("fc1", first.weight, right), ("fc2", second.weight, right)], strict=True)
        assert "fc2: " in str(error.value)
        assert "fc1: " not in str(error.value)

    def test_a_base_that_already_has_the_truncation(self) -> None:
        # What merging leaves behind: the removed components are gone, so they must not be subtracted again.
        layer, residual = self._layer()
        layer.base_layer.weight.data = decompose(layer.base_layer.weight).kept(0.25)
        with pytest.raises(ValueError, match=r"fc1: -?0\.00"):
            check_base([("fc1", layer.weight, residual)], strict=True)

    def test_an_empty_residual_fits_any(self) -> None:
        layer, _ = self._layer()
        check_base([("fc1", layer.weight, Residual(torch.zeros(16, 0), torch.zeros(0, 12)))], strict=True)


def test_a_loaded_adapter_is_what_was_saved(tmp_path: Path) -> None:
    model = get_peft_model(MLP(), SeTARConfig(rank_ratios=RATIOS))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(MLP(), tmp_path)(inputs()), model(inputs()))


class TestFindingTheFile:
    def test_a_hub_that_does_not_answer_is_no_missing_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(repo: str, name: str, **settings: object) -> str:
            raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub.")

        monkeypatch.setattr(adapter_file, "hf_hub_download", unreachable)
        with pytest.raises(ValueError, match="not in the local cache, and the Hub could not be asked") as error:
            adapter_file.find_adapter_file("user/adapter", None)
        assert "adapter_model.safetensors of user/adapter" in str(error.value)
        assert "has an adapter_config.json of a saved adapter, but no" not in str(error.value)

    def test_no_file_in_the_repository(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(repo: str, name: str, **settings: object) -> str:
            raise EntryNotFoundError("404")

        monkeypatch.setattr(adapter_file, "hf_hub_download", absent)
        with pytest.raises(ValueError, match=r"but no adapter_model\.safetensors"):
            adapter_file.find_adapter_file("user/adapter", None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_all_finite(dtype: torch.dtype) -> None:
    for size in (0, 1, 7, 5000):
        tensor = torch.ones(size, dtype=dtype)
        assert all_finite(tensor)
        for value in (torch.nan, torch.inf, -torch.inf):
            for place in {0, size // 2, size - 1} if size else ():
                damaged = tensor.clone()
                damaged[place] = value
                assert not all_finite(damaged)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what is in memory is told on Linux only")
def test_with_low_cpu_mem_usage_the_factors_stay_out_of_memory(tmp_path: Path) -> None:
    """The base is checked by what the one reading of the file has found, not by the tensors that are mapped."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(512, 2048))

    def kibibytes_in_memory() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        starts = [number for number, line in enumerate(lines) if line.endswith(str(file))]
        assert starts  # it is mapped
        return sum(int(next(x for x in lines[n:] if x.startswith("Rss:")).split()[1]) for n in starts)

    config = SeTARConfig(target_modules=["0"], rank_ratios=0.5)
    get_peft_model(base(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_peft_weights(str(tmp_path), device="cpu")
    by_peft_alone = kibibytes_in_memory()
    del tensors
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True, strict_base=True)
    assert loaded.base_model.model[0].setar_B0["default"].shape == (2048, 256)
    assert kibibytes_in_memory() <= by_peft_alone < file.stat().st_size / 2048
    with pytest.raises(ValueError, match="made from another base model"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(512, 2048)), tmp_path, strict_base=True)
