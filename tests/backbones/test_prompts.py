"""Prompts that begin alike: the same features as each by itself, with the beginning computed once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from setar_peft.backbones import backbone_of, prompts
from tests.backbones import checks

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
END = 39


def tiny_clip(attention: str, end: int = END) -> Any:
    vision = {**WIDTHS, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16}
    text = {**WIDTHS, "num_hidden_layers": 3, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": end}
    model = CLIPModel._from_config(CLIPConfig(vision_config=vision, text_config=text), attn_implementation=attention)
    return checks.randomised(model)


@pytest.fixture(params=["eager", "sdpa"])
def tiny(request: pytest.FixtureRequest) -> Any:
    return tiny_clip(request.param)


def padded(rows: list[list[int]], length: int | None = None, *, left: bool = False) -> dict[str, Tensor]:
    """Token ids that end with `END`, padded with it, and the mask."""
    longest = length or max(map(len, rows)) + 1
    ids, mask = [], []
    for row in rows:
        padding = longest - len(row) - 1
        ids.append([0] * padding + [*row, END] if left else [*row, END] + [END] * padding)
        mask.append([0] * padding + [1] * (len(row) + 1) if left else [1] * (len(row) + 1) + [0] * padding)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


ALIKE = [[1, 4, 5, 6, 7], [1, 4, 5, 8], [1, 4, 5, 9, 10, 11, 12], [1, 4, 5, 6]]
BATCHES = {
    "alike": padded(ALIKE),
    "padded to full length": padded(ALIKE, 16),
    "one within another": padded([[1, 4, 5], [1, 4, 5, 6, 7, 8, 9]]),
    "a long beginning": padded([[1, *range(2, 10), 11], [1, *range(2, 10), 12, 13]]),
    "nothing alike": padded([[1, 4], [2, 4], [3, 5, 6]]),
    "the same": padded([[1, 4, 5]] * 3),
    "one": padded([[1, 4, 5, 6]]),
    "padded on the left": padded(ALIKE, left=True),
}


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("with_mask", [True, False])
def test_features_are_the_models_own(tiny: Any, name: str, with_mask: bool) -> None:
    tokens = dict(BATCHES[name])
    if not with_mask:
        del tokens["attention_mask"]
    expected = tiny.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(backbone_of(tiny).text_features(tokens), expected, rtol=1e-5, atol=1e-5)


def holed(*places: tuple[int, int]) -> dict[str, Tensor]:
    """The prompts that begin alike, with zeros in the attention mask at (prompt, token)."""
    tokens = padded(ALIKE)
    for place in places:
        tokens["attention_mask"][place] = 0
    return tokens


def padded_with_the_end(*, left: bool) -> dict[str, Tensor]:
    tokens = padded(ALIKE, left=left)
    return {**tokens, "input_ids": tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, END)}


# Attention masks that the tokenizers of CLIP do not make by default, but that may be asked of them, or made by hand.
UNUSUAL = {
    "padded with the end on the left": padded_with_the_end(left=True),
    "holes": holed((0, 1), (2, 0), (2, 3)),
    "a hole at the end": holed((0, 5)),
    "no first token": holed(*((row, 0) for row in range(4))),
    "nothing of one prompt": holed(*((1, token) for token in range(8))),
}
BLIND = {"padded with the end on the left", "nothing of one prompt"}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("end", [END, 2], ids=["end by id", "end by the largest id"])
@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("with_mask", [True, False])
def test_features_are_the_models_own_whatever_the_mask(attention: str, end: int, name: str, with_mask: bool) -> None:
    """Also where the model reads a token that may attend to nothing, and what it then makes of it is its affair."""
    model = tiny_clip(attention, end)
    tokens = {key: value for key, value in UNUSUAL[name].items() if with_mask or key == "input_ids"}
    expected = model.get_text_features(**tokens).pooler_output
    says = pytest.warns(UserWarning, match=r"only padding.*padding_side = 'right'")
    with says if with_mask and name in BLIND else nullcontext():
        found = backbone_of(model).text_features(tokens)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_prompts_that_the_model_cannot_read_are_refused(tiny: Any) -> None:
    backbone = backbone_of(tiny)
    with pytest.raises(
        ValueError, match=r"prompts have 17 tokens; this model was trained with at most 16.*max_length=16"
    ):
        backbone.text_features(padded(ALIKE, 17))
    without = padded(ALIKE)
    without["input_ids"][2] = without["input_ids"][2].clamp(max=END - 1)
    with pytest.raises(ValueError, match=r"1 of 4 class prompts have no end token \(id 39\).* number 2.*tokenizer"):
        backbone.text_features(without)


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
def test_hidden_states_between_blocks_are_the_models_own(tiny: Any, name: str) -> None:
    tower, tokens = backbone_of(tiny).towers["text"], BATCHES[name]
    states = tiny.text_model(**tokens, output_hidden_states=True).hidden_states
    entry = tower.enter(tokens)
    hidden, layout = entry.hidden, entry.context
    for level in range(3):
        whole = prompts.with_beginning(hidden, layout) if layout.beginning else hidden
        for row, mask in enumerate(tokens["attention_mask"].bool()):
            found = whole[row][mask[: whole.shape[1]]]
            torch.testing.assert_close(found, states[level][row][mask], rtol=1e-5, atol=1e-5)
        hidden = tower.step(entry, level, hidden) if level < 2 else hidden


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "rows"),
    [("alike", 5 * 5), ("padded to full length", 5 * 5), ("a long beginning", 3 * 6), ("the same", 4 * 2), ("one", 5)],
)
def test_a_beginning_is_computed_once_and_what_follows_the_end_not_at_all(tiny: Any, name: str, rows: int) -> None:
    """Prompts of 5, 4, 7 and 4 tokens and an end share three: a row for those, and rows of the five that are left."""
    seen: list[int] = []
    tiny.text_model.encoder.layers[0].mlp.fc1.register_forward_hook(
        lambda *call: seen.append(call[1][0][..., 0].numel())
    )
    backbone_of(tiny).text_features(BATCHES[name])
    assert seen == [rows]


@torch.no_grad()
def test_without_the_beginning_the_features_would_be_others(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = BATCHES["alike"]
    expected = backbone_of(tiny).text_features(tokens)
    kept = prompts.with_beginning
    monkeypatch.setattr(prompts, "with_beginning", lambda *args: kept(*args).roll(1, dims=1))
    assert not torch.allclose(backbone_of(tiny).text_features(tokens), expected, atol=1e-3)


def test_a_search_of_the_text_tower_is_that_of_full_evaluation(tiny: Any) -> None:
    tiny.config.text_config.eos_token_id = tiny.text_model.config.eos_token_id = 2
    objective = checks.make_objective(checks.random_images(12, 3, 32, 32), checks.WordTokenizer())
    targets = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    checks.same_search_by_replay_and_in_full(tiny, objective, target_modules=targets, order="text")
