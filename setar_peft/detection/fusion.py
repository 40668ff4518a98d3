"""Fusion of layers: the mean of one score over several blocks, chosen on in-distribution inputs without labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from setar_peft.backbones import Logits
from setar_peft.detection.scores import find_score
from setar_peft.detection.scoring import Reading, Score

# Where the paper finds its figures stable (Section 6 and Fig. 7).
_FEWEST_BINS, _MOST_BINS = 16, 128

# Blocks in a set that is chosen (paper, Section 5.1).
MOST_LAYERS = 5

# Fused scores held at a time while sets are compared: 8 MiB, and four times that of what they are the mean of.
_CHUNK_NUMEL = 1 << 20


class LayerFusion(Score):
    """The mean of a score over the logits after several blocks.

    The class token after a block, through the final norm and what the model projects it with, gives logits as the last
    block's does. The score of each is computed, and averaged over a set of blocks that holds the last. With "auto"
    the set is chosen by `fit`: of all sets of at most five blocks that hold the last, the one whose fused scores
    over in-distribution inputs have the histogram of least entropy, each set's histogram from its smallest to its
    largest score. Between equals the one with fewer blocks is chosen, then the one with the lower blocks. Sets whose
    scores are all equal say nothing and are left out.

    Source: De la Jara et al., 2025, https://arxiv.org/abs/2510.05782: Section 4; that scores are averaged, not
    probabilities, from Eq. 2 and Appendix H. There MCM is fused at temperature 1, and so it is here by default.

    Args:
        score: A score of the logits of whole inputs alone: "mcm", "msp", "max_logit", "energy", "entropy", "variance",
            "logit_gap", or one's own that reads `global_logits` and nothing else.
        layers: "auto", or the blocks: each once, from 0, the lowest, on; negative ones from the last, -1, down.
        bins: Of the histogram, from 16 to 128, between which the paper's figures are stable; `fit` needs as many
            inputs.

    Attributes:
        score: The score that is fused.
        layers: As given.
        bins: As given.
        chosen: The blocks that are read, from 0 on, in order; None before `fit`, and for given layers, which depend on
            the number of blocks where they are negative.
        blocks: How many blocks the model had in `fit`; None before.
        entropy: Of the chosen set's histogram, in nats; None before `fit`.

    Raises:
        ValueError: If the score reads something else or has to be fitted itself, there is no layer, one is there twice
            or no whole number, or there are too few bins or too many.
    """

    def __init__(
        self,
        score: str | Score | Callable[..., Tensor] = "mcm",
        layers: Literal["auto"] | Sequence[int] = "auto",
        *,
        bins: int = 32,
    ) -> None:
        inner = find_score(score)
        if inner.reads != {"global_logits"} or inner.needs_fit:
            reads = "has to be fitted" if inner.needs_fit else f"reads {', '.join(sorted(inner.reads))}"
            raise ValueError(
                f"The score {inner.name} {reads}; layers are fused over a score that reads global_logits alone, such "
                "as 'mcm', 'energy' or 'logit_gap'."
            )
        super().__init__(inner.function, of_cosines=inner.of_cosines, name=f"layer_fusion:{inner.name}")
        self.function = self._fused
        self.reads = frozenset({"layer_logits"})
        self.score = inner
        self.layers: Literal["auto"] | tuple[int, ...] = (
            "auto" if isinstance(layers, str) and layers == "auto" else _numbers(layers)
        )
        self.bins = bins
        self.chosen: tuple[int, ...] | None = None
        self.blocks: int | None = None
        self.entropy: float | None = None
        if not isinstance(bins, int) or not _FEWEST_BINS <= bins <= _MOST_BINS:
            raise ValueError(f"bins is {bins!r}; give a whole number from {_FEWEST_BINS} to {_MOST_BINS}.")

    @property
    def needs_fit(self) -> bool:
        """Whether the layers are still to be chosen."""
        return self.layers == "auto" and self.chosen is None

    def fit(self, readings: Iterable[Reading], **given: Any) -> LayerFusion:
        """The same with its layers chosen; itself where they were given.

        Of an input one number a block is kept. With b blocks there are as many sets as there are ways to take up to
        four of the b - 1 below the last: 562 of 12, 10,903 of 24.

        Args:
            readings: What the model says of in-distribution inputs; labels are not read.
            given: Settings that the score will be computed with, where they are not its own.

        Raises:
            ValueError: If there are fewer inputs than bins, a score is not finite, or no set tells inputs apart.
        """
        if self.layers != "auto":
            return self
        by_block = []
        for reading in readings:
            settings = self.settings(reading.logits.scale, given)
            layer_logits = self._read(reading.logits, None)["layer_logits"]
            by_block.append(torch.stack(list(self._by_layer(layer_logits, settings)), dim=1).double().cpu())
        scores = torch.cat(by_block) if by_block else torch.zeros(0, 1)
        if len(scores) < self.bins:
            raise ValueError(
                f"{self.name} chooses its layers by a histogram of {self.bins} bins, and there are {len(scores)} "
                f"inputs to fit it on; give {self.bins} or more, fewer bins ({_FEWEST_BINS} at least), or the layers."
            )
        broken = int((~scores.isfinite()).any(1).sum())
        if broken:
            raise ValueError(f"{self.name} is not finite for {broken} of the {len(scores)} inputs to fit it on.")
        fitted = LayerFusion(self.score, "auto", bins=self.bins)
        fitted.blocks = scores.shape[1]
        sets = list(_entropies(scores, self.bins))
        if not sets:
            raise ValueError(f"{self.name} gives every input the same score, whichever layers are read; take another.")
        fitted.entropy, fitted.chosen = min(sets, key=lambda found: found[0])
        return fitted

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The score that is fused, the layers as given and as chosen, blocks, bins and entropy; no tensors."""
        return {
            "score": self.score.name,
            "layers": self.layers if isinstance(self.layers, str) else list(self.layers),
            "chosen": None if self.chosen is None else list(self.chosen),
            "blocks": self.blocks,
            "bins": self.bins,
            "entropy": self.entropy,
        }, {}

    def with_state(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerFusion:
        """The fusion that `state` is of: without a search, and to the bit the same scores.

        Raises:
            ValueError: If the values are not such a state, or of another score.
        """
        wanted = set(self.state()[0])
        if set(values) != wanted or tensors or values["score"] != self.score.name:
            raise ValueError(
                f"This is no state of {self.name}: it has {', '.join(sorted([*values, *tensors])) or 'nothing'} and "
                f"the score {values.get('score')!r}; {', '.join(sorted(wanted))} and {self.score.name!r} are needed."
            )
        restored = LayerFusion(self.score, values["layers"], bins=values["bins"])
        if values["chosen"] is not None:
            restored.chosen, restored.blocks = _numbers(values["chosen"]), values["blocks"]
            restored.entropy = values["entropy"]
        return restored

    def _fused(self, layer_logits: Tensor, **settings: Any) -> Tensor:
        """The mean over the layers, (n,), of logits (n, blocks, classes)."""
        blocks = layer_logits.shape[1]
        if self.needs_fit:
            raise ValueError(f"{self.name} has not chosen its layers yet; call fit with in-distribution inputs.")
        if self.blocks not in (None, blocks):
            raise ValueError(
                f"{self.name} was fitted on {self.blocks} blocks, and this model has {blocks}; fit it anew."
            )
        read = self._read_of(self.layers if self.chosen is None else self.chosen, blocks)
        return torch.stack(list(self._by_layer(layer_logits[:, read], settings))).mean(0)

    def _by_layer(self, layer_logits: Tensor, settings: Mapping[str, Any]) -> Iterator[Tensor]:
        """The score of each layer, (n,)."""
        for logits in layer_logits.unbind(1):
            yield self.score(Logits(logits, None, 1.0), **settings)

    def _read_of(self, layers: Any, blocks: int) -> list[int]:
        """The layers from 0 on, in order."""
        outside = [layer for layer in layers if not -blocks <= layer < blocks]
        if outside:
            raise ValueError(
                f"layers has {outside[0]}, and the model has {blocks} blocks; give {-blocks} to {blocks - 1}."
            )
        read = sorted(layer % blocks for layer in layers)
        if len(set(read)) < len(read):
            raise ValueError(f"layers is {list(layers)}, which of {blocks} blocks names one twice; give each once.")
        return read


def _numbers(layers: Any) -> tuple[int, ...]:
    """Blocks by their numbers."""
    given = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else []
    whole = {layer for layer in given if isinstance(layer, int) and not isinstance(layer, bool)}
    if not given or len(whole) < len(given):
        raise ValueError(
            f"layers is {layers!r}; give 'auto', or blocks by their numbers, each once, such as [3, 7, 11]."
        )
    return tuple(given)


def _entropies(scores: Tensor, bins: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """The least entropy of a histogram of fused scores, with its set of blocks, in each run of sets; smallest first.

    Args:
        scores: Of each input and block, (n, blocks), float64.
        bins: Of a histogram.
    """
    inputs, blocks = scores.shape
    for below in range(min(MOST_LAYERS, blocks)):
        sets = itertools.combinations(range(blocks - 1), below)
        while chunk := list(itertools.islice(sets, max(1, _CHUNK_NUMEL // inputs))):
            members = torch.tensor(chunk, dtype=torch.long).reshape(len(chunk), below)
            fused = scores[:, members].sum(-1).add(scores[:, -1:]).div(below + 1)
            low, high = fused.amin(0), fused.amax(0)
            bin_of = ((fused - low) / (high - low) * bins).long().clamp(0, bins - 1)
            counts = torch.zeros(len(chunk), bins, dtype=torch.double)
            counts.scatter_add_(1, bin_of.T, torch.ones_like(fused.T))
            # Sorted, histograms with the same counts have the same entropy to the bit, and the first of them wins.
            entropy = torch.special.entr(counts.sort(1).values / inputs).sum(1)
            entropy[high == low] = torch.inf
            best = int(entropy.argmin())
            if entropy[best].isfinite():
                yield float(entropy[best]), (*chunk[best], blocks - 1)
