"""Scores that tell in-distribution (ID) inputs from the rest, as pure functions of a model's logits.

Every score is float32 of shape (n,) and higher means more in-distribution. Logits may have any floating dtype
and are taken to float32 first: a bfloat16 softmax has a handful of distinct values, and the ties between images
decide the metrics.

The paper's MCM, L-MCM, GL-MCM, entropy and variance are softmaxes of *cosines* at temperature 1: the published scores
of Pascal-VOC, 14 classes, lie between 1 / 14 = 0.0714 and 0.082. A model's logits are its logit scale times cosines
(100 for CLIP), so on logits the temperature of the paper is that scale; a classifier has no scale, and takes 1. (The
paper's footnote 4 has it the wrong way round: 1 "for the scaled CLIP logits".) These functions therefore have no
default temperature, and `score`, which knows the scale, has the paper's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from setar_peft.backbones import Logits
from setar_peft.detection.neglabel import neglabel
from setar_peft.detection.per_image import check_count, check_logits, per_image
from setar_peft.detection.scoring import Score

if TYPE_CHECKING:
    from setar_peft.backbones import ImageFeatures

Pooling = Literal["patch", "class"]
# A name, function or `Score`, several of them, or names with the settings that are not the score's own.
WantedScores: TypeAlias = str | Score | Callable[..., Tensor] | Sequence[Any] | Mapping[str, Mapping[str, Any]]

# From this many classes on `logit_gap` reads a fifth of them, below it half (paper, Table 8: 100 and 1,000; 10 and 20).
_MANY_CLASSES = 100


def mcm(global_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Maximum concept matching: the largest softmax probability (paper, Eq. 1).

    Args:
        global_logits: Image-text logits, (n, classes), floating.
        temperature: Divides the logits, > 0; the paper's is the model's logit scale, `Logits.scale`.

    Returns:
        (n,) float32, in [1 / classes, 1].

    Raises:
        ValueError: If the logits are not 2-D and floating with at least one class, or the temperature is not
            positive.
    """
    check_logits("global_logits", global_logits, ("n", "classes"))
    return per_image(global_logits, temperature, lambda scaled: scaled.softmax(-1).amax(-1))


def msp(global_logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Maximum softmax probability: how sure the model is of its prediction, in its own logits; otherwise as `mcm`.

    For a classifier the two are one.

    Source: Hendrycks and Gimpel, 2017, https://arxiv.org/abs/1610.02136.
    """
    return mcm(global_logits, temperature)


def local_mcm(local_logits: Tensor, temperature: Tensor | float, pooling: Pooling = "patch") -> Tensor:
    """Maximum concept matching over the patches of an image: the local part of GL-MCM (paper, Eq. 2).

    Args:
        local_logits: Patch-text logits, (n, patches, classes), floating.
        temperature: Divides the logits, > 0; the paper's is the model's logit scale, `Logits.scale`.
        pooling: "patch" takes the softmax of each patch and then the maximum over patches and classes, as the
            published code, which made the paper's tables. "class" takes the maximum over patches of each
            class first and then the softmax, as Eq. 2 is written.

    Returns:
        (n,) float32, in [1 / classes, 1].

    Raises:
        ValueError: If the logits are not 3-D and floating with at least one patch and class, the temperature
            is not positive, or the pooling is unknown.
    """
    check_logits("local_logits", local_logits, ("n", "patches", "classes"))
    if pooling == "patch":
        return per_image(local_logits, temperature, lambda scaled: scaled.softmax(-1).amax((1, 2)))
    if pooling == "class":
        return per_image(local_logits, temperature, lambda scaled: scaled.amax(1).softmax(-1).amax(-1))
    raise ValueError(
        f"pooling is {pooling!r}; write one of {', '.join(map(repr, get_args(Pooling)))}: 'patch' is the "
        "softmax within each patch, of the published code, 'class' the paper's Eq. 2."
    )


def gl_mcm(
    global_logits: Tensor,
    local_logits: Tensor,
    temperature: Tensor | float,
    pooling: Pooling = "patch",
    local_weight: float = 1.0,
) -> Tensor:
    """GL-MCM: `mcm` of the whole image plus `local_mcm` of its patches (paper, Eq. 2).

    Args:
        global_logits: Image-text logits, (n, classes), floating.
        local_logits: Patch-text logits of the same images and classes, (n, patches, classes), floating.
        temperature: Divides both, > 0; the paper's is the model's logit scale, `Logits.scale`.
        pooling: See `local_mcm`.
        local_weight: What `local_mcm` is multiplied by, >= 0; 0.5 in GL-MCM's own published script.

    Returns:
        (n,) float32, in [(1 + local_weight) / classes, 1 + local_weight].

    Raises:
        ValueError: As `mcm` and `local_mcm`, if the two disagree on the number of images or classes, or the weight is
            negative or not finite.
    """
    if not 0 <= local_weight < math.inf:
        raise ValueError(f"local_weight is {local_weight!r}; give a finite number of 0 or more, such as the paper's 1.")
    check_logits("global_logits", global_logits, ("n", "classes"))
    check_logits("local_logits", local_logits, ("n", "patches", "classes"))
    if local_logits.shape[::2] != global_logits.shape:
        raise ValueError(
            f"global_logits have shape {tuple(global_logits.shape)} and local_logits "
            f"{tuple(local_logits.shape)}; give (n, classes) and (n, patches, classes) of the same n images "
            "and the same classes."
        )
    return mcm(global_logits, temperature) + local_weight * local_mcm(local_logits, temperature, pooling)


def max_logit(global_logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
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
    check_logits("global_logits", global_logits, ("n", "classes"))
    return per_image(global_logits, temperature, lambda scaled: scaled.amax(-1))


def energy(global_logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Minus the free energy: T * logsumexp(logits / T).

    Source: Liu et al., 2020, https://arxiv.org/abs/2010.03759, Eq. 4 with its sign turned.

    Args:
        global_logits: (n, classes), floating.
        temperature: T > 0. The paper's energy rows for Swin come from 1, though Table 10 says 0.1; the published
            code takes 100 for CLIP.

    Returns:
        (n,) float32, between the largest logit and that plus T * log(classes).

    Raises:
        ValueError: As `mcm`.
    """
    check_logits("global_logits", global_logits, ("n", "classes"))
    return per_image(global_logits, temperature, lambda scaled: temperature * scaled.logsumexp(-1))


def entropy(global_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Minus the entropy of the softmax, the sum of p * log(p), in nats.

    Exact, as the published score is. The 1e-5 inside the logarithm belongs to the published LoCoOp loss
    alone; here it would move a score by up to 1e-5 * classes.

    Args:
        global_logits: (n, classes), floating.
        temperature: Divides the logits, > 0; the paper's is the model's logit scale, `Logits.scale`.

    Returns:
        (n,) float32, in [-log(classes), 0].

    Raises:
        ValueError: As `mcm`.
    """
    check_logits("global_logits", global_logits, ("n", "classes"))
    # entr is 0 where p underflows to 0; p * log(p) would be NaN there.
    return per_image(global_logits, temperature, lambda scaled: -torch.special.entr(scaled.softmax(-1)).sum(-1))


def variance(global_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Variance of the softmax over the classes: divided by their number, as the published code, not one less.

    Args:
        global_logits: (n, classes), floating.
        temperature: Divides the logits, > 0; the paper's is the model's logit scale, `Logits.scale`.

    Returns:
        (n,) float32, in [0, (classes - 1) / classes^2].

    Raises:
        ValueError: As `mcm`.
    """
    check_logits("global_logits", global_logits, ("n", "classes"))
    # The mean of a softmax is 1 / classes; Tensor.var warns about a set without images.
    mean = 1 / global_logits.shape[-1]
    return per_image(global_logits, temperature, lambda scaled: (scaled.softmax(-1) - mean).square().mean(-1))


def logit_gap(global_logits: Tensor, temperature: Tensor | float, top_n: int | None = None) -> Tensor:
    """LogitGap: the largest logit minus the mean of the next ones.

    Source: Liang et al., 2025, https://arxiv.org/abs/2510.20134. Its Eq. 8 counts the largest logit as one of the N;
    the published code takes N logits below it, and so does this. The authors read cosines of a CLIP and the logits of a
    classifier; being linear, the score is ordered alike at every temperature.

    Args:
        global_logits: (n, classes), floating.
        temperature: Divides the logits, > 0; the authors' is the model's logit scale, `Logits.scale`.
        top_n: How many logits below the largest, from 1 to classes - 1. By default a fifth of the classes, and half of
            them where there are fewer than 100, rounded down: 200 of 1,000, 20 of 100, 10 of 20, 5 of 10, as in the
            paper's Table 8, which leaves open what is between 20 and 100.

    Returns:
        (n,) float32, at least 0.

    Raises:
        ValueError: As `mcm`; if there are fewer than two classes; or if top_n is out of its range.
    """
    check_logits("global_logits", global_logits, ("n", "classes"))
    classes = global_logits.shape[-1]
    if classes < 2:
        raise ValueError("global_logits have one class; logit_gap compares classes, so give logits of two or more.")
    if top_n is None:
        top_n = classes // (5 if classes >= _MANY_CLASSES else 2)
    check_count("top_n", top_n, classes - 1, f"there are {classes} classes")

    def gap(scaled: Tensor) -> Tensor:
        largest = scaled.topk(top_n + 1, dim=-1).values
        return largest[:, 0] - largest[:, 1:].mean(-1)

    return per_image(global_logits, temperature, gap)


SCORES: dict[str, Score] = {
    known.name: known
    for known in (
        Score(mcm, of_cosines=True),
        Score(local_mcm, of_cosines=True),
        Score(gl_mcm, of_cosines=True),
        Score(msp),
        Score(max_logit),
        Score(energy),
        Score(entropy, of_cosines=True),
        Score(variance, of_cosines=True),
        Score(logit_gap, of_cosines=True),
        Score(neglabel),
    )
}

# Where scores are made that have a name in two parts: "layer_fusion:mcm" is LayerFusion("mcm"). They stand above this.
FAMILIES = {
    "layer_fusion": ("setar_peft.detection.fusion", "LayerFusion"),
    "pytorch_ood": ("setar_peft.detection.external", "PytorchOOD"),
}


def register_score(new: Score | Callable[..., Tensor]) -> Score:
    """Make a score known by its name: in lists of scores, on the command line, and to a detector that is loaded.

    Args:
        new: A `Score`, or a function that becomes one.

    Raises:
        ValueError: If another score has that name, or it is none (see `Score`).
    """
    found = new if isinstance(new, Score) else Score(new)
    _check_name(found)
    return SCORES.setdefault(found.name, found)


def find_score(wanted: str | Score | Callable[..., Tensor]) -> Score:
    """The score under a name; a score as it is; or a function as a score (see `Score`).

    Args:
        wanted: A key of `SCORES`, or a name such as "layer_fusion:mcm"; a score; or a function.

    Raises:
        ValueError: If there is no such score, it is none, or another one is known under its name.
    """
    if not isinstance(wanted, (str, Score)):
        wanted = next((known for known in SCORES.values() if known.function is wanted), None) or Score(wanted)
    if isinstance(wanted, Score):
        _check_name(wanted)
        return wanted
    family, _, made_of = wanted.partition(":")
    if wanted not in SCORES and family in FAMILIES:
        module, maker = FAMILIES[family]
        found: Score = getattr(importlib.import_module(module), maker)(made_of)
        return found
    if wanted not in SCORES:
        families = "".join(f", or '{family}:...'" for family in FAMILIES)
        raise ValueError(f"score is {wanted!r}; write one of {', '.join(map(repr, SCORES))}{families}.")
    return SCORES[wanted]


def _check_name(score: Score) -> None:
    # A copy, as another process has it, is the same score.
    known = SCORES.get(score.name, score)
    if (known.function, known.of_cosines) != (score.function, score.of_cosines):
        raise ValueError(
            f"There is a score {score.name!r} already; give yours another name: Score(function, name=...)."
        )


def chosen_scores(
    scores: WantedScores,
    temperature: float | None = None,
) -> dict[str, tuple[Score, dict[str, Any]]]:
    """Scores as users give them.

    Args:
        scores: One score (a name out of `SCORES`, a `Score`, or a function), several in a list, or a mapping from
            names to the settings that are not the score's own, such as `{"gl_mcm": {"local_weight": 0.5}}`.
        temperature: Of every score whose settings do not say it; None for each score's own.

    Returns:
        Name -> the score, and the settings that were given for it.

    Raises:
        ValueError: If there is none, one is unknown, or two have one name.
    """
    if isinstance(scores, Mapping):
        if not all(isinstance(settings, Mapping) for settings in scores.values()):
            raise ValueError(f"scores is {scores!r}; give each score its settings by name, as in {{'mcm': {{}}}}.")
        given = [(find_score(name), dict(settings)) for name, settings in scores.items()]
    else:
        several = scores if isinstance(scores, Sequence) and not isinstance(scores, str) else [scores]
        given = [(find_score(one), {}) for one in several]
    names = [found.name for found, _ in given]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not given:
        what = f"names {', '.join(twice)} twice" if twice else "is empty"
        raise ValueError(f"scores {what}; give each score once, such as ['mcm', 'gl_mcm'].")
    shared = {} if temperature is None else {"temperature": temperature}
    return {found.name: (found, {**shared, **settings}) for found, settings in given}


def chosen_score(wanted: Any, temperature: float | None = None) -> tuple[Score, dict[str, Any]]:
    """The one score that a detector decides by, and the settings that were given for it; see `chosen_scores`.

    Raises:
        ValueError: As `chosen_scores`, and if there are several.
    """
    chosen = chosen_scores(wanted, temperature)
    if len(chosen) > 1:
        raise ValueError(f"score is {', '.join(map(repr, chosen))}; a detector decides by one.")
    return next(iter(chosen.values()))


def score(
    wanted: str | Score | Callable[..., Tensor], logits: Logits, features: ImageFeatures | None = None, **settings: Any
) -> Tensor:
    """A score of some inputs, at the paper's temperature unless another is given.

    Args:
        wanted: See `find_score`.
        logits: From `image_logits` or `Backbone.logits`; local ones are read where the score `needs_local`. Made by
            hand, `Logits(pooled, local, scale=100.0)` are 100 times cosines, and a classifier's have the scale 1.
        features: From `Backbone.embedded`; for a score that reads them.
        settings: `temperature`, > 0: by default `logits.scale` for scores of cosines (MCM and its kin, entropy,
            variance), 1 for those of the model's own logits (MSP, max-logit, energy). And what else the score's
            function takes: `pooling`, `local_weight`.

    Returns:
        (n,) float32, higher meaning more in-distribution.

    Raises:
        ValueError: If the name is unknown, the score reads something that is missing, or it refuses its arguments.
    """
    if not isinstance(logits, Logits):
        raise ValueError(f"logits is a {type(logits).__name__}; give Logits(pooled, local, scale).")
    found = find_score(wanted)
    return found(logits, features, **found.settings(logits.scale, settings))
