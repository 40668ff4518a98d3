"""What only a GPU can show: the same decisions, bits, budgets and devices there.

pytest tests/test_cuda.py                          # on a machine with CUDA
SETAR_TEST_DEVICE=cpu pytest tests/test_cuda.py    # the same code on the processor, but for what is CUDA's own
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel
from transformers.activations import QuickGELUActivation

from setar_peft import LoCoOpObjective, SeTARConfig, estimate_cost, search_rank_ratios
from setar_peft.backbones import ClassWeights, backbone_of
from setar_peft.backbones.activations import quick_gelu
from setar_peft.backbones.loading import precision, torch_device
from setar_peft.decomposition import decompose
from setar_peft.objectives.loss import locoop_sums
from setar_peft.processes import Processes, own_device
from setar_peft.search.recording import MemoryBudget
from tests.conftest import GOLDEN
from tests.search import test_golden

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RATIOS = {"vision_model.encoder.layers.3.mlp.fc1": 0.3, "text_model.encoder.layers.0.mlp.fc1": 0.1}
# Losses of float32 products summed in another order, at a logit scale of 100.
LOSS_TOLERANCE = 2e-4

Clip = Callable[..., CLIPModel]
Objective = Callable[..., LoCoOpObjective]


@pytest.fixture
def device() -> torch.device:
    """The GPU, or what SETAR_TEST_DEVICE names."""
    name = os.environ.get("SETAR_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; SETAR_TEST_DEVICE=cpu runs it on the processor")
    return torch.device(name)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU, for what a processor does not have."""
    if device.type != "cuda":
        pytest.skip("CUDA's own")
    return device


@pytest.fixture
def clip(device: torch.device, load_clip: Clip) -> Clip:
    """Load a golden checkpoint onto the device."""
    return lambda *args, **kwargs: load_clip(*args, **kwargs).to(device)


def logits_of(model: Any, objective: LoCoOpObjective) -> Tensor:
    """Logits per image of the golden images, by the model's own forward."""
    images, _ = next(iter(objective.batches()))
    tokens = {name: value.to(model.device) for name, value in TOKENS.items()}
    with torch.no_grad():
        return model(pixel_values=images.to(model.device, model.dtype), **tokens).logits_per_image


TOKENS = {
    "input_ids": torch.tensor([[1, 5, 9, 2], [1, 7, 4, 2]]),
    "attention_mask": torch.ones(2, 4, dtype=torch.long),
}


@pytest.mark.parametrize("name", test_golden.SEARCHES)
def test_golden_searches(clip: Clip, clip_objective: Objective, name: str) -> None:
    """Decisions of the published code, and its losses within `LOSS_TOLERANCE`."""
    test_golden.test_search_repeats_the_published_code(name, clip, clip_objective, LOSS_TOLERANCE)


def test_a_search_with_tf32_decides_the_same_and_puts_the_setting_back(clip: Clip, clip_objective: Objective) -> None:
    exact = search_rank_ratios(clip(), clip_objective(), progress=False)
    before = torch.get_float32_matmul_precision()
    with precision("tf32"):
        rounded = search_rank_ratios(clip(), clip_objective(), progress=False)
    assert torch.get_float32_matmul_precision() == before
    # Eleven bits in every product of both towers.
    assert rounded.trace.initial.total == pytest.approx(exact.trace.initial.total, abs=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_search_leaves_the_model_to_the_bit(clip: Clip, clip_objective: Objective, dtype: torch.dtype) -> None:
    model = clip().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (search_rank_ratios(model, clip_objective(), progress=False) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert first.rank_ratios == second.rank_ratios
    assert all(residual.b0.device.type == model.device.type for residual in first.residuals.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_and_unmerging_to_the_bit(clip: Clip, clip_objective: Objective, dtype: torch.dtype) -> None:
    model = clip().to(dtype)
    weights = {name: model.get_submodule(name).weight.clone() for name in RATIOS}
    peft_model = get_peft_model(model, SeTARConfig(rank_ratios=RATIOS))
    unmerged = logits_of(peft_model.get_base_model(), clip_objective())
    peft_model.merge_adapter()
    merged = logits_of(peft_model.get_base_model(), clip_objective())
    tolerance = {torch.float32: 1e-3, torch.float16: 0.5, torch.bfloat16: 4.0}[dtype]
    torch.testing.assert_close(merged.float(), unmerged.float(), rtol=0.02, atol=tolerance)
    peft_model.unmerge_adapter()
    layers = dict(peft_model.get_base_model().named_modules())
    assert all(torch.equal(layers[name].get_base_layer().weight, weight) for name, weight in weights.items())


def test_loading_to_the_bit(clip: Clip, clip_objective: Objective, device: torch.device, tmp_path: Path) -> None:
    peft_model = get_peft_model(clip(), SeTARConfig(rank_ratios=RATIOS)).eval()
    expected = logits_of(peft_model.get_base_model(), clip_objective())
    peft_model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(clip(), str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded.get_base_model(), clip_objective()), expected)
    factors = [value for name, value in loaded.named_buffers() if "setar_" in name and value.numel()]
    assert factors
    assert {value.device.type for value in factors} == {device.type}


def test_an_adapter_made_on_the_processor_moves_with_its_model(
    load_clip: Clip, clip_objective: Objective, device: torch.device
) -> None:
    peft_model = get_peft_model(load_clip(), SeTARConfig(rank_ratios=RATIOS)).eval()
    expected = logits_of(peft_model.get_base_model(), clip_objective())
    moved = logits_of(peft_model.to(device).get_base_model(), clip_objective())
    torch.testing.assert_close(moved.cpu(), expected, rtol=1e-4, atol=2e-3)


def test_a_decomposition_there_is_the_exact_one(device: torch.device) -> None:
    """Full rank, both orientations, and rank 20 of 64, against an SVD in float64."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(96, 20, generator=generator) @ torch.randn(20, 64, generator=generator)
    for matrix in (torch.randn(96, 64, generator=generator), torch.randn(64, 96, generator=generator), low):
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        decomposition = decompose(matrix.to(device))
        assert decomposition.u.device.type == device.type
        torch.testing.assert_close(decomposition.s.cpu().double(), s, rtol=1e-5, atol=1e-5 * float(s[0]))
        exact = (u[:, :18] * s[:18]) @ vh[:18]
        kept = decomposition.kept(1 - 18 / 64).cpu().double()
        torch.testing.assert_close(kept, exact, rtol=0, atol=1e-5 * float(s[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_is_that_of_the_processor(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pooled, local, weight = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((12, 16), (12, 50, 16), (70, 16))
    )
    labels = torch.arange(12)
    sums = [
        torch.stack(
            locoop_sums(pooled.to(at), local.to(at), ClassWeights(weight.float().to(at)), labels.to(at), top_k=20)
        )
        for at in (torch.device("cpu"), device)
    ]
    torch.testing.assert_close(sums[1].cpu(), sums[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quick_gelu_is_that_of_the_stock_module(device: torch.device, dtype: torch.dtype) -> None:
    values = torch.cat([torch.linspace(-40, 40, 100_001), torch.tensor([3e4, -3e4, 6e4])]).to(device, dtype)
    stock = QuickGELUActivation()(values.double())
    tolerance = 8 * torch.finfo(dtype).eps
    assert quick_gelu(values).isfinite().all()
    torch.testing.assert_close(quick_gelu(values).double(), stock, rtol=100 * torch.finfo(dtype).eps, atol=tolerance)


@pytest.mark.parametrize(("on_device", "on_host"), [(1e9, 1e9), (60e3, 1e9), (0.0, 1e9), (60e3, 70e3), (0.0, 0.0)])
def test_recordings_within_a_budget_decide_the_same(
    clip: Clip, clip_objective: Objective, monkeypatch: pytest.MonkeyPatch, on_device: float, on_host: float
) -> None:
    """On the device, then in pinned memory, then on disk or computed again."""
    expected = search_rank_ratios(clip(), clip_objective(batch_size=8), progress=False)
    places: list[str] = []
    keep, start = MemoryBudget.keep, MemoryBudget.__init__

    def small(self: Any, device: torch.device, gibibytes: float | None = None) -> None:
        start(self, device, gibibytes)
        self._left = {"cuda": on_device, "cpu": on_host} if device.type == "cuda" else {device.type: on_device}

    def watched(self: Any, tensor: Tensor, **kwargs: Any) -> Any:
        kept = keep(self, tensor, **kwargs)
        places.append(kept.place if kept else "nowhere")
        assert kept is None or torch.equal(kept.load(tensor.device), tensor)
        assert self.left >= 0
        return kept

    monkeypatch.setattr(MemoryBudget, "__init__", small)
    monkeypatch.setattr(MemoryBudget, "keep", watched)
    found = search_rank_ratios(clip(), clip_objective(batch_size=8), progress=False)
    assert found.rank_ratios == expected.rank_ratios
    assert found.trace.rows[-1].total_loss == pytest.approx(expected.trace.rows[-1].total_loss, abs=LOSS_TOLERANCE)
    assert places
    if clip().device.type == "cuda":
        assert ("cuda" in places) == (on_device > 0)
        assert ("disk" in places) == (on_host < 1e9)
        assert ("cpu" in places) == (on_device < 1e9 and on_host > 0)


def test_memory_stays_near_the_estimate(cuda: torch.device, clip: Clip, of_many_images: Objective) -> None:
    model, objective = clip(), of_many_images(2048)
    estimate = estimate_cost(model, objective)
    torch.cuda.synchronize(cuda)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(cuda)
    before = torch.cuda.memory_allocated(cuda)
    search_rank_ratios(model, objective, progress=False)
    # Beyond the tensors: what cuBLAS, cuSOLVER and the allocator's rounding take.
    assert torch.cuda.max_memory_allocated(cuda) - before <= 1.1 * estimate.peak_bytes + 128 * 2**20


@pytest.fixture
def of_many_images(golden_clip: dict[str, Tensor], class_names: list[str]) -> Objective:
    """The LoCoOp objective on as many images in one batch: the golden ones again and again."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "cases" / "clip_tiny")

    def make(count: int) -> LoCoOpObjective:
        chosen = torch.arange(count) % len(golden_clip["labels"])
        images, labels = golden_clip["pixel_values"][chosen], golden_clip["labels"][chosen]
        return LoCoOpObjective(tokenizer, class_names, images, labels, ood_weight=0.1, top_k=2, batch_size=count)

    return make


@pytest.fixture
def whole_memory_again(cuda: torch.device) -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("whole_memory_again")
def test_really_out_of_memory(cuda: torch.device, clip: Clip, of_many_images: Objective) -> None:
    """Half of what the search took at its peak: it goes on with smaller batches and decides the same."""
    config = SeTARConfig(candidate_ratios=[0.2, 0.4], recording_memory=0.0)
    model, objective = clip(), of_many_images(4096)
    search_rank_ratios(model, of_many_images(24), config, progress=False)  # what is set up once
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(cuda)
    before = torch.cuda.memory_reserved(cuda)
    expected = search_rank_ratios(model, objective, config, progress=False)
    peak = torch.cuda.max_memory_reserved(cuda)
    torch.cuda.empty_cache()
    limit = (before + 0.5 * (peak - before)) / torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction(limit, cuda)
    with pytest.warns(RuntimeWarning, match="Out of memory with 4096 images"):
        found = search_rank_ratios(model, objective, config, progress=False)
    assert found.rank_ratios == expected.rank_ratios
    assert found.trace.rows[-1].total_loss == pytest.approx(expected.trace.rows[-1].total_loss, abs=LOSS_TOLERANCE)


def test_one_process_has_the_device_it_names(device: torch.device) -> None:
    assert torch_device(own_device(device.type)).type == device.type
    processes = Processes(torch.device(device.type, 0))
    assert (processes.index, processes.count) == (0, 1)


def test_prompts_at_once_follow_the_device(clip: Clip, device: torch.device) -> None:
    assert backbone_of(clip()).prompts_at_once == (1024 if device.type == "cuda" else 256)
