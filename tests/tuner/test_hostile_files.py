"""Damaged adapters: each ends in a sentence or loads to the same output, and the base stays what it was."""

from __future__ import annotations

import copy
import io
import json
import pickle
import resource
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, save
from torch import Tensor, nn

from setar_peft import SeTARConfig

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
X = torch.linspace(-1, 1, 48).reshape(3, 16)


_BASE = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 8)).eval()


def base() -> nn.Sequential:
    return copy.deepcopy(_BASE)


class Adapter(NamedTuple):
    """An undamaged adapter: its files and its output."""

    files: dict[str, bytes]
    output: Tensor

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self.files[CONFIG])

    def with_config(self, **fields: Any) -> dict[str, bytes]:
        return {**self.files, CONFIG: json.dumps({**self.config, **fields}).encode()}

    def with_weights(self, weights: bytes, *, unsigned: bool = False) -> dict[str, bytes]:
        """Other weights; `unsigned`: the damage did not stop at the digest, so it must be found without it."""
        files = self.with_config(weights_sha256=None) if unsigned else self.files
        return {**files, WEIGHTS: weights}

    def with_tensors(self, change: Callable[[dict[str, Tensor]], Any], *, unsigned: bool = True) -> dict[str, bytes]:
        tensors = load(self.files[WEIGHTS])
        change(tensors)
        return self.with_weights(
            save({name: tensor.contiguous() for name, tensor in tensors.items()}), unsigned=unsigned
        )


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    made = {}
    kinds: dict[str, dict[str, Any]] = {"training-free": {}, "fine-tuned": {"finetune": True, "modules_to_save": ["3"]}}
    for kind, settings in kinds.items():
        model = get_peft_model(base(), SeTARConfig(rank_ratios={"0": 0.25, "1": 0.5, "2": 0.0}, **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * parameter.requires_grad)
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        made[kind] = Adapter(files, model(X).detach())
    return made


Case = tuple[str, dict[str, bytes]]


def truncated(adapter: Adapter) -> Iterator[Case]:
    weights = adapter.files[WEIGHTS]
    header = 8 + struct.unpack("<Q", weights[:8])[0]
    lengths = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(weights) - 1, len(weights) - 4}
    for length in sorted(lengths | set(range(0, len(weights), len(weights) // 30))):
        yield f"{length} bytes", adapter.with_weights(weights[:length])
    yield "doubled", adapter.with_weights(weights * 2)
    yield "padded", adapter.with_weights(weights + b"\0" * 64)


def flipped(adapter: Adapter) -> Iterator[Case]:
    weights = adapter.files[WEIGHTS]
    header = 8 + struct.unpack("<Q", weights[:8])[0]
    for bit in [*range(0, 64, 3), *range(64, header * 8, header // 10), *range(header * 8, len(weights) * 8, 1811)]:
        damaged = bytearray(weights)
        damaged[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", adapter.with_weights(bytes(damaged))


def headers(adapter: Adapter) -> Iterator[Case]:
    weights = adapter.files[WEIGHTS]
    size = struct.unpack("<Q", weights[:8])[0]
    header, data = json.loads(weights[8 : 8 + size]), weights[8 + size :]

    def written(changed: Any, length: int | None = None) -> dict[str, bytes]:
        text = json.dumps(changed).encode()
        length = len(text) if length is None else length
        return adapter.with_weights(struct.pack("<Q", length) + text + data, unsigned=True)

    for length in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"header of {length}", written(header, length)
    for changed in ([], "text", 5, None, {}, {"__metadata__": 5}):
        yield f"header {changed!r}", written(changed)
    name = f"{PREFIX}1.setar_B0"
    for shape in ([24, 10**12], [10**12, 12], [24, 2**63], [-1, 12], [24, 0], [24], [], [24, 12, 1], "24", [24, 11.5]):
        yield f"{name} is {shape}", written({**header, name: {**header[name], "shape": shape}})
    for offsets in ([0, 2**40], [2**62, 2**63], [-4, 4], [8, 4], [], None, [0, 4]):
        yield f"{name} at {offsets}", written({**header, name: {**header[name], "data_offsets": offsets}})
    for dtype in ("F64", "F16", "I32", "U8", "BOOL", "F8_E4M3", "PICKLE", 5, None):
        yield f"{name} of {dtype}", written({**header, name: {**header[name], "dtype": dtype}})


def tensors(adapter: Adapter) -> Iterator[Case]:
    for name, tensor in load(adapter.files[WEIGHTS]).items():
        for damage, change in {
            "missing": lambda all_, name=name: all_.pop(name),
            "renamed": lambda all_, name=name: all_.__setitem__(f"{name}x", all_.pop(name)),
            "of another adapter": lambda all_, name=name: all_.__setitem__(f"{name}.default", all_.pop(name)),
            "without prefix twice": lambda all_, name=name: all_.__setitem__(name.replace(".", "_"), all_.pop(name)),
            "a row more": lambda all_, name=name: all_.__setitem__(name, torch.cat([torch.atleast_1d(all_[name])] * 2)),
            "flat": lambda all_, name=name: all_.__setitem__(name, torch.zeros(1, 1, 3)),
        }.items():
            yield f"{name} {damage}", adapter.with_tensors(change)
        if tensor.dim() == 2:
            yield f"{name} transposed", adapter.with_tensors(lambda all_, n=name: all_.__setitem__(n, all_[n].T))
        if name.rpartition(".")[2].startswith("setar_") and tensor.numel():
            for value in (torch.nan, torch.inf, -torch.inf):
                filled = tensor.clone()
                filled.view(-1)[-1] = value
                yield (
                    f"{name} with {value}",
                    adapter.with_tensors(lambda all_, n=name, t=filled: all_.__setitem__(n, t)),
                )
            for dtype in (torch.int32, torch.bool, torch.uint8, torch.complex64):
                other = tensor.to(dtype)
                yield f"{name} of {dtype}", adapter.with_tensors(lambda all_, n=name, t=other: all_.__setitem__(n, t))
            rounded = (tensor * 1.001).half()
            change = lambda all_, n=name, t=rounded: all_.__setitem__(n, t)  # noqa: E731
            yield f"{name} rounded", adapter.with_tensors(change, unsigned=False)


def extras(adapter: Adapter) -> Iterator[Case]:
    for name, shape in {
        "0.base_layer.weight": (24, 16),
        "0.base_layer.bias": (24,),
        "0.weight": (24, 16),
        "2.base_layer.weight": (24, 24),
        "3.base_layer.weight": (8, 24),
        "3.original_module.weight": (8, 24),
        "3.modules_to_save.default.weight": (8, 24),
        "0.setar_A0.default": (4, 16),
        "0.setar_C": (1,),
        "9.setar_B0": (24, 4),
        "0.lora_A.weight": (4, 16),
        "": (1,),
        "../../etc/passwd": (1,),
        "x" * 100_000: (1,),
    }.items():
        for prefix in (PREFIX, ""):
            key = f"{prefix}{name}"
            extra = torch.full(shape, 7.0)
            yield f"extra {key[:60]}", adapter.with_tensors(lambda all_, k=key, t=extra: all_.__setitem__(k, t))


def config_fields(adapter: Adapter) -> Iterator[Case]:
    wrong: list[Any] = [-1.5, "text", "/etc/passwd", "[", [], [1], {"x": 1}, True, None, 10**30]
    for name in adapter.config:
        if name != "peft_type":
            for value in wrong:
                yield f"{name} is {value!r}", adapter.with_config(**{name: value})
            fields = {key: value for key, value in adapter.config.items() if key != name}
            yield f"no {name}", {**adapter.files, CONFIG: json.dumps(fields).encode()}
    for name in ("objective", "card", "strict_base", "unknown", "__class__"):
        fields = {**adapter.config, name: "os.system"}
        yield f"extra {name}", {**adapter.files, CONFIG: json.dumps(fields).encode()}


def ratios(adapter: Adapter) -> Iterator[Case]:
    right = adapter.config["rank_ratios"]
    for key in right:
        for value in (
            0.1,
            0.26,
            0.9999999,
            1,
            1.0,
            -0.25,
            2,
            1e308,
            float("nan"),
            float("inf"),
            None,
            "0.25",
            [0.25],
            {},
            True,
        ):
            yield f"ratio of {key} is {value!r}", adapter.with_config(rank_ratios={**right, key: value})
        left = {name: ratio for name, ratio in right.items() if name != key}
        yield f"no ratio of {key}", adapter.with_config(rank_ratios=left)
        for other in ("9", "", "/etc/passwd", f"{key}.base_layer", f"x.{key}", "3", ".*", "a" * 100_000):
            yield f"{key} is {other[:20]!r}", adapter.with_config(rank_ratios={**left, other: right[key]})
    yield "many ratios", adapter.with_config(rank_ratios={f"layer.{number}": 0.5 for number in range(50_000)})
    for value in (0.25, 0, float("nan"), "x" * 1000):
        yield f"rank_ratios is {value!r:.20}", adapter.with_config(rank_ratios=value)
    for names in (["0"], ["0", "1", "2", "3"], "all-linear", ".*", "(0|1)", ["1", "2"], ["9"], [None], [["0"]]):
        yield f"target_modules is {names}", adapter.with_config(target_modules=names)
    for names in (["0"], ["3"], ["9"], "3", [""], ["default"], [3]):
        yield f"modules_to_save is {names}", adapter.with_config(modules_to_save=names)


def other_files(adapter: Adapter) -> Iterator[Case]:
    without = {name: data for name, data in adapter.files.items() if name != WEIGHTS}
    tensors = load(adapter.files[WEIGHTS])
    yield "no weights", without
    yield "no files", {}
    yield "a pickle for safetensors", {**without, WEIGHTS: pickle.dumps(Malicious())}
    yield "a malicious pickle alone", {**without, PICKLE: pickle.dumps(Malicious())}
    yield "a malicious pickle beside", {**adapter.files, PICKLE: pickle.dumps(Malicious())}
    yield "safetensors for a pickle", {**without, PICKLE: adapter.files[WEIGHTS]}
    yield "an empty pickle", {**without, PICKLE: b""}
    for name, content in {
        "text": "text",
        "a list": [1, 2],
        "numbers": {"a": 5},
        "numbered": {5: torch.zeros(2)},
        "missing": dict(list(tensors.items())[1:]),
        "malicious": {**tensors, "x": Malicious()},
        "good": tensors,
    }.items():
        written = io.BytesIO()
        torch.save(content, written)
        yield f"a pickle: {name}", {**without, PICKLE: written.getvalue()}
        yield f"a cut pickle: {name}", {**without, PICKLE: written.getvalue()[:-40]}


def front_door(adapter: Adapter) -> Iterator[Case]:
    """What PEFT itself reads, before it knows that the adapter is SeTAR's."""
    text = adapter.files[CONFIG]
    for length in range(0, len(text), len(text) // 25):
        yield f"config of {length} bytes", {**adapter.files, CONFIG: text[:length]}
    for content in (b"[]", b"5", b'"text"', b"null", b"\xff\xfe\x00", b"\x80\x04\x95", b"{}", text + b"}"):
        yield f"config {content[:10]!r}", {**adapter.files, CONFIG: content}
    for value in ("setar", "SETA", "", None, 5, "/etc/passwd", [], {}):
        yield f"peft_type is {value!r}", adapter.with_config(peft_type=value)


class Malicious:
    """Leaves a mark when it is unpickled."""

    mark = "unpickled"

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.mark),)


DAMAGES = (truncated, flipped, headers, tensors, extras, config_fields, ratios, other_files, front_door)


def kinds_of_modules(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def fault(folder: Path, adapter: Adapter, *, by_peft: bool) -> str | None:
    """Load an adapter; what is wrong with the way that this ended, if anything."""
    model = base()
    expected, modules = model(X), kinds_of_modules(model)
    try:
        loaded = PeftModel.from_pretrained(model, folder)
    except Exception as error:
        text = str(error)
        clear = isinstance(error, ValueError) and not isinstance(error, (UnicodeError, json.JSONDecodeError))
        if not (by_peft and isinstance(error, (ValueError, KeyError, TypeError))) and (
            not clear or not 25 < len(text) < 3000 or "size mismatch" in text
        ):
            return f"ended in {error!r:.300}"
        if kinds_of_modules(model) != modules:
            return "left modules of its own in the base"
    else:
        if not torch.equal(loaded(X), adapter.output):
            return "loaded to another output"
        with loaded.disable_adapter():
            return None if torch.equal(loaded(X), expected) else "changed the base"
    return None if torch.equal(model(X), expected) else "changed the base"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["training-free", "fine-tuned"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_ends_well(
    damage: Callable[[Adapter], Iterator[Case]],
    kind: str,
    adapters: dict[str, Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    # PEFT ignores fields that it does not know, and says so; likewise for exclude_modules that match nothing.
    warnings.filterwarnings("ignore", "Unexpected keyword arguments|You have passed exclude_modules")
    adapter = adapters[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults = []
    for count, (name, files) in enumerate(damage(adapter), 1):
        folder = tmp_path / "adapter"
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        found = fault(folder, adapter, by_peft=damage is front_door)
        faults += [f"{name}: {found}"] if found else []
        shutil.rmtree(folder)
        COUNTS[kind, damage.__name__] = count
    assert faults == []
    assert not (tmp_path / Malicious.mark).exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


COUNTS: dict[tuple[str, str], int] = {}


def test_five_hundred_were_tried() -> None:
    if len(COUNTS) < 2 * len(DAMAGES):
        pytest.skip("counts only when all of them ran")
    assert sum(COUNTS.values()) >= 500


def test_the_mark_would_be_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Malicious()))
    assert (tmp_path / Malicious.mark).exists()
