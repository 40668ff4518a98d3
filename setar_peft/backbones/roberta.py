"""RoBERTa text classifiers: BERT's blocks, with the pooling layer in the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from setar_peft.backbones.bert import BertBackbone


class RobertaBackbone(BertBackbone):
    """A stock `transformers.RobertaForSequenceClassification`; local logits as in `BertBackbone`."""

    model_type = "roberta"
    model_classes: ClassVar[Sequence[str]] = ("RobertaForSequenceClassification",)
    classifier = "classifier.out_proj"
    dense = "classifier.dense"

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that the model takes; positions are counted from behind the padding's."""
        return int(self.model.config.max_position_embeddings) - int(self.model.config.pad_token_id) - 1
