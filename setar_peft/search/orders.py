"""The order in which a search visits the layers, as data: a list of steps, each a list of layers to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

Steps = list[list[str]]


def steps_of(order: str | Sequence[str], layers: Mapping[str, Sequence[str]]) -> Steps:
    """The steps of one pass.

    A step names the layers that compete in it: the search decides one of them, so that the usual orders have one
    layer a step, and the layer-exhaustive order offers every layer in every step.

    Args:
        order: "vision_text" (the paper's), "text_vision", "vision", "text", "interleaved" (the towers take turns, both
            from the top down), "exhaustive", or the layers' names in the order wanted.
        layers: Names of the layers to search by tower, each from the top down.

    Raises:
        ValueError: If the order names a tower or a layer that is not there, or towers of unequal depth are to be
            interleaved.
    """
    everything = list(chain.from_iterable(layers.values()))
    if not isinstance(order, str):
        unknown = sorted(set(order) - set(everything))
        if unknown or len(set(order)) != len(order):
            raise ValueError(
                f"order names layers that are not searched, or names one twice: {unknown or sorted(order)}. "
                "Name each of target_modules at most once."
            )
        return [[name] for name in order]
    if order == "exhaustive":
        return [everything] * len(everything)
    if order == "interleaved":
        towers = list(layers.values())
        if len({len(tower) for tower in towers}) > 1:
            depths = ", ".join(f"{name} {len(tower)}" for name, tower in layers.items())
            raise ValueError(
                f"order 'interleaved' needs as many layers in each tower; here: {depths}. Use 'vision_text', or choose "
                "layers with target_modules."
            )
        return [[name] for turn in zip(*towers, strict=True) for name in turn]
    wanted = order.split("_")
    # A model with one tower has nothing to take turns with: the paper's default order is then that tower.
    present = [tower for tower in wanted if tower in layers]
    if not present or (len(wanted) == 1 and wanted[0] not in layers):
        raise ValueError(
            f"order {order!r} finds no layer to search: there are layers in {', '.join(layers) or 'no tower'}. "
            "Change order or target_modules."
        )
    return [[name] for tower in present for name in layers[tower]]
