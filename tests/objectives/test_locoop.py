"""Objectives: prompts, settings and refusals of the LoCoOp objective, and what an objective of one's own needs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft import LoCoOpObjective, Objective, SeTARConfig, estimate_cost, search_rank_ratios
from setar_peft.backbones import Backbone, ClassWeights, ImageFeatures, backbone_of
from setar_peft.detection.evaluation import evaluate
from setar_peft.objectives.loss import LossValues, locoop_loss
from tests.backbones import checks

Clip = Callable[..., CLIPModel]
MakeObjective = Callable[..., LoCoOpObjective]


def test_the_loss_of_a_model_is_the_published_one(
    load_clip: Clip, clip_objective: MakeObjective, golden_clip: dict[str, Tensor]
) -> None:
    objective = clip_objective(ood_weight=0.25, top_k=3, batch_size=7)
    total, id_loss, ood_loss = golden_clip["loss.lam0.25.k3"].tolist()
    values = objective.losses(load_clip())
    assert values[:3] == pytest.approx((total, id_loss, ood_loss), rel=2e-5)
    assert objective(load_clip()) == values.total


def test_a_model_is_evaluated_in_evaluation_mode_and_left_in_its_own(
    load_clip: Clip, clip_objective: MakeObjective
) -> None:
    model = load_clip()
    expected = clip_objective()(model)
    model.train()
    model.vision_model.encoder.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert clip_objective()(model) == expected
    assert [module.training for module in model.modules()] == before


def test_prompts(load_clip: Clip) -> None:
    backbone = backbone_of(load_clip())
    texts: list[str] = []

    class Listening(checks.WordTokenizer):
        def __call__(self, prompts: list[str], **settings: Any) -> dict[str, Tensor]:
            texts.extend(prompts)
            return super().__call__(prompts, **settings)

    images = checks.random_images(4, 3, 8, 8)
    made = {
        "a photo of a {class}": ["a photo of a cat", "a photo of a dog"],
        "{class}, a kind of {class}": ["cat, a kind of cat", "dog, a kind of dog"],
    }
    for prompt, expected in made.items():
        texts.clear()
        LoCoOpObjective(Listening(), ["cat", "dog"], images, [0, 1, 0, 1], top_k=1, prompt=prompt).class_tokens(
            backbone
        )
        assert texts == expected
    texts.clear()
    own = ["feline", "canine"]
    LoCoOpObjective(Listening(), {1: "dog", 0: "cat"}, images, [0, 1, 0, 1], top_k=1, prompt=own).class_tokens(backbone)
    assert texts == own


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        ({"top_k": 7}, r"top_k is 7 with 6 classes; give an integer from 0 .* to 6"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, r"top_k is 1\.5"),
        ({"top_k": True}, "top_k is True"),
        ({"ood_weight": -0.1}, r"ood_weight is -0\.1; give a finite number"),
        ({"ood_weight": float("inf")}, "ood_weight is inf"),
        ({"ood_weight": float("nan")}, "ood_weight is nan"),
        ({"prompt": "a photo"}, r"prompt is 'a photo'; put \"\{class\}\" where"),
        ({"prompt": ["a cat"]}, "prompt has 1 texts for 6 classes"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_settings_get_a_sentence(clip_objective: MakeObjective, change: dict[str, Any], pieces: str) -> None:
    with pytest.raises(ValueError, match=pieces):
        clip_objective(**change)


@pytest.mark.parametrize("names", [["cat"], [], "cat", ["cat", 3], ["cat", ""], {0: "cat"}, {"0": "cat", "1": 3}])
def test_wrong_class_names_get_a_sentence(names: Any) -> None:
    with pytest.raises(ValueError, match="names of at least two in-distribution classes"):
        LoCoOpObjective(None, names, torch.zeros(2, 3, 4, 4), [0, 1], top_k=1)


def test_a_processor_without_a_tokenizer_gets_a_sentence(load_clip: Clip) -> None:
    objective = LoCoOpObjective(None, checks.CLASSES, checks.random_images(4, 3, 32, 32), range(4), top_k=2)
    with pytest.raises(ValueError, match=r"processor is a NoneType, which cannot tokenise"):
        objective(load_clip())


def named_vit(names: dict[int, str]) -> Any:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config.image_size, config.patch_size, config.id2label = 8, 4, names
    config.label2id = {name: index for index, name in names.items()}
    return ViTForImageClassification(config).eval()


def test_class_names_are_a_classifiers_own_in_its_order() -> None:
    model = named_vit({0: "Trouser", 1: "Ankle boot", 2: "Bag"})
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    named = ["bag", "bag", "trouser", "trouser", "ankle_boot", "ankle_boot"]

    def objective(names: Any, labels: Any = named) -> LoCoOpObjective:
        return LoCoOpObjective(None, names, pixels, labels, top_k=1)

    expected = objective(model.config.id2label, [2, 2, 0, 0, 1, 1]).losses(model)
    assert objective(model.config.id2label).losses(model) == expected
    assert objective(["trouser", "ankle-boot", "BAG"]).losses(model) == expected
    for names in (["Ankle boot", "Bag", "Trouser"], ["Trouser", "Ankle boot", "Hat"], ["Trouser", "Bag"]):
        wrong = objective(names, [0, 1] * 3)
        for use in (
            wrong.losses,
            lambda model, wrong=wrong: search_rank_ratios(model, wrong, progress=False),
            lambda model, wrong=wrong: estimate_cost(model, wrong),
            lambda model, wrong=wrong: evaluate(model, wrong.images, {"same": wrong.images}),
        ):
            with pytest.raises(ValueError, match=r"in its order.*Trouser, Ankle boot, Bag\. Give class_names="):
                use(model)
    # Where a model has no names, the user's stand for its outputs.
    nameless = named_vit({index: f"LABEL_{index}" for index in range(3)})
    assert objective(["Ankle boot", "Bag", "Trouser"]).losses(nameless).total > 0


def test_a_base_near_chance_is_said(load_clip: Clip, clip_objective: MakeObjective) -> None:
    objective = clip_objective()
    # Every label is the next class's: what a folder in another order than the model's classes amounts to.
    objective.images.labels = (objective.images.labels + 1) % 6
    with pytest.warns(UserWarning, match=r"classifies .*% of the 24 inputs right, which is near chance \(16\.7%\)"):
        search_rank_ratios(load_clip(), objective, SeTARConfig(candidate_ratios=[0.1]), progress=False)
    loss = LossValues(1.0)
    # 4 of 24 by chance, 7.7 within two standard deviations; a callable's loss has no accuracy.
    for right, warns in ((4, True), (7, True), (8, False), (24, False), (math.nan, False)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            objective.check_base(loss._replace(accuracy=right / 24))
        assert bool(said) == warns


def test_strings_are_texts_for_a_tokenizer_and_paths_for_an_image_processor(tmp_path: Path) -> None:
    processor = CLIPImageProcessorPil()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    pixels, _ = next(LoCoOpObjective(processor, ["cat", "dog"], paths, [0, 1], top_k=1).batches())
    assert pixels.shape == (2, 3, 224, 224)
    tokenizer = checks.WordTokenizer()
    tokens, _ = next(LoCoOpObjective(tokenizer, ["cat", "dog"], paths, ["dog", "cat"], top_k=1).batches())
    assert "input_ids" in tokens


class CrossEntropy(Objective):
    """An objective of one's own: the ID loss alone, in as few lines as it takes."""

    def __init__(self, of: LoCoOpObjective) -> None:
        self.of = of

    sums_size = 2

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.of.batches()  # type: ignore[return-value]

    def class_tokens(self, backbone: Backbone) -> dict[str, Tensor]:
        return self.of.class_tokens(backbone)

    def sums(self, features: ImageFeatures, classes: ClassWeights, labels: Tensor) -> Tensor:
        losses = torch.nn.functional.cross_entropy(classes.logits(features.pooled), labels, reduction="none")
        return torch.stack([losses.sum(dtype=torch.float64), losses.new_tensor(len(losses), dtype=torch.float64)])

    def values(self, sums: Tensor) -> LossValues:
        return LossValues(float(sums[0] / sums[1]))


def test_an_objective_of_ones_own_is_replayed(load_clip: Clip, clip_objective: MakeObjective) -> None:
    config = SeTARConfig(candidate_ratios=[0.1, 0.3])
    own = search_rank_ratios(load_clip(), CrossEntropy(clip_objective()), config, progress=False)
    config.criterion = "id"
    builtin = search_rank_ratios(load_clip(), clip_objective(), config, progress=False)
    assert own.rank_ratios == builtin.rank_ratios
    assert [row.total_loss for row in own.trace.rows] == pytest.approx(
        [row.id_loss for row in builtin.trace.rows], abs=1e-7
    )
    assert own.trace.settings["objective"] == {"type": "CrossEntropy"}
    with pytest.raises(NotImplementedError, match="CrossEntropy cannot be sharded over 2 processes; implement shard"):
        CrossEntropy(clip_objective()).shard(0, 2)


def test_the_loss_is_that_of_the_logits(load_clip: Clip, clip_objective: MakeObjective) -> None:
    """By another way: the model's logits of all images at once, and the loss of one batch."""
    model, objective = load_clip(), clip_objective(top_k=3, ood_weight=0.2)
    pixels, labels = (torch.cat(parts) for parts in zip(*objective.batches(), strict=True))
    with torch.no_grad():
        text = model.get_text_features(**objective.class_tokens(backbone_of(model))).pooler_output
        logits = checks.logits_of(model, pixels, text)
    loss = locoop_loss(logits.pooled, logits.local, labels, ood_weight=0.2, top_k=3)
    assert objective(model) == pytest.approx(float(loss), rel=1e-6)


def prompts_of_words(*prompts: str) -> LoCoOpObjective:
    """An objective whose prompts are given; each word is a token, and the model below takes ten of them."""
    images = checks.random_images(2, 3, 8, 8)
    return LoCoOpObjective(checks.WordTokenizer(), list(prompts), images, [0, 1], top_k=1, prompt=list(prompts))


@pytest.fixture
def short_clip() -> Any:
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    vision = {**widths, "image_size": 8, "patch_size": 4}
    text = {**widths, "vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text))


def test_prompts_that_are_cut_and_classes_that_are_thereby_lost_are_named(short_clip: Any) -> None:
    long = "a b c d e f g h i j"
    objective = prompts_of_words(f"{long} cat", f"{long} dog", "frog")
    both = f"'{long} cat', '{long} dog'"
    cut = f"2 of 3 class prompts are longer than the 12 tokens that the model takes and are cut: {both}."
    equal = f"The model cannot tell the classes of these prompts apart, since their tokens are equal: {both}."
    with pytest.warns(UserWarning, match=cut), pytest.warns(UserWarning, match=equal):
        tokens = objective.class_tokens(backbone_of(short_clip))
    assert tokens["input_ids"].shape == (3, 12)
    # The end token, which the model reads, is kept.
    assert tokens["input_ids"][0, -1] == 2


def test_long_prompts_and_equal_ones_are_no_fault(short_clip: Any) -> None:
    """A prompt may take all of the model's tokens, and two classes may have one name, as ImageNet's cranes do."""
    objective = prompts_of_words("a b c d e f g h i j", "crane", "crane")
    assert objective.class_tokens(backbone_of(short_clip))["input_ids"].shape == (3, 12)


def test_a_tokenizer_that_makes_different_names_equal_is_noticed(short_clip: Any) -> None:
    objective = prompts_of_words("tiger cat", "tiger dog")
    objective._prompts._tokenizer.words = dict.fromkeys(("cat", "dog"), 7)
    with pytest.warns(UserWarning, match=r"cannot tell the classes.*'tiger cat', 'tiger dog'"):
        objective.class_tokens(backbone_of(short_clip))


def test_top_k_is_30_percent_of_the_classes_unless_given() -> None:
    def top_k(classes: int, **settings: int) -> int:
        names = [f"class {index}" for index in range(classes)]
        return LoCoOpObjective(None, names, torch.zeros(2, 3, 4, 4), [0, 1], **settings).top_k

    assert [top_k(classes) for classes in (2, 6, 7, 1000)] == [1, 2, 2, 300]
    assert top_k(7, top_k=5) == 5
