"""The work of a search in block passes: the table of docs/search.md as code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from setar_peft.search.plan import SearchPlan, lowest_levels


class BlockPasses:
    """Counts block passes along the course of a search with room for every recording.

    A pass takes all inputs of a tower through one block. The first thing a search does is to take them through every
    block once, on the way to the loss of the base.

    Args:
        depths: Number of blocks by tower.

    Attributes:
        count: Passes so far, by tower.
        backward: Passes so far on the way back, by tower.
    """

    def __init__(self, depths: Mapping[str, int]) -> None:
        self.count = dict(depths)
        self.backward = dict.fromkeys(depths, 0)
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
        self.present(other for other in self._depths if other != tower)
        level = min(level, self._depths[tower] - 1)
        self._record(tower, level)
        self.count[tower] += candidates * (self._depths[tower] - level)

    def present(self, towers: Iterable[str] | None = None) -> None:
        """Take towers to the features of their present weights, by default all: as the loss of those weights does."""
        for tower in self._depths if towers is None else towers:
            if not self._has_features[tower]:
                self._record(tower, self._depths[tower] - 1)
                self.count[tower] += 1
                self._has_features[tower] = True

    def gradient(self, lowest: Mapping[str, int]) -> None:
        """Compute the gradient at the present weights: there and back through the blocks from the lowest searched one.

        Args:
            lowest: Block by tower; a tower without searched layers takes no part.
        """
        self.present()
        for tower, level in lowest.items():
            self.count[tower] += self._depths[tower] - level
            self.backward[tower] += self._depths[tower] - level

    def change(self, tower: str, level: int) -> None:
        """Give a layer another weight: what was recorded above it is no longer so."""
        self._recorded[tower] = min(self._recorded[tower], level)
        self._has_features[tower] = False

    def _record(self, tower: str, level: int) -> None:
        self.count[tower] += max(0, level - self._recorded[tower])
        self._recorded[tower] = max(level, self._recorded[tower])


def block_passes(plan: SearchPlan, depths: Mapping[str, int]) -> BlockPasses:
    """Block passes of a whole search, at most: as if every decision changed its layer.

    In an order that lets layers compete, as if the cheapest to evaluate and the dearest to record were decided first.
    In the order "best_first" as if each evaluation took all inputs through every block of each searched tower. In the
    order "joint" for the usual number of rounds.

    Args:
        plan: What the search is going to do.
        depths: Number of blocks by tower.
    """
    passes = BlockPasses(depths)
    lowest = lowest_levels(plan.backbone, plan.locations.values())
    if plan.order == "joint":
        for _ in range(plan.evaluations()):
            passes.gradient(lowest)
            for tower, level in lowest.items():
                passes.change(tower, level)
            passes.present()
        return passes
    for _ in range(plan.passes):
        if plan.is_screened:
            passes.gradient(lowest)
        for index, step in enumerate(plan.steps if plan.order == "steps" else []):
            competing = sorted(step, key=plan.passes_of, reverse=True)[: len(step) - index] if len(step) > 1 else step
            for layer in competing:
                tower, level, _ = plan.locations[layer]
                passes.evaluate(tower, level, plan.tried(layer))
            for tower, level in [plan.locations[step[0]][:2]] if len(step) == 1 else lowest.items():
                passes.change(tower, level)
        for tower, level in lowest.items() if plan.order == "best_first" else ():
            passes.change(tower, level)
    if plan.order == "best_first":
        # Its own tower's blocks below the layer and above, or another tower's features: each is a pass of all at most.
        for tower in lowest:
            passes.count[tower] += plan.evaluations() * depths[tower]
    return passes
