"""Fusion of layers: against a search by hand with numpy's histograms, and on models with and without an adapter."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import SiglipConfig, SiglipModel, ViTConfig, ViTForImageClassification

from setar_peft import SeTARConfig
from setar_peft.backbones import ImageFeatures, Logits, backbone_of
from setar_peft.detection import fusion
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.fusion import LayerFusion
from setar_peft.detection.scores import SCORES, chosen_scores, find_score, score
from setar_peft.detection.scoring import Reading, Score
from tests.backbones.checks import randomised
from tests.detection.pictures import pictures
from tests.refusals import message_of

FUSED = sorted(name for name, entry in SCORES.items() if entry.reads == {"global_logits"})


def layer_logits(inputs: int, blocks: int, classes: int = 5, seed: int = 0) -> Logits:
    """Logits whose spread, and how they lean to one class, differ from block to block."""
    generator = torch.Generator().manual_seed(seed)
    layers = 20 + (1 + torch.rand(blocks, 1, generator=generator)) * torch.randn(
        inputs, blocks, classes, generator=generator
    )
    layers[..., 0] += 5 * torch.rand(inputs, 1, generator=generator) * torch.rand(blocks, generator=generator)
    return Logits(layers[:, -1], None, 100.0, layers=layers)


def of_scores(scores: Tensor) -> list[Reading]:
    """A reading of logits whose largest are these scores (inputs, blocks)."""
    layers = torch.stack([scores, torch.full_like(scores, -1e3)], dim=-1)
    return readings(Logits(layers[:, -1], None, 1.0, layers=layers))


def readings(logits: Logits, batch: int = 1000) -> list[Reading]:
    found = []
    for start in range(0, len(logits.pooled), batch):
        part = [field[start : start + batch] if isinstance(field, Tensor) and field.ndim else field for field in logits]
        empty = torch.zeros(len(part[0]), 1)  # type: ignore[arg-type]
        found.append(Reading(Logits(*part), ImageFeatures(empty, empty), torch.full((len(empty),), -1)))
    return found


def searched_by_hand(scores: np.ndarray, bins: int) -> tuple[float, tuple[int, ...]]:
    """The set of at most five blocks with the last whose histogram, by numpy, has the least entropy."""
    blocks = scores.shape[1]
    found = []
    for below in range(min(5, blocks)):
        for members in itertools.combinations(range(blocks - 1), below):
            chosen = (*members, blocks - 1)
            counts, _ = np.histogram(scores[:, chosen].mean(1), bins=bins)
            p = counts[counts > 0] / counts.sum()
            found.append((float(-(p * np.log(p)).sum()), chosen))
    assert len(found) == len(set(found))
    return min(found, key=lambda pair: pair[0])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("blocks", "bins"), [(3, 16), (7, 32), (8, 128)])
def test_the_set_is_the_one_that_a_search_by_hand_finds(name: str, blocks: int, bins: int) -> None:
    logits = layer_logits(300, blocks)
    settings = find_score(name).settings(logits.scale, {})
    by_block = [score(name, Logits(logits.layers[:, block], None, 100.0)) for block in range(blocks)]  # type: ignore[index]
    entropy, chosen = searched_by_hand(torch.stack(by_block, dim=1).double().numpy(), bins)
    fitted = LayerFusion(name, bins=bins).fit(readings(logits))
    assert fitted.chosen == chosen
    assert fitted.entropy == pytest.approx(entropy, abs=1e-9)
    assert fitted.blocks == blocks
    expected = torch.stack([by_block[block] for block in chosen]).mean(0)
    torch.testing.assert_close(fitted(logits, **settings), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(score(fitted, logits), fitted(logits, **settings))


@pytest.mark.parametrize("name", FUSED)
def test_given_layers_need_no_fit_and_are_averaged(name: str) -> None:
    logits = layer_logits(20, 6)
    fused = LayerFusion(name, layers=[1, -1, 3])
    assert not fused.needs_fit
    assert fused.fit(iter([])) is fused
    assert fused.name == f"layer_fusion:{name}"
    alone = [score(name, Logits(logits.layers[:, block], None, 100.0)) for block in (1, 3, 5)]  # type: ignore[index]
    torch.testing.assert_close(score(fused, logits), torch.stack(alone).mean(0), rtol=1e-6, atol=1e-7)
    # The last alone is the score itself; and the score's own temperature is the fusion's.
    torch.testing.assert_close(score(LayerFusion(name, layers=[-1]), logits), score(name, logits), rtol=0, atol=0)
    assert fused.settings(100.0, {}) == find_score(name).settings(100.0, {})
    assert not torch.allclose(score(fused, logits, temperature=3.0), score(fused, logits, temperature=4.0))


@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 6, 9])
@pytest.mark.parametrize("seed", range(3))
def test_a_set_has_at_most_five_blocks_and_holds_the_last(blocks: int, seed: int) -> None:
    chosen = LayerFusion("max_logit", bins=16).fit(readings(layer_logits(40, blocks, seed=seed))).chosen
    assert chosen is not None
    assert chosen[-1] == blocks - 1
    assert len(chosen) <= min(5, blocks)
    assert list(chosen) == sorted(set(chosen))


def test_a_set_that_gathers_the_scores_wins() -> None:
    """Scores of blocks 2 and 4 cancel out but for a few inputs, so that nearly all of them lie in one bin."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 5, generator=generator)
    scores[:, 2] = 1 - scores[:, 4]
    scores[:3, 2] += 1
    fitted = LayerFusion("max_logit").fit(of_scores(scores))
    assert fitted.chosen == (2, 4)
    assert fitted.entropy == pytest.approx(-(3 / 200 * np.log(3 / 200) + 197 / 200 * np.log(197 / 200)))


def test_between_equals_the_fewest_and_lowest_blocks_win() -> None:
    scores = torch.rand(64, 1, generator=torch.Generator().manual_seed(0))
    assert LayerFusion("max_logit").fit(of_scores(scores.expand(-1, 6))).chosen == (5,)
    # Of blocks that gather the scores equally well, the lower one.
    gathered = torch.rand(64, 4, generator=torch.Generator().manual_seed(1))
    gathered[:, 0] = gathered[:, 1] = 1 - gathered[:, 3]
    gathered[0, :2] += 1
    assert LayerFusion("max_logit").fit(of_scores(gathered)).chosen == (0, 3)


@pytest.mark.parametrize("chunk", [1, 1000, 10**6])
def test_batches_and_chunks_change_nothing_and_the_inputs_are_read_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    logits = layer_logits(70, 7)
    whole = LayerFusion("mcm").fit(readings(logits))
    monkeypatch.setattr(fusion, "_CHUNK_NUMEL", chunk)

    def once() -> Iterator[Reading]:
        yield from readings(logits, batch=9)

    by_batches = LayerFusion("mcm").fit(once())
    assert (by_batches.chosen, by_batches.entropy) == (whole.chosen, whole.entropy)


def test_the_layers_are_chosen_at_the_temperature_that_will_be_used() -> None:
    logits = layer_logits(300, 8, classes=9)
    chosen = {
        temperature: LayerFusion("mcm").fit(readings(logits), temperature=temperature).chosen
        for temperature in (0.3, 1.0, 100.0)
    }
    assert len(set(chosen.values())) > 1
    assert LayerFusion("mcm").fit(readings(logits)).chosen == chosen[100.0]


def test_a_fit_starts_anew_and_leaves_the_first_alone() -> None:
    unfitted = LayerFusion("mcm")
    assert unfitted.needs_fit
    first = unfitted.fit(readings(layer_logits(100, 8, seed=1)))
    assert unfitted.needs_fit
    assert unfitted.chosen is None
    assert not first.needs_fit
    second = first.fit(readings(layer_logits(100, 8, seed=2)))
    assert second.chosen == LayerFusion("mcm").fit(readings(layer_logits(100, 8, seed=2))).chosen != first.chosen


def test_saved_and_loaded_it_needs_no_fit() -> None:
    logits = layer_logits(100, 8)
    for made in (LayerFusion("energy", bins=48).fit(readings(logits)), LayerFusion("entropy", layers=(0, -1))):
        values, tensors = made.state()
        assert tensors == {}
        loaded = find_score(made.name).with_state(json.loads(json.dumps(values)), tensors)
        assert isinstance(loaded, LayerFusion)
        assert not loaded.needs_fit
        assert loaded.state() == made.state()
        assert torch.equal(score(loaded, logits), score(made, logits))
    unfitted = LayerFusion("mcm")
    assert find_score(unfitted.name).with_state(*unfitted.state()).needs_fit


def test_a_damaged_state_is_refused() -> None:
    values = LayerFusion("mcm").fit(readings(layer_logits(100, 8))).state()[0]
    restore = LayerFusion("mcm").with_state
    assert "This is no state of layer_fusion:mcm: it has nothing" in message_of(restore, {}, {})
    assert "'energy'; bins" in message_of(restore, {**values, "score": "energy"}, {})
    assert "it has bank, bins" in message_of(restore, values, {"bank": torch.zeros(1)})
    assert "layers is 5; give 'auto'" in message_of(restore, {**values, "layers": 5}, {})
    assert "layers is ['a']; give 'auto'" in message_of(restore, {**values, "chosen": ["a"]}, {})
    assert "bins is None; give a whole number from 16 to 128" in message_of(restore, {**values, "bins": None}, {})
    loaded = restore({**values, "chosen": [3, 12]}, {})
    assert "layers has 12, and the model has 8 blocks" in message_of(score, loaded, layer_logits(4, 8))


def test_ones_own_score_is_fused() -> None:
    def second_best(global_logits: Tensor, temperature: Tensor | float) -> Tensor:
        return -(global_logits / temperature).topk(2).values[:, 1]

    logits = layer_logits(50, 4)
    fused = LayerFusion(Score(second_best, of_cosines=True), layers=[0, 3])
    expected = -(logits.layers[:, [0, 3]] / 100).topk(2).values[..., 1].mean(1)  # type: ignore[index]
    torch.testing.assert_close(score(fused, logits), expected)
    assert LayerFusion(second_best).fit(readings(logits), temperature=2.0).chosen is not None
    # What is wrong with it is said of it, in the fit, too.
    wrong = LayerFusion(Score(lambda global_logits: global_logits, name="wrong"))
    assert "The score wrong gives shape (50, 5)" in message_of(wrong.fit, readings(logits))


@pytest.mark.parametrize("name", sorted(set(SCORES) - set(FUSED)))
def test_scores_that_read_something_else_are_refused(name: str) -> None:
    message = message_of(LayerFusion, name)
    assert f"The score {name} reads {', '.join(sorted(SCORES[name].reads))}" in message
    assert "fused over a score that reads global_logits alone, such as 'mcm', 'energy' or 'logit_gap'" in message


def test_neither_is_a_fusion_fused() -> None:
    assert "layer_fusion:mcm has to be fitted" in message_of(LayerFusion, LayerFusion("mcm"))
    assert "layer_fusion:mcm reads layer_logits" in message_of(LayerFusion, LayerFusion("mcm", layers=[0]))
    assert "score is 'mmc'; write one of" in message_of(find_score, "layer_fusion:mmc")
    assert ", or 'layer_fusion:...'" in message_of(find_score, "layers:mcm")


@pytest.mark.parametrize("layers", ["all", [], [1.0, 2.0], [True], [1, 1], 3, None, ["1"], torch.tensor([1, 2])])
def test_layers_that_are_none(layers: Any) -> None:
    message = message_of(LayerFusion, "mcm", layers=layers)
    assert f"layers is {layers!r}; give 'auto', or blocks by their numbers, each once, such as [3, 7, 11]" in message


@pytest.mark.parametrize("bins", [15, 129, 32.0, "32", True])
def test_too_few_and_too_many_bins(bins: Any) -> None:
    assert f"bins is {bins!r}; give a whole number from 16 to 128" in message_of(LayerFusion, "mcm", bins=bins)


def test_layers_that_the_model_does_not_have() -> None:
    logits = layer_logits(4, 6)
    message = message_of(score, LayerFusion("mcm", layers=[2, 6]), logits)
    assert "layers has 6, and the model has 6 blocks; give -6 to 5" in message
    assert "layers has -7" in message_of(score, LayerFusion("mcm", layers=[-7]), logits)
    message = message_of(score, LayerFusion("mcm", layers=[5, -1]), logits)
    assert "layers is [5, -1], which of 6 blocks names one twice" in message
    fitted = LayerFusion("mcm").fit(readings(layer_logits(50, 6)))
    message = message_of(score, fitted, layer_logits(4, 7))
    assert "was fitted on 6 blocks, and this model has 7; fit it anew" in message


def test_what_cannot_be_fitted() -> None:
    unfitted = LayerFusion("mcm")
    assert "has not chosen its layers yet; call fit with in-distribution inputs" in message_of(
        score, unfitted, layer_logits(4, 6)
    )
    for few in ([], readings(layer_logits(31, 6))):
        message = message_of(unfitted.fit, few)
        assert f"a histogram of 32 bins, and there are {31 if few else 0} inputs to fit it on" in message
        assert "give 32 or more, fewer bins (16 at least), or the layers" in message
    logits = layer_logits(50, 6)
    logits.layers[[3, 7], 2] = torch.nan  # type: ignore[index]
    assert "is not finite for 2 of the 50 inputs" in message_of(unfitted.fit, readings(logits))
    same = of_scores(torch.ones(50, 6))
    assert "gives every input the same score, whichever layers are read" in message_of(
        LayerFusion("max_logit").fit, same
    )
    without = readings(layer_logits(50, 6)._replace(layers=None))
    assert "'layer_fusion:mcm' reads what is not there: layer_logits" in message_of(unfitted.fit, without)


def test_a_set_without_any_difference_is_left_out() -> None:
    """Two blocks that cancel out exactly have a histogram of no entropy, and no threshold either."""
    scores = torch.randint(0, 8, (64, 3), generator=torch.Generator().manual_seed(0)).float()
    scores[:, 0] = 8 - scores[:, 2]
    fitted = LayerFusion("max_logit").fit(of_scores(scores))
    assert fitted.chosen != (0, 2)
    assert fitted.entropy is not None
    assert fitted.entropy > 0


def test_a_detector_fuses_layers_with_and_without_an_adapter(
    load_clip: Callable[..., Any], processor: Any, class_names: list[str]
) -> None:
    """Its scores are MCM on the logits that the model's own hidden states give."""
    images, ratios = pictures(40), {"vision_model.encoder.layers.1.mlp.fc1": 0.5}
    for adapted in (False, True):
        model = load_clip()
        if adapted:
            model = get_peft_model(model, SeTARConfig(rank_ratios=ratios, target_modules=list(ratios))).eval()
        detector = OODDetector(model, processor, class_names, LayerFusion("mcm", bins=16), batch_size=7)
        with pytest.warns(UserWarning, match="20 ID inputs are few"):
            detector.fit(images)
        chosen = detector._score.state()[0]["chosen"]
        base = model.get_base_model() if adapted else model
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hidden = base.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
            text = torch.nn.functional.normalize(detector._bank.weight, dim=-1)
            by_layer = []
            for block in chosen:
                token = base.visual_projection(base.vision_model.post_layernorm(hidden[block][:, 0]))
                by_layer.append((torch.nn.functional.normalize(token, dim=-1) @ text.T).softmax(-1).amax(-1))
        found = torch.from_numpy(detector.scores(images)["score"])
        torch.testing.assert_close(found, torch.stack(by_layer).mean(0), rtol=1e-4, atol=1e-6)


def test_a_classifier_fuses_layers_and_a_model_without_a_class_token_does_not() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    vit = randomised(ViTForImageClassification(ViTConfig(num_hidden_layers=3, num_labels=4, **shape)))
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    backbone = backbone_of(vit)
    with torch.no_grad():
        features = backbone.embedded(backbone.image_features(images, layers=True))
        logits = backbone.class_weights(None).logits_of(features, local=False)
        hidden = vit(images, output_hidden_states=True).hidden_states
        by_layer = [vit.classifier(vit.vit.layernorm(states[:, 0])).logsumexp(-1) for states in hidden[2:]]
    torch.testing.assert_close(
        score(LayerFusion("energy", layers=[1, 2]), logits), torch.stack(by_layer).mean(0), rtol=1e-4, atol=1e-5
    )
    vision, text = {**shape, "num_hidden_layers": 2}, {"num_hidden_layers": 1}
    siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    with pytest.raises(ValueError, match="SiglipModel has no class token that runs through all blocks"):
        backbone_of(siglip).image_features(images[:2], layers=True)


def test_it_stands_beside_other_scores() -> None:
    chosen = chosen_scores(["mcm", LayerFusion("mcm"), "layer_fusion:energy"], temperature=3.0)
    assert list(chosen) == ["mcm", "layer_fusion:mcm", "layer_fusion:energy"]
    assert all(settings == {"temperature": 3.0} for _, settings in chosen.values())
    assert [found.needs_layers for found, _ in chosen.values()] == [False, True, True]
    assert "names layer_fusion:mcm twice" in message_of(chosen_scores, [LayerFusion("mcm"), "layer_fusion:mcm"])
