"""SeTAR as a PEFT tuner: training-free OOD detection by selective low-rank approximation.

Importing this package registers the method with PEFT, so that `get_peft_model(model, SeTARConfig(...))` and
`PeftModel.from_pretrained` know it. Nothing heavy is imported before it is used: neither a public name's module, nor
torch and PEFT, with which the method is registered as soon as somebody imports PEFT.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

from setar_peft.versions import __version__

if TYPE_CHECKING:
    from setar_peft.data.images import ImageSource
    from setar_peft.detection.detector import OODDetector
    from setar_peft.detection.evaluation import evaluate
    from setar_peft.detection.external import PytorchOOD
    from setar_peft.detection.fusion import LayerFusion
    from setar_peft.detection.result import Evaluation
    from setar_peft.detection.scores import register_score
    from setar_peft.detection.scoring import Score
    from setar_peft.objectives.base import Objective
    from setar_peft.objectives.locoop import LoCoOpObjective
    from setar_peft.objectives.loss import locoop_loss
    from setar_peft.objectives.patch_metric import PatchMetricObjective
    from setar_peft.search.estimate import estimate_cost
    from setar_peft.search.run import SearchResult, search_rank_ratios
    from setar_peft.search.trace import SearchTrace
    from setar_peft.tuner.config import CardFacts, SeTARConfig
    from setar_peft.tuner.export import export_lora
    from setar_peft.tuner.layer import SeTARLayer
    from setar_peft.tuner.model import SeTARModel

__all__ = [
    "CardFacts",
    "Evaluation",
    "ImageSource",
    "LayerFusion",
    "LoCoOpObjective",
    "OODDetector",
    "Objective",
    "PatchMetricObjective",
    "PytorchOOD",
    "Score",
    "SeTARConfig",
    "SeTARLayer",
    "SeTARModel",
    "SearchResult",
    "SearchTrace",
    "__version__",
    "estimate_cost",
    "evaluate",
    "export_lora",
    "locoop_loss",
    "register_score",
    "search_rank_ratios",
]

_HOMES = {
    "CardFacts": "tuner.config",
    "Evaluation": "detection.result",
    "ImageSource": "data.images",
    "LayerFusion": "detection.fusion",
    "LoCoOpObjective": "objectives.locoop",
    "OODDetector": "detection.detector",
    "Objective": "objectives.base",
    "PatchMetricObjective": "objectives.patch_metric",
    "PytorchOOD": "detection.external",
    "SeTARConfig": "tuner.config",
    "SeTARLayer": "tuner.layer",
    "SeTARModel": "tuner.model",
    "Score": "detection.scoring",
    "SearchResult": "search.run",
    "SearchTrace": "search.trace",
    "estimate_cost": "search.estimate",
    "evaluate": "detection.evaluation",
    "export_lora": "tuner.export",
    "locoop_loss": "objectives.loss",
    "register_score": "detection.scores",
    "search_rank_ratios": "search.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(_: Any) -> None:
    """Register the method with PEFT, and give the tuner what stands above it and it may not import."""
    from setar_peft.tuner.registration import register

    def search(*args: Any, **kwargs: Any) -> Any:
        from setar_peft.search.run import search_rank_ratios

        return search_rank_ratios(*args, **kwargs)

    register(search, cards=lambda: importlib.import_module("setar_peft.hub.card"))


def _wrap_transformers(integration: Any) -> None:
    """Give transformers' way of loading what it lacks; PEFT is imported when that is used, and not before."""
    mixin = integration.PeftAdapterMixin
    load_adapter = mixin.load_adapter

    @functools.wraps(load_adapter)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        from setar_peft.tuner.registration import load_by_transformers

        return load_by_transformers(load_adapter, self, *args, **kwargs)

    mixin.load_adapter = wrapped


def _register_pipeline(pipelines: Any) -> None:
    """Make `pipeline("ood-detection")` known to transformers; the detector is imported when one is made."""
    from setar_peft.detection.pipeline import TASK, DetectorName, OODDetectionPipeline

    pipelines.PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=OODDetectionPipeline, pt_model=DetectorName, type="multimodal"
    )


class _After(MetaPathFinder):
    """Does something with a module once it has been imported, by whomever."""

    def __init__(self, name: str, act: Callable[[Any], None]) -> None:
        self._name, self._act = name, act

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            # Only now: who looks for a module, as transformers does to see whether PEFT is there, need not import it.
            def exec_module(module: Any) -> None:
                sys.meta_path.remove(self)
                del loader.exec_module  # a reload is none of ours
                run(module)
                self._act(module)

            loader.exec_module = exec_module
        return spec


for _name, _act in (
    ("peft", _register),
    ("transformers.integrations.peft", _wrap_transformers),
    ("transformers.pipelines", _register_pipeline),
):
    if _name in sys.modules:
        _act(sys.modules[_name])
    else:
        sys.meta_path.insert(0, _After(_name, _act))
