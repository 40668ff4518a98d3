"""A pytest plugin for the run of PEFT's tests: leaves out what a training-free adapter cannot do, and lists skips."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from types import ModuleType

import pytest

if importlib.util.find_spec("diffusers") is None:
    # PEFT's helpers import one class of it, to know a diffusion pipeline when they see one; none is tested here.
    _diffusers = ModuleType("diffusers")
    _diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = _diffusers

_IDENTITY = "asserts that a fresh adapter is the identity; a training-free one has truncated the weight from the start"
_TRAINS = "trains the model; a training-free adapter has no trainable parameter"
_PARAMETER = "looks for the adapter among the parameters; a training-free one has buffers only"

# Test -> why it is not for an adapter without trainable parameters.
_NOT_FOR_TRAINING_FREE = {
    "test_disable_adapters": _IDENTITY,
    "test_disable_adapters_with_merging": _IDENTITY,
    "test_training_custom_models": _TRAINS,
    "test_only_params_are_updated": _TRAINS,
    "test_parameters_after_loading_model": _TRAINS,
    "test_inference_safetensors": _TRAINS,
    "test_adapter_name": _PARAMETER,
    "test_load_model_low_cpu_mem_usage": _PARAMETER,
}
# With a module that is trained in full there is something to train.
_FOR_MODULES_TO_SAVE = {test for test, reason in _NOT_FOR_TRAINING_FREE.items() if reason == _TRAINS} | {
    "test_adapter_name"
}

_ours: Counter[tuple[str, str]] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        test = getattr(item, "originalname", item.name)
        trains = "modules_to_save" in item.name and test in _FOR_MODULES_TO_SAVE
        if "training-free" in item.name and test in _NOT_FOR_TRAINING_FREE and not trains:
            item.add_marker(pytest.mark.skip(reason=_NOT_FOR_TRAINING_FREE[test]))
            _ours[test, _NOT_FOR_TRAINING_FREE[test]] += 1


@pytest.fixture(autouse=True)
def same_path_sharded_and_whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FSDP no weight is kept; the whole model that it is compared with, to rounding, computes likewise."""
    if "fsdp_wrapped" in request.node.name:
        from setar_peft import SeTARLayer

        monkeypatch.setattr(SeTARLayer, "keeps_weight", False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    own_reasons = set(_NOT_FOR_TRAINING_FREE.values())
    theirs: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in own_reasons:
            theirs[report.location[2].partition("[")[0].rpartition(".")[2], reason] += 1
    for title, skips in (("the suite's own", theirs), ("ours, of training-free adapters", _ours)):
        terminalreporter.section(f"skips: {skips.total()} {title}")
        for (test, reason), count in sorted(skips.items()):
            terminalreporter.line(f"{count:3} {test}: {reason}")
