"""What a search minimises: an `Objective`, by sums over batches, or any callable `model -> float`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from setar_peft.backbones import ImageFeatures, backbone_of
from setar_peft.images import ImageSource
from setar_peft.losses import ClassWeights, LossValues, locoop_sums, locoop_values

if TYPE_CHECKING:
    import datasets

PROMPT = "a photo of a {class}"


class Objective(ABC):
    """A loss over images that adds up batch by batch, so that the search can replay, chunk and reduce it.

    Attributes:
        prompt_batch_size: Class prompts encoded at once.
    """

    prompt_batch_size: ClassVar[int] = 256

    @abstractmethod
    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixel values (b, channels, height, width) and labels (b,) of every image, in the same order each time."""

    @abstractmethod
    def class_tokens(self) -> Mapping[str, Tensor]:
        """The class prompts' `input_ids` and `attention_mask`, each (classes, tokens)."""

    @abstractmethod
    def sums(self, features: ImageFeatures, classes: ClassWeights, labels: Tensor) -> Tensor:
        """The additive part of the loss of some images: (k,), float64."""

    @abstractmethod
    def values(self, sums: Tensor) -> LossValues:
        """The loss and its parts from the sums over all images."""

    def losses(self, model: nn.Module) -> LossValues:
        """The loss of a model and its parts, evaluated in full, in evaluation mode and without gradients.

        Args:
            model: A stock model of a known family, or the same with adapters.
        """
        base: nn.Module = getattr(model, "get_base_model", lambda: model)()
        backbone = backbone_of(base)
        device = next(base.parameters()).device
        training = [module for module in base.modules() if module.training]
        base.eval()
        try:
            with torch.no_grad():
                text = None
                if "text" in backbone.towers:
                    tokens = {key: value.to(device) for key, value in self.class_tokens().items()}
                    text = backbone.text_features(tokens, self.prompt_batch_size)
                classes = backbone.class_weights(text)
                total: Any = 0.0
                for pixel_values, labels in self.batches():
                    features = backbone.image_features(pixel_values.to(device))
                    embedded = ImageFeatures(*(backbone.embed(part) for part in features))
                    total = total + self.sums(embedded, classes, labels.to(device))
        finally:
            for module in training:
                module.training = True
        return self.values(total)

    def __call__(self, model: nn.Module) -> float:
        """The loss of a model, evaluated in full."""
        return self.losses(model).total


class LoCoOpObjective(Objective):
    """The LoCoOp loss on a few labelled in-distribution images (paper, Eq. 12).

    Args:
        processor: The model's processor, or a tokenizer if `dataset` holds pixel values already.
        class_names: Names of the in-distribution classes, in the order of the labels.
        dataset: Images: a `datasets.Dataset`, a folder with one subfolder a class, a tensor of pixel values
            (images, channels, height, width), or a sequence of PIL images.
        labels: (images,) class indices; needed for tensors and sequences. A data set has them in its label column,
            a folder in its subfolders: by name where they are named after the classes, else in sorted order.
        ood_weight: lambda, the weight of the OOD loss (paper, Table 10: 0.1 for ImageNet with CLIP-base).
        top_k: K: a patch is OOD if its true class is not among its K likeliest (paper, Table 10: 300 for ImageNet).
        prompt: Text with "{class}" in it, or one text a class.
        batch_size: Images a batch. It does not change the loss.
        image_column: Name of the data set's image column; by default the one of image type.
        label_column: Name of the data set's label column.

    Raises:
        ValueError: If there are fewer than two classes, no images, labels outside the classes, `top_k` outside
            0 ... classes, a negative or non-finite weight, or a prompt without "{class}".
    """

    def __init__(
        self,
        processor: Any,
        class_names: Sequence[str],
        dataset: datasets.Dataset | str | Path | Tensor | Sequence[Any],
        labels: Tensor | Sequence[int] | None = None,
        *,
        ood_weight: float = 0.1,
        top_k: int,
        prompt: str | Sequence[str] = PROMPT,
        batch_size: int = 64,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self.class_names = _checked_names(class_names)
        self.prompts = _prompts(prompt, self.class_names)
        self.ood_weight, self.top_k = _checked_loss(ood_weight, top_k, len(self.class_names))
        self.images = ImageSource(
            processor,
            dataset,
            labels,
            class_names=self.class_names,
            batch_size=batch_size,
            image_column=image_column,
            label_column=label_column,
        )
        self._tokenizer = getattr(processor, "tokenizer", processor)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixel values and labels of every image, decoded and processed batch by batch."""
        return self.images.batches()

    def class_tokens(self) -> dict[str, Tensor]:
        """The class prompts' `input_ids` and `attention_mask`, (classes, tokens), padded to the longest."""
        tokens = self._tokenizer(self.prompts, padding=True, truncation=True, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}

    def sums(self, features: ImageFeatures, classes: ClassWeights, labels: Tensor) -> Tensor:
        """The LoCoOp loss of some images as sums and counts, (6,) (see `losses.LossSums`)."""
        return torch.stack(locoop_sums(*features, classes, labels, top_k=self.top_k))

    def values(self, sums: Tensor) -> LossValues:
        """The LoCoOp loss and its parts."""
        return locoop_values(sums, self.ood_weight)


def _checked_names(class_names: Sequence[str]) -> list[str]:
    names = [class_names] if isinstance(class_names, str) else list(class_names)
    if len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"class_names is {names!r}; give the names of at least two in-distribution classes, in the labels' order."
        )
    return names


def _prompts(prompt: str | Sequence[str], names: Sequence[str]) -> list[str]:
    if isinstance(prompt, str):
        if "{class}" not in prompt:
            raise ValueError(f'prompt is {prompt!r}; put "{{class}}" where the class name goes, as in {PROMPT!r}.')
        return [prompt.replace("{class}", name) for name in names]
    if len(prompt) != len(names):
        raise ValueError(f"prompt has {len(prompt)} texts for {len(names)} classes; give one text a class.")
    return list(prompt)


def _checked_loss(ood_weight: float, top_k: int, classes: int) -> tuple[float, int]:
    if not isinstance(ood_weight, (int, float)) or not 0 <= ood_weight < float("inf"):
        raise ValueError(f"ood_weight is {ood_weight!r}; give a finite number of 0 or more, such as the paper's 0.1.")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 0 <= top_k <= classes:
        raise ValueError(
            f"top_k is {top_k!r} with {classes} classes; give an integer from 0 (every patch counts as OOD) to "
            f"{classes} (none does)."
        )
    return float(ood_weight), top_k
