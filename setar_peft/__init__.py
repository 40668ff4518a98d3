"""SeTAR as a PEFT tuner: training-free OOD detection by selective low-rank approximation.

Importing this package registers the method with PEFT, so that `get_peft_model(model, SeTARConfig(...))` and
`PeftModel.from_pretrained` know it. Nothing heavy is imported before it is used: neither a public name's module, nor
torch and PEFT, with which the method is registered as soon as somebody imports PEFT.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from setar_peft.data.images import ImageSource
    from setar_peft.detection.evaluation import evaluate
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
    "ImageSource",
    "LoCoOpObjective",
    "Objective",
    "PatchMetricObjective",
    "SeTARConfig",
    "SeTARLayer",
    "SeTARModel",
    "SearchResult",
    "SearchTrace",
    "estimate_cost",
    "evaluate",
    "export_lora",
    "locoop_loss",
    "search_rank_ratios",
]

__version__ = "0.1.0"

_HOMES = {
    "CardFacts": "tuner.config",
    "ImageSource": "data.images",
    "LoCoOpObjective": "objectives.locoop",
    "Objective": "objectives.base",
    "PatchMetricObjective": "objectives.patch_metric",
    "SeTARConfig": "tuner.config",
    "SeTARLayer": "tuner.layer",
    "SeTARModel": "tuner.model",
    "SearchResult": "search.run",
    "SearchTrace": "search.trace",
    "estimate_cost": "search.estimate",
    "evaluate": "detection.evaluation",
    "export_lora": "tuner.export",
    "locoop_loss": "objectives.loss",
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


def _register() -> None:
    """Register the method with PEFT, and give the tuner what stands above it and it may not import."""
    from setar_peft.tuner.registration import register

    def search(*args: Any, **kwargs: Any) -> Any:
        from setar_peft.search.run import search_rank_ratios

        return search_rank_ratios(*args, **kwargs)

    register(search, cards=lambda: importlib.import_module("setar_peft.hub.card"))


class _AfterPeft(MetaPathFinder):
    """Registers the method once PEFT has been imported, by whomever."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterPeft())
