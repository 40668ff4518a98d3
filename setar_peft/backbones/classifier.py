"""What models that end in a linear classifier have in common: no prompts, and the classifier as class weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from setar_peft.backbones.base import Backbone
from setar_peft.backbones.features import ClassWeights, without_autocast


class ClassifierBackbone(Backbone):
    """A model whose logits are a linear map of its pooled features.

    Attributes:
        classifier: Full name of the linear map.
    """

    needs_prompts = False
    classifier: ClassVar[str] = "classifier"

    def embed(self, features: Tensor) -> Tensor:
        """The features themselves, float32."""
        return features.float()

    def class_weights(self, text_features: Tensor | None = None) -> ClassWeights:
        """The classifier, (classes, d), and its bias; there are no text features."""
        del text_features
        return linear_map(self.model.get_submodule(self.classifier))


def linear_map(module: nn.Module) -> ClassWeights:
    """The map that a module computes, whether it is a linear layer or one with an adapter around it; float32.

    Raises:
        ValueError: If it is no linear map, as in a model made with `num_labels=0`.
    """
    if type(module) is nn.Linear:
        return ClassWeights(module.weight.float(), None if module.bias is None else module.bias.float())
    width = getattr(module, "in_features", None)
    if width is None:
        raise ValueError(
            f"The classifier is a {type(module).__name__}, which gives no logits. Load the model with its number of "
            "labels (num_labels)."
        )
    parameter: Any = next(module.parameters())
    with without_autocast(parameter.device):
        bias = module(parameter.new_zeros(1, width)).float()
        units = module(torch.eye(width, dtype=parameter.dtype, device=parameter.device)).float()
    # As it lies in a file that it is read from: the last digits of a product depend on it.
    return ClassWeights((units - bias).T.contiguous(), bias[0])
