"""BERT and RoBERTa: texts are classified, tokens take the place of patches, padding counts for nothing."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from setar_peft import LoCoOpObjective
from setar_peft.backbones import backbone_of, default_target_modules
from setar_peft.objectives.loss import locoop_sums
from tests.backbones import checks

TEXTS = ["the cat sat", "a dog barks at the big tree", "green frog", "ships sail far away today", "cat and dog", "sea"]
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "num_labels": len(checks.CLASSES),
}


@pytest.fixture(params=["bert", "roberta"])
def tiny(request: pytest.FixtureRequest) -> Any:
    if request.param == "bert":
        return checks.randomised(BertForSequenceClassification(BertConfig(**SHAPE)))
    return checks.randomised(RobertaForSequenceClassification(RobertaConfig(pad_token_id=0, **SHAPE)))


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    return checks.WordTokenizer()(TEXTS, padding=True)


@torch.no_grad()
def test_logits_are_the_models_own_and_local_ones_go_past_the_attention(tiny: Any, tokens: dict[str, Tensor]) -> None:
    logits = checks.logits_of(tiny, tokens)
    output = tiny(**tokens, output_hidden_states=True)
    torch.testing.assert_close(logits.pooled, output.logits, rtol=1e-5, atol=1e-5)

    block, hidden = tiny.base_model.encoder.layer[2], output.hidden_states[2][:, 1:]
    value = block.attention.output.dense(block.attention.self.value(hidden))
    hidden = block.attention.output.LayerNorm(value + hidden)
    hidden = block.output.LayerNorm(block.output.dense(block.intermediate(hidden)) + hidden)
    if isinstance(tiny, BertForSequenceClassification):
        local = tiny.classifier(torch.tanh(tiny.bert.pooler.dense(hidden)))
    else:
        local = tiny.classifier.out_proj(torch.tanh(tiny.classifier.dense(hidden)))
    # Words and the end of the text; padding repeats the first of them, so that maxima over tokens do not see it.
    assert logits.mask is not None
    expected = torch.where(logits.mask[..., None], local, local[:, :1])
    torch.testing.assert_close(logits.local, expected, rtol=1e-5, atol=1e-5)
    assert logits.mask.sum(1).tolist() == [len(text.split()) + 1 for text in TEXTS]


def test_features_by_block(tiny: Any, tokens: dict[str, Tensor]) -> None:
    def project(model: Any, hidden: Tensor) -> Tensor:
        on_top = model.bert.pooler.dense if hasattr(model, "bert") else model.classifier.dense
        return torch.tanh(on_top(hidden[:, 0]))

    checks.features_by_block_are_of_the_hidden_states(
        tiny, tokens, lambda model: model(**tokens, output_hidden_states=True), project
    )


def test_a_text_without_a_mask_has_no_padding(tiny: Any) -> None:
    tokens = checks.WordTokenizer()(["a cat", "a dog"], padding=True)
    mask = checks.logits_of(tiny, {"input_ids": tokens["input_ids"]}).mask
    assert mask is not None
    assert mask.all()


def test_padding_and_batches_change_nothing(tiny: Any) -> None:
    """Texts of unequal length, alone or in batches, from texts, a data set or padded tensors: one loss."""
    texts, tokenizer = TEXTS * 2, checks.WordTokenizer()
    alone = checks.make_objective(texts, tokenizer, batch_size=1).losses(tiny)
    assert 0 < alone.ood_patch_share < 1
    assert alone.ood_loss < 0
    assert checks.make_objective(texts, tokenizer, batch_size=12).losses(tiny) == pytest.approx(alone, abs=1e-6)
    padded = tokenizer(texts, padding="max_length", max_length=16)
    assert checks.make_objective(padded).losses(tiny) == pytest.approx(alone, abs=1e-6)
    table = datasets.Dataset.from_dict({"sentence": texts, "label": checks.labels_of(12).tolist()})
    objective = LoCoOpObjective(
        tokenizer, tiny.config.id2label, table, text_column="sentence", ood_weight=0.2, top_k=2, batch_size=5
    )
    assert objective.losses(tiny) == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_shards_together_are_the_whole(tiny: Any, as_tensors: bool) -> None:
    texts, tokenizer = TEXTS * 2, checks.WordTokenizer()
    objective = checks.make_objective(tokenizer(texts, padding=True) if as_tensors else texts, tokenizer)

    def sums(part: LoCoOpObjective) -> Tensor:
        backbone = backbone_of(tiny)
        classes = backbone.class_weights(None)
        with torch.no_grad():
            batches = [
                part.sums(backbone.embedded(backbone.image_features(inputs)), classes, labels)
                for inputs, labels in part.batches()
            ]
        return torch.stack(batches).sum(0)

    parts = [objective.shard(index, 5) for index in range(5)]
    assert [len(part) for part in parts] == [3, 3, 2, 2, 2]
    torch.testing.assert_close(sum(sums(part) for part in parts), sums(objective), rtol=1e-6, atol=1e-5)


def test_the_padding_mask_can_fail(tiny: Any, tokens: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mask padding would change the loss."""
    objective = checks.make_objective(tokens, count=6)
    masked = objective.losses(tiny)
    monkeypatch.setattr(
        "setar_peft.objectives.locoop.locoop_sums",
        lambda *args, mask, **kwargs: locoop_sums(*args, **kwargs),
    )
    assert objective.losses(tiny).ood_patch_share != pytest.approx(masked.ood_patch_share, abs=1e-3)


def test_the_last_block_computes_only_what_is_read(tiny: Any, tokens: dict[str, Tensor]) -> None:
    """One query attends, and every token goes through the MLP once."""
    tokens_of = checks.tokens_in_the_last_block(tiny, "text", lambda: checks.features_of(tiny, tokens).pooled)
    assert tokens_of == {"W_q": [1], "W_k": [9], "W_v": [9], "W_o": [9], "W_up": [9], "W_down": [9]}


def test_search(tiny: Any) -> None:
    assert default_target_modules(tiny.config.model_type) == {"intermediate.dense"}
    checks.weights_are_where_they_should_be(tiny)
    objective = checks.make_objective(TEXTS * 2, checks.WordTokenizer())
    assert len(checks.same_search_by_replay_and_in_full(tiny, objective)) == 3
    checks.stays_within_the_bound(tiny, objective)
    checks.adapter_has_the_searched_loss(tiny, objective)


@pytest.mark.parametrize("weight_type", ["W_v", "W_o", "W_down"])
def test_search_of_other_weights(tiny: Any, weight_type: str) -> None:
    """W_down and W_o both end in output.dense; by type they are told apart."""
    objective = checks.make_objective(TEXTS * 2, checks.WordTokenizer())
    targets = backbone_of(tiny).modules_of_type(weight_type)
    assert len(checks.same_search_by_replay_and_in_full(tiny, objective, target_modules=targets)) == 3


def test_search_of_the_layer_above_the_blocks(tiny: Any) -> None:
    dense = "bert.pooler.dense" if tiny.config.model_type == "bert" else "classifier.dense"
    assert backbone_of(tiny).locate(dense) == ("text", 3, dense)
    objective = checks.make_objective(TEXTS * 2, checks.WordTokenizer())
    checks.same_search_by_replay_and_in_full(tiny, objective, target_modules=[dense, "intermediate.dense"])


def test_wrong_inputs_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"have the names pixel_values.*input_ids.*tokenizer"):
        checks.features_of(tiny, checks.random_images(2, 3, 8, 8))
    longest = 20 if tiny.config.model_type == "bert" else 19
    ids = torch.ones(2, longest + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"shape \(2, {longest + 1}\).*at most {longest} tokens"):
        checks.features_of(tiny, {"input_ids": ids})
    checks.features_of(tiny, {"input_ids": ids[:, 1:]})


def test_what_is_missing_is_said(tokens: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"BertModel.*load it as BertForSequenceClassification"):
        backbone_of(BertModel(BertConfig(**SHAPE)))
    with pytest.raises(ValueError, match=r"Texts need the model's tokenizer; processor is None"):
        checks.make_objective(TEXTS, count=6)
    with pytest.raises(ValueError, match=r"one row each in every tensor: input_ids has 6, attention_mask has 5"):
        checks.make_objective({**tokens, "attention_mask": tokens["attention_mask"][:5]}, count=6)
    table = datasets.Dataset.from_dict({"sentence": TEXTS})
    with pytest.raises(ValueError, match=r"columns sentence, but no text, label; say with text_column"):
        LoCoOpObjective(checks.WordTokenizer(), checks.CLASSES, table, text_column="text", top_k=2)


def test_decoders_are_refused() -> None:
    model = BertForSequenceClassification(BertConfig(**SHAPE, is_decoder=True))
    with pytest.raises(ValueError, match=r"BertForSequenceClassification is a decoder.*is_decoder=False"):
        backbone_of(model)
