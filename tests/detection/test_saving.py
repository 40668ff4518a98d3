"""A detector that is saved and loaded: the same to the bit, or refused in a sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from transformers import CLIPModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from setar_peft import SeTARConfig
from setar_peft.backbones.base import Backbone
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.fusion import LayerFusion
from setar_peft.detection.scores import SCORES, register_score
from setar_peft.detection.scoring import Score
from setar_peft.hub.detector_files import DetectorFiles
from tests.demo.conftest import one_thread  # noqa: F401 - every test here uses it
from tests.detection.pictures import pictures

pytestmark = pytest.mark.filterwarnings("ignore:.* ID inputs are few for a level:UserWarning")
RATIOS = {"vision_model.encoder.layers.1.mlp.fc1": 0.4, "text_model.encoder.layers.0.mlp.fc1": 0.2}
NEW = pictures(9, seed=1)
TEXTS = ["the cat sat", "dog on mat", "number 3", "the 7", "cat 1 2", "on the mat 5", "dog", "the number 9"]


@pytest.fixture
def saved(detector: Any, tmp_path: Path) -> Path:
    """A fitted detector of a stock model, saved."""
    detector.fit(pictures(20), tpr=0.9).save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


@pytest.fixture
def adapted(load_clip: Callable[..., Any], processor: Any, class_names: list[str]) -> Callable[..., Any]:
    """Makes fitted detectors of the golden CLIP with an adapter."""

    def make(config: Any = None, adapter_name: str = "default", **settings: Any) -> Any:
        model = get_peft_model(load_clip(), config or SeTARConfig(rank_ratios=RATIOS), adapter_name=adapter_name)
        return OODDetector(model, processor, class_names, **settings).fit(pictures(20), tpr=0.9)

    return make


def same(one: Any, other: Any, data: Any = NEW) -> bool:
    """Whether two detectors say the same, to the bit."""
    ours, theirs = one.scores(data), other.scores(data)
    equal = all(np.array_equal(ours[name], theirs[name]) for name in ("score", "probability", "label"))
    described = ("class_names", "prompt", "score_name", "settings", "threshold", "kind", "batch_size")
    decided = one.threshold is None or list(one(data, top_k=2)) == list(other(data, top_k=2))
    return (
        equal
        and decided
        and np.array_equal(one.id_scores, other.id_scores)
        and all(getattr(one, name) == getattr(other, name) for name in described)
    )


def no_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a prompt was encoded")

    monkeypatch.setattr(Backbone, "text_features", refuse)
    monkeypatch.setattr("setar_peft.tuner.layer.decompose", refuse)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("adapter", [None, "default", "another"])
def test_it_is_the_same_to_the_bit_and_encodes_no_prompt(
    adapter: str | None, detector: Any, adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if adapter is not None:
        detector = adapted(adapter_name=adapter)
    else:
        detector.fit(pictures(20), tpr=0.9)
    assert detector.save_pretrained(tmp_path / "a" / "b") is None
    own = {"config.json", "model.safetensors"}
    if adapter is not None:
        own = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(files_of(tmp_path / "a" / "b")) == own | {
        *("README.md", "detector.json", "detector.safetensors"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    no_prompts(monkeypatch)
    loaded = OODDetector.from_pretrained(tmp_path / "a" / "b")
    assert isinstance(loaded, OODDetector)
    assert isinstance(loaded.model, CLIPModel if adapter is None else PeftModel)
    assert not loaded.model.training
    assert same(detector, loaded)
    # And once more, from what was loaded.
    loaded.save_pretrained(tmp_path / "c")
    again = OODDetector.from_pretrained(str(tmp_path / "c"))
    assert same(detector, again)
    before, after = files_of(tmp_path / "a" / "b"), files_of(tmp_path / "c")
    assert before["detector.safetensors"] == after["detector.safetensors"]
    assert (again.folder, loaded.folder) == (tmp_path / "c", tmp_path / "c")


def margin(global_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    first, second = (global_logits / temperature).topk(2).values.unbind(-1)
    return first - second


@pytest.mark.parametrize(
    "settings",
    [
        {"score": "mcm", "temperature": 3.7},
        {"score": {"gl_mcm": {"local_weight": 0.1 + 0.2, "pooling": "class"}}},
        {"score": "energy", "prompt": "one {class}"},
        {"score": "mcm", "prompt": [f"picture {number}" for number in range(6)]},
        {"score": "neglabel", "negative_labels": ["stone", "river", "cloud"]},
    ],
    ids=["temperature", "settings", "prompt", "prompts", "negative labels"],
)
def test_scores_prompts_and_negative_labels(
    settings: dict[str, Any],
    load_clip: Callable[..., Any],
    processor: Any,
    class_names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector = OODDetector(load_clip(), processor, class_names, **settings).fit(pictures(20))
    detector.save_pretrained(tmp_path)
    no_prompts(monkeypatch)
    loaded = OODDetector.from_pretrained(tmp_path)
    assert same(detector, loaded)
    negative = detector._bank.negative
    assert (negative is None) == ("negative_labels" not in settings)
    assert negative is None or torch.equal(negative, loaded._bank.negative)


def test_a_score_that_is_fitted_itself(
    load_clip: Callable[..., Any], processor: Any, class_names: list[str], tmp_path: Path
) -> None:
    for number, score in enumerate(("layer_fusion:mcm", LayerFusion("energy", [0, -1]), LayerFusion("mcm", bins=16))):
        detector = OODDetector(load_clip(), processor, class_names, score=score)
        folder = tmp_path / str(number)
        detector.save_pretrained(folder)
        loaded = OODDetector.from_pretrained(folder)
        assert loaded._score.needs_fit == detector._score.needs_fit
        detector.fit(pictures(80)).save_pretrained(folder)
        loaded = OODDetector.from_pretrained(folder)
        assert same(detector, loaded)
        # Fitted anew, it is the score as it was made.
        assert same(detector.fit(pictures(90, seed=5)), loaded.fit(pictures(90, seed=5)))
    for given in ({"score": LayerFusion("mcm", bins=20)}, {"temperature": 3.0}):
        other = OODDetector.from_pretrained(folder, **given)
        assert (other.threshold, other._score.needs_fit) == (None, True)
        with pytest.raises(ValueError, match=r"found with another score: layer_fusion:mcm, temperature 1"):
            other.on("image")


def test_a_threshold_by_hand_and_none_at_all(detector: Any, tmp_path: Path) -> None:
    detector.save_pretrained(tmp_path)
    loaded = OODDetector.from_pretrained(tmp_path)
    assert same(detector, loaded)
    with pytest.raises(ValueError, match=r"has no threshold, so that it cannot decide; call fit\(id_data\)"):
        loaded(NEW)
    detector.at(threshold=0.1 + 0.2).save_pretrained(tmp_path)
    assert same(detector, OODDetector.from_pretrained(tmp_path))
    detector.fit(pictures(20)).at(threshold=0.4).save_pretrained(tmp_path)
    loaded = OODDetector.from_pretrained(tmp_path)
    assert same(detector, loaded)
    assert same(detector.at(tpr=0.8), loaded.at(tpr=0.8))


def test_what_the_data_call_the_classes(load_clip: Any, processor: Any, class_names: list[str], tmp_path: Path) -> None:
    named = {f"n{number}": name for number, name in enumerate(class_names)}
    detector = OODDetector(load_clip(), processor, named)
    detector.save_pretrained(tmp_path)
    loaded = OODDetector.from_pretrained(tmp_path, class_names=named)
    assert loaded._prompts.classes == detector._prompts.classes


def test_a_head_that_was_trained_with_the_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = ViTForImageClassification(ViTConfig(image_size=24, patch_size=8, num_labels=3, **shape)).eval()
    base.save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["fc1"], modules_to_save=["classifier"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    processor = ViTImageProcessorPil(size={"height": 24, "width": 24})
    detector = OODDetector(model, processor, ["a", "b", "c"], score="msp").fit(pictures(12))
    detector.save_pretrained(tmp_path / "detector")
    assert same(detector, OODDetector.from_pretrained(tmp_path / "detector"))


def test_a_base_without_a_name_is_said(load_clip: Any, processor: Any, class_names: list[str], tmp_path: Path) -> None:
    base = CLIPModel(load_clip().config).eval()
    base.name_or_path = base.config._name_or_path = ""
    model = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS))
    detector = OODDetector(model, processor, class_names).fit(pictures(20))
    with pytest.warns(UserWarning, match=r"does not say where it came from .*from_pretrained\(folder, model=base\)"):
        detector.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no base model; give it, model="):
        OODDetector.from_pretrained(tmp_path)
    assert same(detector, OODDetector.from_pretrained(tmp_path, model=base))


def test_a_refusal_leaves_a_model_that_was_given_as_it_was(adapted: Any, load_clip: Any, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    base = load_clip()
    modules = {name: type(module) for name, module in base.named_modules()}
    wrong: list[dict[str, Any]] = [
        {"score": {"gl_mcm": {"weight": 1}}},
        {"score": "nothing"},
        {"batch_size": 0},
        {"device": "nowhere"},
        {"prompt": "a {class}"},
        {"processor": ViTImageProcessorPil()},
    ]
    for given in wrong:
        with pytest.raises(ValueError, match=next(iter(given)) + "|has no setting"):
            OODDetector.from_pretrained(tmp_path, model=base, **given)
        assert {name: type(module) for name, module in base.named_modules()} == modules


def test_options_that_nothing_reads_are_refused(saved: Path, detector: Any) -> None:
    with pytest.raises(ValueError, match=r"private, token: only for push_to_hub=True"):
        detector.save_pretrained(saved, private=True, token="x")
    with pytest.raises(TypeError, match="treshold"):
        OODDetector.from_pretrained(saved, treshold=0.5)


def test_a_classifier_of_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    names = {0: "a", 1: "b", 2: "c"}
    model = ViTForImageClassification(ViTConfig(image_size=24, patch_size=8, id2label=names, **shape)).eval()
    processor = ViTImageProcessorPil(size={"height": 24, "width": 24})
    detector = OODDetector(model, processor).fit(pictures(12))
    detector.save_pretrained(tmp_path)
    assert same(detector, OODDetector.from_pretrained(tmp_path))
    assert DetectorFiles.read(tmp_path).prompt is None


def test_a_classifier_of_texts(text_model: tuple[Any, Any], tmp_path: Path) -> None:
    detector = OODDetector(*text_model).fit(TEXTS)
    detector.save_pretrained(tmp_path)
    loaded = OODDetector.from_pretrained(tmp_path)
    assert same(detector, loaded, TEXTS[:3])
    explained = loaded.explain("the cat sat")
    assert explained.tokens == ("cat", "sat")
    assert explained.score == pytest.approx(float(detector.scores(["the cat sat"])["score"][0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [False, True])
def test_half_precision(
    dtype: torch.dtype,
    adapter: bool,
    load_clip: Callable[..., Any],
    processor: Any,
    class_names: list[str],
    tmp_path: Path,
) -> None:
    model = load_clip(dtype=dtype)
    if adapter:
        model = get_peft_model(model, SeTARConfig(rank_ratios=RATIOS))
    detector = OODDetector(model, processor, class_names).fit(pictures(20))
    detector.save_pretrained(tmp_path)
    loaded = OODDetector.from_pretrained(tmp_path)
    assert next(loaded.model.parameters()).dtype == dtype
    assert same(detector, loaded)
    if adapter:
        # The factors, too, which PEFT keeps in float32.
        detector = OODDetector(model.to(dtype), processor, class_names).fit(pictures(20))
        detector.save_pretrained(tmp_path)
        assert same(detector, OODDetector.from_pretrained(tmp_path))
        with pytest.raises(ValueError, match=rf"weights are float32, and the detector .* made in {str(dtype)[6:]}, in"):
            OODDetector.from_pretrained(tmp_path, model=load_clip())


def test_an_adapter_of_another_method(adapted: Any, tmp_path: Path) -> None:
    for name in ("default", "mine"):
        lora = LoraConfig(target_modules=["fc1"], init_lora_weights=False)
        detector = adapted(lora, name)
        detector.save_pretrained(tmp_path / name)
        assert same(detector, OODDetector.from_pretrained(tmp_path / name))
        assert "SeTAR (training-free) adapter" not in (tmp_path / name / "README.md").read_text()


def test_an_adapter_that_transformers_put_in(
    adapted: Any, load_clip: Callable[..., Any], processor: Any, class_names: list[str], tmp_path: Path
) -> None:
    adapted().save_pretrained(tmp_path / "first")
    model = load_clip()
    model.load_adapter(tmp_path / "first")
    detector = OODDetector(model, processor, class_names).fit(pictures(20), tpr=0.9)
    assert same(detector, OODDetector.from_pretrained(tmp_path / "first", model=model))
    detector.save_pretrained(tmp_path / "second")
    assert same(detector, OODDetector.from_pretrained(tmp_path / "second"))


def test_a_base_that_is_given(adapted: Any, load_clip: Callable[..., Any], tmp_path: Path) -> None:
    detector = adapted()
    detector.save_pretrained(tmp_path)
    loaded = OODDetector.from_pretrained(tmp_path, model=load_clip())
    assert same(detector, loaded)
    assert same(detector, OODDetector.from_pretrained(tmp_path, model=detector.model))
    assert OODDetector.from_pretrained(tmp_path, model=loaded.model, batch_size=2).batch_size == 2
    # What the base's own digits depend on is said.
    other = CLIPModel.from_pretrained(load_clip().name_or_path, attn_implementation="sdpa")
    with pytest.warns(UserWarning, match=r"attention by 'sdpa', and the detector in .* was made with 'eager'"):
        loaded = OODDetector.from_pretrained(tmp_path, model=other)
    np.testing.assert_allclose(loaded.scores(NEW)["score"], detector.scores(NEW)["score"], atol=1e-5)


def test_only_the_active_adapter_is_saved(adapted: Any, tmp_path: Path) -> None:
    first = adapted(adapter_name="first")
    first.model.add_adapter("second", SeTARConfig(rank_ratios=0.5))
    detector = OODDetector(first.model, first.processor, first.class_names).fit(pictures(20))
    detector.save_pretrained(tmp_path)
    loaded = OODDetector.from_pretrained(tmp_path)
    assert list(loaded.model.peft_config) == ["default"]
    assert same(detector, loaded)


# What is not what the detector was saved with: how it is loaded, and what is said.
def test_another_model_is_refused(
    adapted: Any, saved: Path, load_clip: Callable[..., Any], processor: Any, class_names: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "adapted"
    adapted().save_pretrained(folder)
    other = load_clip()
    with torch.no_grad():
        other.logit_scale += 1e-3
    for place in (folder, saved):
        with pytest.raises(ValueError, match=r"not the one that the detector .* was made with: the digest of its weig"):
            OODDetector.from_pretrained(place, model=other)
        with pytest.raises(ValueError, match=r"The model's weights are bfloat16, and .* made in float32, in which its"):
            OODDetector.from_pretrained(place, model=load_clip(dtype=torch.bfloat16))
        vit = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        with pytest.raises(ValueError, match=r"is a ViTForImageClassification, and .* was made with a CLIPModel"):
            OODDetector.from_pretrained(place, model=vit)
        assert not hasattr(other, "peft_config")
    model = get_peft_model(load_clip(), SeTARConfig(rank_ratios={**RATIOS, next(iter(RATIOS)): 0.3}))
    message = r"has another adapter \('default'\), and the detector in .* was fitted with the adapter in its folder"
    with pytest.raises(ValueError, match=message):
        OODDetector.from_pretrained(folder, model=model)
    with pytest.raises(ValueError, match=r"another adapter \('default'\), and .* was fitted with no adapter"):
        OODDetector.from_pretrained(saved, model=model)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"adapters are switched off"):
        OODDetector.from_pretrained(folder, model=model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into .*unmerge_adapter\(\) first"):
        OODDetector.from_pretrained(folder, model=model)


def test_an_adapter_that_does_not_get_loaded_is_noticed(
    adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted().save_pretrained(tmp_path)
    # As with a PEFT that passes over what it does not know.
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda model, *_, **__: model)
    with pytest.raises(
        ValueError, match=r"The model has no adapter, and the detector in .* was fitted with the adapter"
    ):
        OODDetector.from_pretrained(tmp_path)


def test_no_base_to_be_found(adapted: Any, load_clip: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copytree(load_clip().name_or_path, tmp_path / "base")
    base = CLIPModel.from_pretrained(tmp_path / "base", attn_implementation="eager")
    detector = adapted()
    model = get_peft_model(base, SeTARConfig(rank_ratios=RATIOS))
    moved = OODDetector(model, detector.processor, detector.class_names).fit(pictures(20), tpr=0.9)
    moved.save_pretrained(tmp_path / "detector")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"has the base '.*base', which cannot be loaded: .*Say where the base is, or"):
        OODDetector.from_pretrained(tmp_path / "detector")
    assert same(moved, OODDetector.from_pretrained(tmp_path / "detector", model=load_clip()))


def test_another_score_decides_nothing_and_gives_scores(
    saved: Path, detector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_prompts(monkeypatch)
    for given in ({"score": "mcm"}, {"temperature": 2.0}, {"score": {"gl_mcm": {"local_weight": 0.5}}}):
        loaded = OODDetector.from_pretrained(saved, **given)
        assert loaded.threshold is None
        assert np.isfinite(loaded.scores(NEW)["score"]).all()
        message = r"no threshold \(the one in its folder was found with another score: gl_mcm, .*temperature .*call fit"
        with pytest.raises(ValueError, match=message):
            loaded(NEW)
        with pytest.raises(ValueError, match=message):
            loaded.on("image")
        loaded.fit(pictures(20))(NEW)
    same_score = {"score": "gl_mcm", "temperature": detector.settings["temperature"]}
    assert same(detector, OODDetector.from_pretrained(saved, **same_score))
    with pytest.raises(ValueError, match=r"score is 'mcmm'; write one of"):
        OODDetector.from_pretrained(saved, score="mcmm")
    with pytest.raises(ValueError, match=r"'mcm', 'energy'; a detector decides by one"):
        OODDetector.from_pretrained(saved, score=["mcm", "energy"])


def test_other_classes_prompts_and_processors_are_refused(
    saved: Path, detector: Any, class_names: list[str], processor: Any
) -> None:
    with pytest.raises(
        ValueError, match=r"class_names is \[.*, and the detector in .* was made with \[.*Leave class_na"
    ):
        OODDetector.from_pretrained(saved, class_names=class_names[::-1])
    with pytest.raises(
        ValueError, match=r"prompt is 'a \{class\}', and .* made with 'a photo of a \{class\}', for which"
    ):
        OODDetector.from_pretrained(saved, prompt="a {class}")
    own = {"class_names": tuple(class_names), "prompt": "a photo of a {class}", "processor": processor}
    assert same(detector, OODDetector.from_pretrained(saved, **own))
    assert same(detector, OODDetector.from_pretrained(saved, processor=processor.image_processor))
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"does not make of images what .*image_mean is \[0.5, 0.5, 0.5\], not \[0.48"):
        OODDetector.from_pretrained(saved, processor=processor)


def test_a_score_of_ones_own_has_to_be_brought(
    load_clip: Callable[..., Any], processor: Any, class_names: list[str], tmp_path: Path
) -> None:
    detector = OODDetector(load_clip(), processor, class_names, score=margin, temperature=2.0).fit(pictures(20))
    detector.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has the score 'margin', which is none of this package's; give what it was"):
        OODDetector.from_pretrained(tmp_path)
    assert same(detector, OODDetector.from_pretrained(tmp_path, score=margin))
    register_score(Score(margin))
    try:
        assert same(detector, OODDetector.from_pretrained(tmp_path))
    finally:
        del SCORES["margin"]


def test_what_cannot_be_saved_leaves_nothing(
    adapted: Any, load_clip: Callable[..., Any], processor: Any, class_names: list[str], tmp_path: Path
) -> None:
    detector = adapted()
    detector.save_pretrained(tmp_path / "old")
    before = files_of(tmp_path / "old")

    def refused(message: str, detector: Any) -> None:
        for folder in (tmp_path / "old", tmp_path / "new" / "one"):
            with pytest.raises(ValueError, match=message):
                detector.save_pretrained(folder)
        assert not (tmp_path / "new").exists()
        assert files_of(tmp_path / "old") == before

    detector.model.merge_adapter()
    refused(r"The model has been changed since", detector)
    merged = OODDetector(detector.model, processor, class_names)
    refused(r"merged into .*unmerge_adapter\(\) first", merged)
    detector.model.unmerge_adapter()
    model = detector.model
    model.add_adapter("other", SeTARConfig(rank_ratios=0.5))
    with pytest.warns(PeftWarning, match="both"):
        model.base_model.set_adapter(["default", "other"])
    refused(
        r"active adapters default, other, and a detector is saved with one", OODDetector(model, processor, class_names)
    )
    refused(
        r"is a function, which cannot be saved",
        OODDetector(load_clip(), lambda text, **_: processor(text=text, **_), class_names),
    )

    def odd(global_logits: torch.Tensor, of: Any = len) -> torch.Tensor:
        return global_logits[:, 0]

    refused(r"settings: of is <built-in function len>", OODDetector(load_clip(), processor, class_names, score=odd))


@pytest.mark.parametrize("fails_in", ["save_detector_model", "preprocessing_of", "write_detector_card"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_the_older_detector(
    fails_in: str, error: BaseException, adapted: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(saved)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    detector = adapted()
    monkeypatch.setattr(f"setar_peft.detection.saving.{fails_in}", fail)
    for folder in (saved, saved.parent / "new"):
        with pytest.raises(type(error)):
            detector.save_pretrained(folder)
    assert files_of(saved) == before
    assert not (saved.parent / "new").exists()


def test_a_detector_replaces_another_and_nothing_else(
    adapted: Any, detector: Any, saved: Path, load_clip: Callable[..., Any], tmp_path: Path
) -> None:
    (saved / "notes.txt").write_text("mine")
    readme = saved / "README.md"
    readme.write_text(readme.read_text() + "\n## My notes\n\nHands off.\n")
    second = adapted()
    second.save_pretrained(saved)
    assert not (saved / "config.json").exists()
    assert not (saved / "model.safetensors").exists()
    assert (saved / "notes.txt").read_text() == "mine"
    assert "Hands off." in readme.read_text()
    assert same(second, OODDetector.from_pretrained(saved))
    detector.fit(pictures(20)).save_pretrained(saved)
    assert not (saved / "adapter_config.json").exists()
    assert same(detector, OODDetector.from_pretrained(saved))

    shutil.copytree(load_clip().name_or_path, tmp_path / "base")
    before = files_of(tmp_path / "base")
    with pytest.raises(ValueError, match=r"holds a model or adapter that is not this detector's \(model.safetensors\)"):
        second.save_pretrained(tmp_path / "base")
    assert files_of(tmp_path / "base") == before


def test_beside_the_adapter_that_it_has(adapted: Any, tmp_path: Path) -> None:
    detector = adapted()
    detector.model.save_pretrained(tmp_path, save_embedding_layers=False)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text() + "\n## My notes\n\nHands off.\n")
    detector.save_pretrained(tmp_path)
    text = readme.read_text()
    assert text.index("# Out-of-distribution detector") < text.index("# SeTAR (training-free) adapter")
    assert "Hands off." in text
    assert "90.0% of 20 held-out ID inputs" in text
    assert same(detector, OODDetector.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"is not this detector's \(adapter_model.safetensors\)"):
        adapted(SeTARConfig(rank_ratios=0.1)).save_pretrained(saved_adapter(adapted, tmp_path / "other"))


def saved_adapter(adapted: Any, folder: Path) -> Path:
    adapted().model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_a_card_of_the_adapters_kind(adapted: Any, tmp_path: Path) -> None:
    for name in ("default", "mine"):
        adapted(adapter_name=name).save_pretrained(tmp_path / name)
        text = (tmp_path / name / "README.md").read_text()
        for line in ("library_name: peft", "- setar\n", "- ood-detection\n", "# SeTAR (training-free) adapter"):
            assert line in text, (name, line)
        assert not re.search(r"/golden|/tmp", text)


@pytest.mark.parametrize("kind", ["adapted", "stock"])
def test_damaged_folders(kind: str, adapted: Any, detector: Any, tmp_path: Path) -> None:
    (adapted() if kind == "adapted" else detector).save_pretrained(tmp_path / "whole")
    names = sorted(set(files_of(tmp_path / "whole")) - {"README.md"})
    assert len(names) == 7
    for name in names:
        for number, change in enumerate((lambda data: data[:-1], lambda data: b"", lambda data: data + b" ", None)):
            folder = tmp_path / f"{name}{number}"
            shutil.copytree(tmp_path / "whole", folder)
            data = (folder / name).read_bytes()
            (folder / name).unlink() if change is None else (folder / name).write_bytes(change(data))
            if name == "detector.json" and number in (0, 2):
                continue  # a line feed more or less
            # What is wrong with a model's weights is said by transformers, which names their folder.
            with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
                OODDetector.from_pretrained(folder)
            assert name in str(caught.value) or name == "model.safetensors"
            assert 40 < len(str(caught.value)) < 1000
    with pytest.raises(ValueError, match=r"There is no detector .*nothing"):
        OODDetector.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no detector.json, so that it is no saved detector"):
        OODDetector.from_pretrained(saved_adapter(adapted, tmp_path / "adapter"))


def test_a_threshold_that_its_scores_do_not_give(saved: Path, tmp_path: Path) -> None:
    files = DetectorFiles.read(saved)
    assert files.threshold is not None
    document = json.loads((saved / "detector.json").read_text())
    for key, value in (("value", files.threshold.value + 1e-3), ("tpr", 0.8), ("interval", [0.2, 0.9])):
        changed = DetectorFiles(
            **{**vars(files), "threshold": type(files.threshold)(**{**vars(files.threshold), key: value})}
        )
        changed.write(saved)
        with pytest.raises(ValueError, match=r"and the scores that it was found on give"):
            OODDetector.from_pretrained(saved)
    files.write(saved)
    assert json.loads((saved / "detector.json").read_text()) == document


@pytest.mark.parametrize("number", range(2))
def test_explain(number: int, detector: Any, tmp_path: Path) -> None:
    picture = pictures(3)[number]
    explained = detector.explain(picture)
    grid = detector.model.config.vision_config
    side = grid.image_size // grid.patch_size
    assert explained.strengths.shape == (side, side)
    assert explained.picture is not None
    assert explained.picture.size == (grid.image_size, grid.image_size)
    columns = detector.scores([picture])
    assert explained.label == columns["label"][0]
    # GL-MCM is MCM and the strongest patch.
    mcm = OODDetector(detector.model, detector.processor, detector.class_names, score="mcm").scores([picture])
    assert explained.score == pytest.approx(float(columns["score"][0]), abs=1e-6)
    assert explained.score == pytest.approx(float(mcm["score"][0] + explained.strengths.max()), abs=1e-6)
    explained.figure().savefig(tmp_path / "why.png")
    with pytest.raises(ValueError, match="There are 2 images; an explanation is of one"):
        detector.explain(pictures(2))
    with pytest.raises(ValueError, match=r"nothing\.png"):
        detector.explain(tmp_path / "nothing.png")
