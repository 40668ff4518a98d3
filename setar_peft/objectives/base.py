"""What a search or a training minimises: an `Objective`, by sums over batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from setar_peft.backbones import Backbone, ClassWeights, ImageFeatures, backbone_of
from setar_peft.backbones.untouched import left_as_it_was
from setar_peft.data.labels import ClassNames
from setar_peft.objectives.loss import LossSums, LossValues


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[tuple[Backbone, torch.device]]:
    """A model's backbone and device, in evaluation mode and without gradients; the model is left as it was.

    Args:
        model: A stock model of a known family, or the same with adapters.

    Raises:
        ValueError: If the family of the model is not known.
    """
    backbone = backbone_of(model)
    with left_as_it_was(backbone.model):
        yield backbone, backbone.device


class Objective(ABC):
    """A loss over images or texts that adds up batch by batch, so that the search can replay, chunk and reduce it.

    Attributes:
        prompt: The template of the class prompts, with "{class}" in it, or one text a class; None where there is none.
            Tables name it.
        prompt_batch_size: Class prompts encoded at once; None for as many as suit the device.
        sums_size: How many numbers `sums` gives.
        criteria: Which of the loss and its parts a search may minimise: "total", "id", "ood".
        is_differentiable: Whether `sums` have a gradient that says where the loss falls. Counts above a threshold have
            none, so that a screened search refuses them.
    """

    prompt: str | Sequence[str] | None = None
    prompt_batch_size: int | None = None
    sums_size: ClassVar[int] = len(LossSums._fields)
    criteria: ClassVar[tuple[str, ...]] = ("total", "id", "ood")
    is_differentiable: ClassVar[bool] = True

    @abstractmethod
    def batches(self) -> Iterator[tuple[Tensor | Mapping[str, Tensor], Tensor]]:
        """Inputs and labels (b,) of every image or text, in the same order each time.

        Inputs are pixel values (b, channels, height, width), or what the model takes, by name.
        """

    @abstractmethod
    def class_tokens(self, backbone: Backbone) -> Mapping[str, Tensor]:
        """The class prompts' `input_ids` and, where the tokenizer gives it, `attention_mask`, each (classes, tokens).

        Args:
            backbone: Of the model that they are for: `longest_prompt` and `pads_prompts` say how long they have to be.
                Asked only where it `needs_prompts`.
        """

    def class_weights(self, backbone: Backbone) -> ClassWeights:
        """The map from features to logits: by the class prompts where a model needs them, else its own classifier.

        Args:
            backbone: Of the model, `backbone_of(model)`.
        """
        self.check_classes(backbone)
        text = None
        if backbone.needs_prompts:
            text = backbone.text_features(self.class_tokens(backbone), self.prompt_batch_size)
        return backbone.class_weights(text)

    @abstractmethod
    def sums(self, features: ImageFeatures, classes: ClassWeights, labels: Tensor) -> Tensor:
        """The additive part of the loss of some images: (k,), float64."""

    @abstractmethod
    def values(self, sums: Tensor) -> LossValues:
        """The loss and its parts from the sums over all images."""

    def slope(self, sums: Tensor, criterion: str = "total") -> Tensor:
        """The derivative of the loss, or of a part of it, by each of its sums.

        By central differences of `values` in float64, 2^-17 of the sum away, and of 1 for a sum below 1: for a loss
        that is linear in a sum, or a ratio of sums, right to about 1e-10. Override it for a loss that bends within
        that.

        Args:
            sums: Over all images, (k,).
            criterion: "total", "id" or "ood".

        Returns:
            (k,), float64, on the CPU.

        Raises:
            ValueError: If `values` fails so near to the sums.
        """
        at = sums.detach().to("cpu", torch.float64)
        slope = torch.zeros_like(at)
        for index, value in enumerate(at.tolist()):
            step = max(1.0, abs(value)) * 2.0**-17
            ends = []
            for end in (value - step, value + step):
                moved = at.clone()
                moved[index] = end
                try:
                    ends.append(self.values(moved).part(criterion))
                except (ValueError, ArithmeticError) as error:
                    raise ValueError(
                        f"{type(self).__name__}.values fails where sums[{index}] is {end:g} and not {value:g} "
                        f"({error}), so that its slope is not known. Override slope(sums, criterion), or search with "
                        "search='greedy' (--search greedy)."
                    ) from error
            slope[index] = (ends[1] - ends[0]) / (2 * step)
        return slope

    def check_classes(self, backbone: Backbone) -> None:  # noqa: B027 - an objective may fit any model
        """Raise a `ValueError` if the objective's classes are not the model's."""

    def check_labels(self, classes: ClassNames) -> None:  # noqa: B027 - nor need it have names
        """Raise a `ValueError` if labels that mean these classes are not labels of the objective's."""

    def check_base(self, losses: LossValues) -> None:  # noqa: B027 - it is a courtesy
        """Warn if the losses of the base model say that its inputs or labels are not what they should be."""

    def settings(self) -> dict[str, Any]:
        """What a resumed search has to have in common with the one it continues, as plain values."""
        return {"type": type(self).__qualname__}

    def shard(self, index: int, count: int) -> Objective:
        """The part of the images that one of several processes evaluates; together the parts are the whole.

        Args:
            index: Number of the process, from 0.
            count: Number of processes.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot be sharded over {count} processes; implement shard(index, count), or run "
            "one process."
        )

    def losses(self, model: nn.Module) -> LossValues:
        """The loss of a model and its parts, evaluated in full, in evaluation mode and without gradients.

        Args:
            model: A stock model of a known family, or the same with adapters.
        """
        total: Any = 0.0
        with evaluation_mode(model) as (backbone, device):
            classes = self.class_weights(backbone)
            for batch, labels in self.batches():
                features = backbone.embedded(backbone.image_features(batch))
                total = total + self.sums(features, classes, labels.to(device))
        return self.values(total)

    def __call__(self, model: nn.Module) -> float:
        """The loss of a model, evaluated in full."""
        return self.losses(model).total
