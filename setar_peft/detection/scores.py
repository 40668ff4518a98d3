"""Scores that tell in-distribution (ID) inputs from the rest, as pure functions of a model's logits.

Every score is float32 of shape (n,) and higher means more in-distribution. Logits may have any floating dtype
and are taken to float32 first: at temperature 1 a bfloat16 softmax near 1 has a handful of distinct values,
and the ties between images decide the metrics. CLIP's logits are the scaled ones, 100 * cosine; temperature 1
on them is the setting of the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

Pooling = Literal["patch", "class"]

# Logits taken to float32 at a time: 64 MiB, whatever the number of images.
_CHUNK_NUMEL = 1 << 24


def mcm(global_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Maximum concept matching: the largest softmax probability (paper, Eq. 1).

    Args:
        global_logits: Image-text logits, (n, classes), floating.
        temperature: Divides the logits, > 0.

    Returns:
        (n,) float32, in [1 / classes, 1].

    Raises:
        ValueError: If the logits are not 2-D and floating with at least one class, or the temperature is not
            positive.
    """
    _check_logits("global_logits", global_logits, ("n", "classes"))
    return _per_image(global_logits, temperature, lambda scaled: scaled.softmax(-1).amax(-1))


def msp(global_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Maximum softmax probability: `mcm` under the name it has where the logits are a classifier's.

    Source: Hendrycks and Gimpel, 2017, https://arxiv.org/abs/1610.02136.
    """
    return mcm(global_logits, temperature)


def local_mcm(local_logits: Tensor, temperature: float = 1.0, pooling: Pooling = "patch") -> Tensor:
    """Maximum concept matching over the patches of an image: the local part of GL-MCM (paper, Eq. 2).

    Args:
        local_logits: Patch-text logits, (n, patches, classes), floating.
        temperature: Divides the logits, > 0.
        pooling: "patch" takes the softmax of each patch and then the maximum over patches and classes, as the
            published code, which made the paper's tables. "class" takes the maximum over patches of each
            class first and then the softmax, as Eq. 2 is written.

    Returns:
        (n,) float32, in [1 / classes, 1].

    Raises:
        ValueError: If the logits are not 3-D and floating with at least one patch and class, the temperature
            is not positive, or the pooling is unknown.
    """
    _check_logits("local_logits", local_logits, ("n", "patches", "classes"))
    if pooling == "patch":
        return _per_image(local_logits, temperature, lambda scaled: scaled.softmax(-1).amax((1, 2)))
    if pooling == "class":
        return _per_image(local_logits, temperature, lambda scaled: scaled.amax(1).softmax(-1).amax(-1))
    raise ValueError(
        f"pooling is {pooling!r}; write one of {', '.join(map(repr, get_args(Pooling)))}: 'patch' is the "
        "softmax within each patch, of the published code, 'class' the paper's Eq. 2."
    )


def gl_mcm(global_logits: Tensor, local_logits: Tensor, temperature: float = 1.0, pooling: Pooling = "patch") -> Tensor:
    """GL-MCM: `mcm` of the whole image plus `local_mcm` of its patches (paper, Eq. 2).

    Args:
        global_logits: Image-text logits, (n, classes), floating.
        local_logits: Patch-text logits of the same images and classes, (n, patches, classes), floating.
        temperature: Divides both, > 0.
        pooling: See `local_mcm`.

    Returns:
        (n,) float32, in [2 / classes, 2].

    Raises:
        ValueError: As `mcm` and `local_mcm`, or if the two disagree on the number of images or classes.
    """
    _check_logits("global_logits", global_logits, ("n", "classes"))
    _check_logits("local_logits", local_logits, ("n", "patches", "classes"))
    if local_logits.shape[::2] != global_logits.shape:
        raise ValueError(
            f"global_logits have shape {tuple(global_logits.shape)} and local_logits "
            f"{tuple(local_logits.shape)}; give (n, classes) and (n, patches, classes) of the same n images "
            "and the same classes."
        )
    return mcm(global_logits, temperature) + local_mcm(local_logits, temperature, pooling)


def max_logit(global_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The largest logit, divided by the temperature.

    Source: Hendrycks et al., 2022, https://arxiv.org/abs/1911.11132.

    Args:
        global_logits: (n, classes), floating.
        temperature: Divides the logits, > 0; it scales the score and leaves the order of images as it is.

    Returns:
        (n,) float32, unbounded.

    Raises:
        ValueError: As `mcm`.
    """
    _check_logits("global_logits", global_logits, ("n", "classes"))
    return _per_image(global_logits, temperature, lambda scaled: scaled.amax(-1))


def energy(global_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Minus the free energy: T * logsumexp(logits / T).

    Source: Liu et al., 2020, https://arxiv.org/abs/2010.03759, Eq. 4 with its sign turned.

    Args:
        global_logits: (n, classes), floating.
        temperature: T > 0; 0.1 in the paper's rows for Swin (Table 10).

    Returns:
        (n,) float32, between the largest logit and that plus T * log(classes).

    Raises:
        ValueError: As `mcm`.
    """
    _check_logits("global_logits", global_logits, ("n", "classes"))
    return _per_image(global_logits, temperature, lambda scaled: temperature * scaled.logsumexp(-1))


def entropy(global_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Minus the entropy of the softmax, the sum of p * log(p), in nats.

    Exact, as the published score is. The 1e-5 inside the logarithm belongs to the published LoCoOp loss
    alone; here it would move a score by up to 1e-5 * classes.

    Args:
        global_logits: (n, classes), floating.
        temperature: Divides the logits, > 0.

    Returns:
        (n,) float32, in [-log(classes), 0].

    Raises:
        ValueError: As `mcm`.
    """
    _check_logits("global_logits", global_logits, ("n", "classes"))
    # entr is 0 where p underflows to 0; p * log(p) would be NaN there.
    return _per_image(global_logits, temperature, lambda scaled: -torch.special.entr(scaled.softmax(-1)).sum(-1))


def variance(global_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Variance of the softmax over the classes: divided by their number, as the published code, not one less.

    Args:
        global_logits: (n, classes), floating.
        temperature: Divides the logits, > 0.

    Returns:
        (n,) float32, in [0, (classes - 1) / classes^2].

    Raises:
        ValueError: As `mcm`.
    """
    _check_logits("global_logits", global_logits, ("n", "classes"))
    # The mean of a softmax is 1 / classes; Tensor.var warns about a set without images.
    mean = 1 / global_logits.shape[-1]
    return _per_image(global_logits, temperature, lambda scaled: (scaled.softmax(-1) - mean).square().mean(-1))


@dataclass(frozen=True)
class Score:
    """A score and what it reads.

    Attributes:
        function: Called with the logits it reads, in the order of `reads`, and `temperature`.
        reads: Which logits those are.
    """

    function: Callable[..., Tensor]
    reads: tuple[Literal["global", "local"], ...]

    @property
    def needs_local(self) -> bool:
        """Whether local logits are read, so that the model has to give them."""
        return "local" in self.reads


SCORES: dict[str, Score] = {
    "mcm": Score(mcm, ("global",)),
    "local_mcm": Score(local_mcm, ("local",)),
    "gl_mcm": Score(gl_mcm, ("global", "local")),
    "msp": Score(msp, ("global",)),
    "max_logit": Score(max_logit, ("global",)),
    "energy": Score(energy, ("global",)),
    "entropy": Score(entropy, ("global",)),
    "variance": Score(variance, ("global",)),
}


def find_score(name: str) -> Score:
    """The entry of `SCORES` under a name.

    Raises:
        ValueError: If there is no such score.
    """
    if name not in SCORES:
        raise ValueError(f"score is {name!r}; write one of {', '.join(map(repr, SCORES))}.")
    return SCORES[name]


def score(name: str, global_logits: Tensor, local_logits: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """The score of that name.

    Args:
        name: A key of `SCORES`.
        global_logits: (n, classes), floating; "local_mcm" does not read them.
        local_logits: (n, patches, classes), floating; read where `SCORES[name].needs_local`.
        temperature: Divides the logits, > 0.

    Returns:
        (n,) float32, higher meaning more in-distribution.

    Raises:
        ValueError: If the name is unknown, local logits are needed and missing, or the score refuses its
            arguments.
    """
    found = find_score(name)
    if local_logits is None:
        if found.needs_local:
            global_only = [key for key, other in SCORES.items() if not other.needs_local]
            raise ValueError(
                f"score {name!r} reads local_logits and got None; give the patch logits, "
                f"(n, patches, classes), or take a score without them: {', '.join(map(repr, global_only))}."
            )
        return found.function(global_logits, temperature=temperature)
    logits = {"global": global_logits, "local": local_logits}
    return found.function(*(logits[kind] for kind in found.reads), temperature=temperature)


def _per_image(logits: Tensor, temperature: float, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` over runs of images in float32, so that the set as a whole is never copied to float32.

    Args:
        logits: (n, ..., classes).
        temperature: Divides the logits, > 0.
        reduce: Takes (m, ..., classes), float32 and divided by the temperature, to (m,).

    Returns:
        (n,) float32.

    Raises:
        ValueError: If the temperature is not positive.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature!r}; give a positive number, 1.0 for CLIP's logits (100 * cosine)."
        )
    images_per_chunk = max(1, _CHUNK_NUMEL // math.prod(logits.shape[1:]))
    return torch.cat([reduce(chunk.float() / temperature) for chunk in torch.split(logits, images_per_chunk)])


def _check_logits(argument: str, logits: Tensor, axes: tuple[str, ...]) -> None:
    shape = tuple(logits.shape)
    if logits.ndim != len(axes):
        hint = " Join the height and width of the patches: logits.flatten(1, 2)." if logits.ndim == 4 else ""
        raise ValueError(
            f"{argument} have shape {shape}, {logits.ndim} dimensions; give {len(axes)}: ({', '.join(axes)}).{hint}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"{argument} have dtype {logits.dtype}; give floating logits, as the model made them.")
    for axis, size in zip(axes[1:], shape[1:], strict=True):
        if size == 0:
            raise ValueError(f"{argument} have shape {shape}, no {axis}; give at least one.")
