"""How many block passes a search takes: the formula of docs/search.md, step by step."""

from __future__ import annotations

from collections.abc import Mapping

from setar_peft.search.layers import SearchPlan


class BlockPasses:
    """Counts block passes along the course of a search with room for every recording.

    A pass takes all inputs of a tower through one block. The first thing a search does is to take them through every
    block once, on the way to the loss of the base.

    Args:
        depths: Number of blocks by tower.

    Attributes:
        count: Passes so far, by tower.
    """

    def __init__(self, depths: Mapping[str, int]) -> None:
        self.count = dict(depths)
        self._depths = dict(depths)
        # The highest block whose input is recorded, and whether the tower's features are those of its weights.
        self._recorded = {tower: depth - 1 for tower, depth in depths.items()}
        self._has_features = dict.fromkeys(depths, True)

    def evaluate(self, tower: str, level: int, candidates: int) -> None:
        """Evaluate the candidates of a layer: each passes its block and those above; the other tower's features serve.

        Args:
            tower: The layer's tower.
            level: Its block, from the bottom; the number of blocks for a layer above them, which only the last block's
                pass leads to.
            candidates: How many there are.
        """
        for other in self._depths:
            if other != tower and not self._has_features[other]:
                self._record(other, self._depths[other] - 1)
                self.count[other] += 1
                self._has_features[other] = True
        level = min(level, self._depths[tower] - 1)
        self._record(tower, level)
        self.count[tower] += candidates * (self._depths[tower] - level)

    def change(self, tower: str, level: int) -> None:
        """Give a layer another weight: what was recorded above it is no longer so."""
        self._recorded[tower] = min(self._recorded[tower], level)
        self._has_features[tower] = False

    def _record(self, tower: str, level: int) -> None:
        self.count[tower] += max(0, level - self._recorded[tower])
        self._recorded[tower] = max(level, self._recorded[tower])


def block_passes(plan: SearchPlan, depths: Mapping[str, int]) -> dict[str, int]:
    """Block passes of a whole search by tower, at most: as if every decision changed its layer.

    In an order that lets layers compete, as if the cheapest to evaluate and the dearest to record were decided first.

    Args:
        plan: What the search is going to do.
        depths: Number of blocks by tower.
    """
    passes = BlockPasses(depths)
    for _ in range(plan.passes):
        for index, step in enumerate(plan.steps):
            competing = sorted(step, key=plan.passes_of, reverse=True)[: len(step) - index] if len(step) > 1 else step
            for layer in competing:
                tower, level, _ = plan.locations[layer]
                passes.evaluate(tower, level, len(plan.candidates[layer]))
            changed = [plan.locations[step[0]][:2]] if len(step) == 1 else [(tower, 0) for tower in depths]
            for tower, level in changed:
                passes.change(tower, level)
    return passes.count
