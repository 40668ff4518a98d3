"""The model card: what it says, what the Hub reads of it, and whose text it leaves alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from torch import nn

from setar_peft import CardFacts, SeTARConfig, search_rank_ratios
from setar_peft.hub.card import hub_id
from setar_peft.tuner.config import objective_settings

RATIOS = {"vision_model.encoder.layers.0.mlp.fc1": 0.25, "text_model.encoder.layers.1.mlp.fc1": 0.0}


def adapted(base: nn.Module, name: str = "default", hub_name: str | None = "user/base", **settings: Any) -> PeftModel:
    if hub_name:
        base.name_or_path = base.config._name_or_path = hub_name
    return get_peft_model(base, SeTARConfig(**{"rank_ratios": dict(RATIOS), **settings}), adapter_name=name)


def saved_card(model: PeftModel, folder: Path) -> ModelCard:
    # PEFT would ask the Hub for the base's vocabulary.
    model.save_pretrained(folder, save_embedding_layers=False)
    return ModelCard.load(folder / "README.md")


def test_what_it_says(load_clip, tmp_path: Path) -> None:
    card = saved_card(adapted(load_clip()), tmp_path)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "user/base"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert {
        "setar",
        "ood-detection",
        "out-of-distribution-detection",
        "base_model:adapter:user/base",
        "transformers",
    } <= set(card.data.tags)
    assert "license" not in card.data.to_dict()
    for line in (
        "# SeTAR (training-free) adapter",
        "pip install setar-peft",
        "import setar_peft",
        "1 of 2 adapted layers are truncated.",
        "| `vision_model.encoder.layers.0.mlp.fc1` | 0.25 | 16 of 64 |",
        "- Pruning: minor;",
        "- License: not stated by the author",
        "@inproceedings{li2024setar,",
    ):
        assert line in card.text, line
    assert "text_model.encoder.layers.1.mlp.fc1" not in card.text
    assert "More Information Needed" not in card.text
    assert "- PEFT " in card.text
    (python,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    ast.parse(python)
    assert 'CLIPModel.from_pretrained("user/base")' in python


class WeightNorm:
    """An objective with settings, of which the card tells the plain ones."""

    def __init__(self) -> None:
        self.ood_weight, self.class_names, self._secret, self.images = 0.1, ["cat", "dog"], 5, [1, 2, 3]

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, model: nn.Module) -> float:
        return sum(float(parameter.detach().norm()) for parameter in model.parameters())


def test_settings_of_an_objective(clip_objective) -> None:
    settings = objective_settings(clip_objective(6))
    assert {"objective": "LoCoOpObjective", "ood_weight": 0.1, "top_k": 2, "classes": 6, "images": 6}.items() <= (
        settings.items()
    )
    assert objective_settings(None) == {}
    assert objective_settings(saved_card) == {"objective": "saved_card"}


def test_an_adapter_of_a_search_says_what_was_searched_with(load_clip, clip_objective, tmp_path: Path) -> None:
    config = SeTARConfig(candidate_ratios=[0.3], order="text")
    found = search_rank_ratios(load_clip(), clip_objective(), config, progress=False)
    card = saved_card(get_peft_model(load_clip(), found.config), tmp_path)
    for line in ("## Objective of the search", "- objective: LoCoOpObjective", "- ood_weight: 0.1", "- images: 24"):
        assert line in card.text
    assert config.card.objective == {}


def test_what_is_known_besides(load_clip, tmp_path: Path) -> None:
    facts = CardFacts(
        license="mit", tags=["imagenet"], metrics={"iNaturalist": {"FPR95": 26.92, "AUROC": 94.67}, "SUN": {"AUROC": 9}}
    )
    settings = {"layers_to_transform": 0, "candidate_ratios": (0.25,), "order": "vision", "rank_ratios": None}
    model = adapted(load_clip(), objective=WeightNorm(), card=facts, finetune=True, **settings)
    card = saved_card(model, tmp_path)
    assert card.data.license == "mit"
    assert "imagenet" in card.data.tags
    for line in (
        "# SeTAR+FT (fine-tuned) adapter",
        "- objective: WeightNorm",
        "- ood_weight: 0.1",
        "- classes: 2",
        "- images: 3",
        "| data | FPR95 | AUROC |",
        "| iNaturalist | 26.92 | 94.67 |",
        "| SUN |  | 9.00 |",
        "- License: mit",
    ):
        assert line in card.text, line
    config = (tmp_path / "adapter_config.json").read_text()
    assert "_secret" not in card.text
    assert '"card"' not in config
    assert "imagenet" not in config


@pytest.mark.parametrize("name", ["default", "other"])
def test_no_local_path_is_told(load_clip, tmp_path: Path, name: str) -> None:
    model = adapted(load_clip(), name, hub_name=None)
    for _ in range(2):
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    cards = list(tmp_path.rglob("README.md"))
    assert len(cards) == (1 if name == "default" else 2)
    for path in cards:
        assert "golden" not in path.read_text()
        assert ModelCard.load(path).data.base_model is None
    folder = tmp_path if name == "default" else tmp_path / name
    assert "a model in a local folder" in (folder / "README.md").read_text()


def test_a_readme_above_is_left_alone(load_clip, tmp_path: Path) -> None:
    above = tmp_path / "README.md"
    # Even one of PEFT's that names a local base: it belongs to another adapter.
    text = (
        "---\nbase_model: ./my-model\nlibrary_name: peft\ntags:\n- base_model:adapter:./my-model\n---\n# My project\n"
    )
    above.write_text(text)
    for name in ("default", "other"):
        adapted(load_clip(), name, hub_name=None).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert above.read_text() == text


def test_the_second_save_updates_our_section_and_keeps_the_rest(load_clip, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    card = saved_card(adapted(load_clip()), tmp_path)
    card.text = f"My preface.\n\n{card.text}\n\n## My notes\n\nHands off."
    card.data.license = "bsd-3-clause"
    card.data["datasets"] = ["imagenet-1k"]
    card.save(path)
    again = saved_card(adapted(load_clip(), rank_ratios={"vision_model.encoder.layers.0.mlp.fc1": 0.5}), tmp_path)
    assert again.text.startswith("My preface.")
    assert "## My notes\n\nHands off." in again.text
    assert (again.data.license, again.data["datasets"]) == ("bsd-3-clause", ["imagenet-1k"])
    assert "| 0.5 | 32 of 64 |" in again.text
    assert "| 0.25 |" not in again.text
    text = path.read_text()
    assert saved_card(PeftModel.from_pretrained(load_clip(), tmp_path), tmp_path).text.count("<!-- setar") == 1
    assert len(path.read_text()) == len(text)


def test_an_edited_section_is_the_users(load_clip, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    card = saved_card(adapted(load_clip()), tmp_path)
    card.text = card.text.replace("# SeTAR (training-free) adapter", "# Our detector of oddities")
    card.save(path)
    text = path.read_text()
    model = adapted(load_clip(), rank_ratios={"vision_model.encoder.layers.0.mlp.fc1": 0.5})
    assert saved_card(model, tmp_path).text.strip() == ModelCard(text).text.strip()


def test_a_card_written_before_the_first_save_is_kept(load_clip, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlanguage: en\n---\n# Mine\n\nText.\n")
    card = saved_card(adapted(load_clip()), tmp_path)
    assert "# Mine\n\nText." in card.text
    assert "## Citation" in card.text
    assert card.data["language"] == "en"


def test_a_config_alone_has_no_card(tmp_path: Path) -> None:
    SeTARConfig(rank_ratios=0.2).save_pretrained(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_hub_id(tmp_path: Path) -> None:
    assert hub_id("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    for name in (None, "", str(tmp_path), "/no/longer/there", "./here", "a/b/c"):
        assert hub_id(name) is None
