"""Several adapters of one model: which of them computes, and the blocks below all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from setar_peft.backbones import Backbone

# The adapters that are active already, or none where there are none.
AS_IT_IS = ""


def check_adapters(model: nn.Module, adapters: Collection[str | None]) -> None:
    """Refuse adapters that a model does not have, or cannot switch between.

    Args:
        model: A stock model, or a PEFT model.
        adapters: Names of adapters; None for the base without any, `AS_IT_IS` for what is active.

    Raises:
        ValueError: With the adapters that there are.
    """
    wanted = [name for name in adapters if name != AS_IT_IS]
    if not wanted:
        return
    known: Any = getattr(model, "peft_config", None)
    if not hasattr(model, "get_base_model") or known is None:
        raise ValueError(
            f"adapters names {', '.join(map(repr, wanted))}, and the model is a {type(model).__name__} without any; "
            "give a PeftModel, or leave adapters out."
        )
    unknown = [name for name in wanted if name is not None and name not in known]
    if unknown:
        raise ValueError(f"The model has no adapter {unknown[0]!r}; it has {', '.join(map(repr, known))}.")
    merged = [name for name, layer in adapted_modules(model) if getattr(layer, "merged", False)]
    if merged:
        raise ValueError(
            f"Adapters are merged into {len(merged)} layers, such as {merged[0]}, so that they cannot be switched; "
            "call unmerge_adapter() first."
        )


@contextmanager
def adapter_in_use(model: Any, name: str | None) -> Iterator[None]:
    """Lets one adapter of a PEFT model compute, or none; those that were active are active again at the end.

    Args:
        model: The model.
        name: The adapter, None for the base without any, `AS_IT_IS` for what is active.
    """
    if name == AS_IT_IS:
        yield
    elif name is None:
        with model.disable_adapter():
            yield
    else:
        before = model.active_adapters
        model.set_adapter(name)
        try:
            yield
        finally:
            model.base_model.set_adapter(before)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that compute, in whichever wrapper; none where they are disabled."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return list(dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters))


def blocks_below_adapters(backbone: Backbone) -> int:
    """How many blocks at the bottom of the input tower compute the same with every adapter and with none."""
    top = len(backbone.towers[backbone.input_tower].blocks) - 1
    lowest = top
    for name, layer in adapted_modules(backbone.model):
        if not _changes_nothing(layer):
            try:
                where = backbone.locate(name)
            except ValueError:  # before the blocks, or what the features go through afterwards: nobody knows
                return 0
            if where.tower == backbone.input_tower:
                lowest = min(lowest, where.level)
    return lowest


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules that PEFT has put adapters into."""
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield name, module


def _changes_nothing(layer: Any) -> bool:
    """Whether a layer's adapters are all SeTAR's, and remove nothing."""
    ratios = getattr(layer, "setar_ratio", None)
    return ratios is not None and all(float(ratio) == 0 for ratio in ratios.values())
