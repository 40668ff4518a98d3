"""BERT text classifiers: the text tower is the only one, and tokens take the place of patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from setar_peft.backbones.attention import attended_by_first
from setar_peft.backbones.base import Tower, TowerInput
from setar_peft.backbones.classifier import ClassifierBackbone
from setar_peft.backbones.grid import PatchGrid


class BertTower(Tower):
    """The blocks of a BERT or RoBERTa, with the layer between the first token and the classifier on top.

    Args:
        model: A model for sequence classification.
        dense: Full name of that layer, which a tanh follows.
    """

    name = "text"

    def __init__(self, model: Any, dense: str) -> None:
        prefix = model.base_model_prefix
        names = [f"{prefix}.encoder.layer.{index}" for index in range(len(model.base_model.encoder.layer))]
        super().__init__(model, names, [dense])
        self._dense = dense

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the model without its classifier."""
        return self.model.base_model(**inputs)

    def context(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which tokens are no padding, (texts, tokens), bool."""
        return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()

    def finish(self, entry: TowerInput, hidden: Tensor) -> tuple[Tensor, ...]:
        """The first token, (texts, d), the others past the last block's attention, (texts, tokens - 1, d), and mask."""
        block, attention, mask = self.blocks[-1], self.blocks[-1].attention.self, entry.context.to(hidden.device)
        projections = (attention.query, attention.key, attention.value)
        attended = attended_by_first(hidden, projections, attention.attention_head_size, attention.scaling, mask=mask)
        tokens = block.attention.output(attended, hidden)
        tokens = self.head[self._dense](block.output(block.intermediate(tokens), tokens)).tanh()
        return tokens[:, 0], tokens[:, 1:], mask[:, 1:]

    def class_token(self, hidden: Tensor) -> Tensor:
        """The first token after a block, through the layer on top, (texts, d)."""
        return self.head[self._dense](hidden[:, 0]).tanh()


class BertBackbone(ClassifierBackbone):
    """A stock `transformers.BertForSequenceClassification`.

    Local logits: every token but the first and the padding, through the last block's value path and MLP, then what the
    first token goes through: the pooler's layer and tanh, and the classifier.
    """

    model_type = "bert"
    model_classes: ClassVar[Sequence[str]] = ("BertForSequenceClassification",)
    weight_names: ClassVar[dict[str, str]] = {
        "W_q": "attention.self.query",
        "W_k": "attention.self.key",
        "W_v": "attention.self.value",
        "W_o": "attention.output.dense",
        "W_up": "intermediate.dense",
        "W_down": "output.dense",
    }
    input_tower = "text"
    dense: ClassVar[str] = "bert.pooler.dense"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if self.model.config.is_decoder:
            raise ValueError(
                f"This {type(model).__name__} is a decoder (config.is_decoder), whose first token sees no other. Load "
                "it with is_decoder=False."
            )
        self.towers = {"text": BertTower(model, self.dense)}

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that the model takes."""
        return int(self.model.config.max_position_embeddings)

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise a `ValueError` unless the inputs are token ids, no more than the model has positions for."""
        ids = inputs.get("input_ids")
        if ids is None or ids.dim() != 2 or not 1 <= ids.shape[1] <= self.longest_text:
            given = f"have the names {', '.join(inputs)}" if ids is None else f"have the shape {tuple(ids.shape)}"
            raise ValueError(
                f"The texts {given}; this model takes input_ids of shape (texts, at most {self.longest_text} tokens). "
                "Give texts and the model's tokenizer, or what it returns."
            )

    def _grid(self, inputs: Mapping[str, Tensor]) -> PatchGrid:
        # The first token stands for the whole text.
        return PatchGrid(1, inputs["input_ids"].shape[1] - 1, 1, 1)
