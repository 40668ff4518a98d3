"""The LoCoOp loss on a few labelled in-distribution images, as an `Objective`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from setar_peft.backbones import Backbone, ClassWeights, ImageFeatures
from setar_peft.data.images import ImageSource, processes_images
from setar_peft.data.labels import ClassNames
from setar_peft.data.texts import NamedInputs
from setar_peft.objectives.base import Objective
from setar_peft.objectives.class_prompts import PROMPT, ClassPrompts
from setar_peft.objectives.loss import LossValues, locoop_sums, locoop_values

if TYPE_CHECKING:
    import datasets

TOP_K_SHARE = 0.3  # of the classes: the paper's 300 of ImageNet's 1,000


class LoCoOpObjective(Objective):
    """The LoCoOp loss on a few labelled in-distribution images (paper, Eq. 12), or texts for a text classifier.

    Args:
        processor: The model's processor. Where nothing is left for it to do, less is enough: the tokenizer if `dataset`
            holds pixel values already, the image processor for a classifier, which needs no prompts, or None for both.
        class_names: Names of the in-distribution classes, in the order of the labels; a classifier's
            `config.id2label`; or a mapping from what the data call a class (a folder, say) to its name. Names that the
            data have are matched with them by name, never by position.
        dataset: Images: a folder with one subfolder a class, a `datasets.Dataset`, a `torch.utils.data.Dataset`, a
            tensor of pixel values (images, channels, height, width), or a sequence of paths or PIL images (see
            `ImageSource`). Texts: a sequence of strings where the processor is a tokenizer, or a data set with
            `text_column`. Either: a mapping from the model's input names to tensors.
        labels: (images,) class indices or class names; needed for tensors, sequences and mappings. A data set has them
            in its label column, a folder in its subfolders; indices beside a data set that numbers its classes
            otherwise than `class_names` are refused.
        ood_weight: lambda, the weight of the OOD loss (paper, Table 10: 0.1 for ImageNet with CLIP-base).
        top_k: K: a patch is OOD if its true class is not among its K likeliest (paper, Table 10: 300 for ImageNet); by
            default 30 % of the classes, rounded, at least 1.
        prompt: Text with "{class}" in it, or one text a class.
        batch_size: Images a batch. It does not change the loss.
        image_column: Name of the data set's image column; by default the one of image type.
        text_column: Name of the data set's text column, for text classifiers.
        label_column: Name of the data set's label column.

    Raises:
        ValueError: If there are fewer than two classes, no images, labels outside the classes, `top_k` outside
            0 ... classes, a negative or non-finite weight, or a prompt without "{class}".
    """

    def __init__(
        self,
        processor: Any,
        class_names: Sequence[str] | Mapping[Any, str] | ClassNames,
        dataset: datasets.Dataset | datasets.IterableDataset | str | Path | Tensor | Sequence[Any] | Any,
        labels: Tensor | Sequence[int] | Sequence[str] | None = None,
        *,
        ood_weight: float = 0.1,
        top_k: int | None = None,
        prompt: str | Sequence[str] = PROMPT,
        batch_size: int = 64,
        image_column: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self._prompts = ClassPrompts(processor, class_names, prompt)
        self.class_names, self.prompts = self._prompts.class_names, self._prompts.prompts
        self.prompt = self._prompts.prompt
        self.ood_weight, self.top_k = _checked_loss(ood_weight, top_k, len(self.class_names))
        settings: dict[str, Any] = {
            "class_names": self._prompts.classes,
            "batch_size": batch_size,
            "label_column": label_column,
        }
        self.images: ImageSource | NamedInputs
        if isinstance(dataset, Mapping) or text_column is not None or _are_texts(dataset, processor):
            data: Any = dataset
            self.images = NamedInputs(processor, data, labels, text_column=text_column, **settings)
        else:
            self.images = ImageSource(processor, dataset, labels, image_column=image_column, **settings)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self) -> Iterator[tuple[Tensor | Mapping[str, Tensor], Tensor]]:
        """Pixel values, or the model's inputs by name, and labels of every image, processed batch by batch."""
        yield from self.images.batches()

    def class_tokens(self, backbone: Backbone) -> dict[str, Tensor]:
        """The tokens of the class prompts; see `ClassPrompts.tokens`."""
        return self._prompts.tokens(backbone)

    def check_labels(self, classes: ClassNames) -> None:
        """Raise a `ValueError` if other inputs' labels mean other classes, or number them otherwise."""
        self._prompts.check_labels(classes)

    def check_classes(self, backbone: Backbone) -> None:
        """Raise a `ValueError` if a classifier's own classes are others; see `ClassPrompts.check_classes`."""
        self._prompts.check_classes(backbone)

    def check_base(self, losses: LossValues) -> None:
        """Warn if the base model classifies no better than by chance, up to two standard deviations of noise."""
        images, chance = len(self), 1 / len(self.class_names)
        # A NaN is none of a model's doing, but of an objective that has no accuracy.
        if losses.accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / images):
            warnings.warn(
                f"The base model classifies {losses.accuracy:.1%} of the {images} inputs right, which is near chance "
                f"({chance:.1%}): do labels, class names, prompts and processor belong to this model?",
                UserWarning,
                stacklevel=3,
            )

    def settings(self) -> dict[str, Any]:
        """Classes, prompts and the loss's settings."""
        return {
            **super().settings(),
            "classes": self.class_names,
            "prompts": self.prompts,
            "ood_weight": self.ood_weight,
            "top_k": self.top_k,
            "images": len(self),
        }

    def shard(self, index: int, count: int) -> LoCoOpObjective:
        """Every `count`-th image from number `index` on."""
        part = copy.copy(self)
        part.images = self.images.shard(index, count)
        return part

    def sums(self, features: ImageFeatures, classes: ClassWeights, labels: Tensor) -> Tensor:
        """The LoCoOp loss of some images as sums and counts, (6,) (see `loss.LossSums`)."""
        pooled, local, mask, _ = features
        return torch.stack(locoop_sums(pooled, local, classes, labels, top_k=self.top_k, mask=mask))

    def values(self, sums: Tensor) -> LossValues:
        """The LoCoOp loss and its parts."""
        return locoop_values(sums, self.ood_weight)


def _are_texts(dataset: Any, processor: Any) -> bool:
    """Whether strings are meant as texts: where there is something that reads images, they are paths."""
    first = dataset[0] if isinstance(dataset, (list, tuple)) and dataset else None
    return isinstance(first, str) and not processes_images(processor)


def _checked_loss(ood_weight: float, top_k: int | None, classes: int) -> tuple[float, int]:
    if not isinstance(ood_weight, (int, float)) or not 0 <= ood_weight < float("inf"):
        raise ValueError(f"ood_weight is {ood_weight!r}; give a finite number of 0 or more, such as the paper's 0.1.")
    top_k = max(1, round(TOP_K_SHARE * classes)) if top_k is None else top_k
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 0 <= top_k <= classes:
        raise ValueError(
            f"top_k is {top_k!r} with {classes} classes; give an integer from 0 (every patch counts as OOD) to "
            f"{classes} (none does)."
        )
    return float(ood_weight), top_k
