"""Trying out weights: a layer's weight is exchanged for a truncated one, never written to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from setar_peft.backbones.untouched import attributes_put_back
from setar_peft.decomposition import Decomposition, PruneStrategy, Residual, decompose
from setar_peft.search.decisions import Prediction
from setar_peft.tuner.loading import plain_name


class SwappableWeight:
    """The weight of one linear layer, which can be exchanged for the length of a search.

    The layer's parameter object itself is put aside and put back, so that what the search leaves behind is the same
    parameter with the same values.

    Args:
        name: Full name of the module.
        module: A `torch.nn.Linear` or transformers' `Conv1D`.

    Raises:
        ValueError: If the module is something else, or its weight is no plain parameter.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, (nn.Linear, Conv1D)) or "weight" not in module._parameters:
            raise ValueError(
                f"{name} is a {type(module).__name__}; the search tries out weights of plain torch.nn.Linear and "
                "transformers' Conv1D layers. Search before quantising or adding adapters, or take it out of "
                "target_modules."
            )
        self.name = name
        self.module = module
        self._transposed = isinstance(module, Conv1D)
        self._original = module._parameters["weight"]

    @property
    def original(self) -> Tensor:
        """The untouched weight as a matrix W, (m, n)."""
        assert self._original is not None
        return self.oriented(self._original.detach())

    def set(self, matrix: Tensor) -> None:
        """Let the module compute with another matrix, (m, n), rounded to the weight's dtype."""
        weight = self.oriented(matrix).to(self.original.dtype)
        self.module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)

    def restore(self) -> None:
        """Put the original parameter back."""
        self.module._parameters["weight"] = self._original

    def as_leaf(self) -> nn.Parameter:
        """Let the module compute with a leaf of autograd that shares the present weight's values, and return it."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        leaf = self.module._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=True)
        return leaf

    @contextmanager
    def holding(self, matrix: Tensor) -> Iterator[None]:
        """Compute with another matrix, (m, n), and go back to the present one."""
        with attributes_put_back([self.module], ["_parameters"]):
            self.set(matrix)
            yield

    def oriented(self, matrix: Tensor) -> Tensor:
        """From what the module holds to a matrix (m, n), or back."""
        return matrix.T if self._transposed else matrix


class TruncatedLayers:
    """Layers of a model that can be truncated and restored; what is removed of them is remembered.

    Args:
        model: The model; its weights are exchanged, never written to.
        layers: Full names of the layers that are searched.
        prune: Which components a ratio removes.
        seed: Seed of the random strategy.
        keep_decompositions: Keep every layer's decomposition, for searches that come back to a layer.
        by_gram: How they are made (see `decompose`).

    Attributes:
        weights: The layers' weights, by module name.
        rank_ratios: Layer -> the ratio by which it is truncated at present.
        residuals: The removed components of the layers that are truncated at present, by module name.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        prune: PruneStrategy,
        seed: int,
        *,
        keep_decompositions: bool,
        by_gram: bool | None = None,
    ) -> None:
        self.model = model
        self.weights = {name: SwappableWeight(name, model.get_submodule(name)) for name in layers}
        self.rank_ratios = dict.fromkeys(self.weights, 0.0)
        self.residuals: dict[str, Residual] = {}
        self._prune: PruneStrategy = prune
        self._seed = seed
        self._keep = keep_decompositions
        self._by_gram = by_gram
        self._decompositions: dict[str, Decomposition] = {}

    def choose(self, layer: str, rank_ratio: float) -> None:
        """Truncate a layer by a ratio from now on; 0 puts the original back."""
        self.rank_ratios[layer] = rank_ratio
        if rank_ratio == 0:
            self.weights[layer].restore()
            self.residuals.pop(layer, None)
            return
        decomposition = self._decomposition(layer)
        self.residuals[layer] = decomposition.residual(rank_ratio)
        self.weights[layer].set(decomposition.kept(rank_ratio))

    def restore(self) -> None:
        """Put every original weight back."""
        for weight in self.weights.values():
            weight.restore()

    @contextmanager
    def as_leaves(self) -> Iterator[dict[str, nn.Parameter]]:
        """Compute with leaves of autograd in the place of all present weights, which share their values.

        Yields:
            Layer -> the leaf as its module holds it.
        """
        with attributes_put_back([weight.module for weight in self.weights.values()], ["_parameters"]):
            yield {layer: weight.as_leaf() for layer, weight in self.weights.items()}

    def matrices(self, layer: str, ratios: Sequence[float]) -> Iterator[Tensor]:
        """The layer's weight, (m, n), truncated by each of the ratios."""
        decomposition = self._decomposition(layer)
        for ratio in ratios:
            yield decomposition.kept(ratio)

    def predicted(self, layer: str, gradient: Tensor, ratios: Sequence[float]) -> dict[float, Prediction]:
        """What truncating a layer by each of the ratios, and not by its present one, changes to first order.

        Args:
            layer: The layer.
            gradient: Of what is minimised by the layer's weight, (m, n), with all layers as they are at present.
            ratios: The ratios; 0 for the whole weight.

        Returns:
            Ratio -> prediction; of a ratio that is the present one, no change.
        """
        decomposition, present = self._decomposition(layer), self.rank_ratios[layer]
        contributions = decomposition.contributions(gradient).double()
        energies = decomposition.s.double().square()
        removed = {ratio: decomposition.removed_components(ratio) for ratio in {*ratios, present}}
        changes = {ratio: float(contributions[components].sum()) for ratio, components in removed.items()}
        energy = {
            ratio: float(energies[components].sum() / energies.sum().clamp(min=1e-300))
            for ratio, components in removed.items()
        }
        return {
            ratio: Prediction(changes[ratio] - changes[present], abs(energy[ratio] - energy[present]))
            for ratio in ratios
        }

    def _decomposition(self, layer: str) -> Decomposition:
        if layer not in self._decompositions:
            if not self._keep:
                self._decompositions.clear()
            self._decompositions[layer] = decompose(
                self.weights[layer].original,
                self._prune,
                seed=self._seed,
                name=plain_name(layer),
                by_gram=self._by_gram,
            )
        return self._decompositions[layer]
