"""Which patch of an image speaks for which class, and how strongly: the map behind GL-MCM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from setar_peft.backbones import Logits, PatchGrid, named_inputs
from setar_peft.backbones.grid import image_pixels
from setar_peft.data.images import picture_of
from setar_peft.data.inputs import InputBatch
from setar_peft.detection.features import Reader
from setar_peft.plots.explanation import patch_figure, token_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Explanation:
    """What the patches of an image, or the tokens of a text, speak for.

    Attributes:
        class_names: Names of the classes.
        classes: Index of each patch's strongest class, (rows, columns), int64; of a text's tokens (1, tokens).
        strengths: That class's probability within the patch, (rows, columns), float32, in [1 / classes, 1]. The largest
            is the local part of GL-MCM.
        strongest: Row and column of the patch with the largest strength.
        label: The class of the image as a whole.
        score: Its score, where one was given.
        temperature: What the logits were divided by.
        patch: Height and width of a patch in pixels of the picture.
        picture: The image as the model saw it; None where it was not given.
        tokens: A text's tokens, (columns,); None for an image.
    """

    class_names: tuple[str, ...]
    classes: NDArray[np.int64]
    strengths: NDArray[np.float32]
    strongest: tuple[int, int]
    label: str
    score: float | None
    temperature: float
    patch: tuple[int, int]
    picture: Image.Image | None = None
    tokens: tuple[str, ...] | None = None

    def figure(self) -> Figure:
        """The map as a picture: over the image and beside it, or as coloured tokens.

        Raises:
            ValueError: If there is neither picture nor tokens, or matplotlib is missing.
        """
        score = "" if self.score is None else f", score {self.score:.4g}"
        title = f"{self.label.replace('$', chr(92) + '$')}{score} (temperature {self.temperature:.4g})"
        if self.tokens is not None:
            classes, strengths, strongest = self.classes[0], self.strengths[0], self.strongest[1]
            return token_figure(self.tokens, classes, strengths, self.class_names, strongest=strongest, title=title)
        if self.picture is None:
            raise ValueError("The explanation has no picture to draw its map on; give explanation_of the picture.")
        return patch_figure(
            self.picture,
            self.classes,
            self.strengths,
            self.class_names,
            patch=self.patch,
            strongest=self.strongest,
            title=title,
        )


def explanation_of(
    logits: Logits,
    class_names: Sequence[str],
    grid: PatchGrid,
    *,
    temperature: Tensor | float | None = None,
    score: float | None = None,
    picture: Image.Image | None = None,
    tokens: Sequence[str] | None = None,
) -> Explanation:
    """What the patches of one image speak for: the softmax over the classes within each patch.

    Args:
        logits: Of one image, or one text, with local ones, (1, patches, classes). Padding is left out.
        class_names: Names of the classes.
        grid: How the patches lie (`Backbone.patch_grid`).
        temperature: Divides the logits, > 0; by default `logits.scale`, so that cosines are read.
        score: The image's score, to be told beside the map.
        picture: The image as the model saw it.
        tokens: Of a text, its tokens, one a patch and padding included.

    Raises:
        ValueError: If there are no local logits, they are not of one image, or grid, classes or tokens do not fit them.
    """
    if logits.local is None:
        raise ValueError("An explanation reads local logits, which are None; give the patch logits, too.")
    images, patches, classes = logits.local.shape
    if images != 1:
        raise ValueError(f"The local logits are of {images} images; an explanation is of one: give them one by one.")
    if classes != len(class_names):
        raise ValueError(f"The logits are of {classes} classes, and class_names has {len(class_names)}.")
    temperature = logits.scale if temperature is None else temperature
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; give a positive number, such as the model's logit scale.")
    if tokens is not None and len(tokens) != patches:
        raise ValueError(f"There are {len(tokens)} tokens and {patches} local logits; give one each.")
    local = logits.local[0].float()
    if logits.mask is not None:
        there = logits.mask[0].bool()
        local = local[there]
        if tokens is not None:
            tokens = [token for token, is_there in zip(tokens, there.tolist(), strict=True) if is_there]
            grid = grid._replace(columns=len(tokens))
    if grid.rows * grid.columns != len(local):
        raise ValueError(
            f"There are {len(local)} patches, which is no grid of {grid.rows} x {grid.columns}; give the grid of these "
            "very inputs."
        )
    strengths, strongest_classes = (local / temperature).softmax(-1).max(-1)
    strongest = divmod(int(strengths.argmax()), grid.columns)
    return Explanation(
        tuple(class_names),
        strongest_classes.view(grid.rows, grid.columns).cpu().numpy(),
        strengths.view(grid.rows, grid.columns).cpu().numpy(),
        strongest,
        class_names[int(logits.pooled[0].argmax())],
        score,
        float(temperature),
        (grid.height, grid.width),
        picture,
        None if tokens is None else tuple(tokens),
    )


def explanation_of_batch(
    reader: Reader, batch: InputBatch, processor: Any, class_names: Sequence[str], **known: Any
) -> Explanation:
    """What a model says of the patches of a batch of one input.

    Args:
        reader: The model, with one map from features to logits.
        batch: The input, which could be read.
        processor: What made it, by which picture or tokens are shown.
        class_names: Names of the classes.
        known: `temperature` and `score`, as for `explanation_of`.
    """
    assert batch.inputs is not None
    ((variant, features),) = reader.features(batch).items()
    logits = reader.classes[variant].logits_of(features)
    named, grid = named_inputs(batch.inputs), reader.backbone.patch_grid(batch.inputs)
    if "pixel_values" in named:
        image_processor = getattr(processor, "image_processor", processor)
        picture = picture_of(image_pixels(named, grid), image_processor)
        return explanation_of(logits, class_names, grid, picture=picture, **known)
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = named["input_ids"][0, 1:].tolist()  # the first stands for the whole text
    words = getattr(tokenizer, "decode", lambda _: "")  # there may be none for tokens that were made elsewhere
    tokens = [words([number]).strip() or str(number) for number in ids]
    return explanation_of(logits, class_names, grid, tokens=tokens, **known)
