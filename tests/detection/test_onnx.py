"""Graphs for onnxruntime: what they compute beside the model, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import ViTImageProcessorPil

pytest.importorskip("onnxscript", reason="needs the extra onnx")
onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
    pytest.skip("torch exports every model from 2.8 on", allow_module_level=True)

from setar_peft import SeTARConfig
from setar_peft.backbones import ClassWeights, Logits, backbone_of
from setar_peft.detection import onnx as exporting
from setar_peft.detection import onnx_graph
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.fusion import LayerFusion
from setar_peft.detection.onnx import OnnxCheck, export_detector, export_onnx, made_up_pictures
from setar_peft.detection.scores import SCORES, find_score
from setar_peft.detection.scoring import Score
from setar_peft.hub.processors import preprocessing_of
from setar_peft.objectives.base import evaluation_mode
from tests.backbones import checks
from tests.detection.pictures import pictures, written

DOCS = Path(__file__).parents[2] / "docs" / "onnx.md"

WIDTHS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES: dict[str, Any] = {**WIDTHS, "image_size": 16, "patch_size": 8}
TEXTS: dict[str, Any] = {**WIDTHS, "vocab_size": 40, "max_position_embeddings": 20, "eos_token_id": 2}
STAGES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
}
FAMILIES: dict[str, tuple[str, Any]] = {
    "clip": ("CLIPModel", {"vision_config": IMAGES, "text_config": TEXTS, "projection_dim": 12}),
    "siglip": ("SiglipModel", {"vision_config": IMAGES, "text_config": TEXTS}),
    "vit": ("ViTForImageClassification", IMAGES),
    "deit": ("DeiTForImageClassificationWithTeacher", IMAGES),
    "dinov2": ("Dinov2ForImageClassification", IMAGES),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", IMAGES),
    "swin": ("SwinForImageClassification", STAGES),
    "swinv2": ("Swinv2ForImageClassification", STAGES),
    "bert": ("BertForSequenceClassification", TEXTS),
    "roberta": ("RobertaForSequenceClassification", {**TEXTS, "pad_token_id": 0}),
}
TEXT_MODELS = ("bert", "roberta")


def make_model(family: str) -> Any:
    name, settings = FAMILIES[family]
    kind = getattr(transformers, name)
    many = {} if "vision_config" in settings else {"num_labels": 4}
    torch.manual_seed(0)
    return checks.randomised(kind(kind.config_class(**settings, **many)))


def make_classes(model: Any) -> ClassWeights:
    backbone = backbone_of(model)
    width = {"clip": 12, "siglip": 16}.get(backbone.model_type)
    text = None if width is None else torch.randn(4, width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        classes = backbone.class_weights(text)
    return classes._replace(negative=None if text is None else classes.weight.roll(1, 1))


def make_inputs(family: str, count: int, length: int = 9) -> dict[str, Tensor]:
    if family not in TEXT_MODELS:
        return {"pixel_values": checks.random_images(count, 3, 16, 16, seed=count)}
    mask = torch.arange(length) < torch.tensor([length, 5, length - 1, 3, length])[:count, None]
    ids = torch.randint(3, 40, (count, length), generator=torch.Generator().manual_seed(count))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def by_the_model(
    model: Any, classes: ClassWeights, score: Score, settings: Mapping[str, Any], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Scores and logits."""
    with evaluation_mode(model) as (backbone, _):
        features = backbone.embedded(backbone.image_features(inputs, layers=score.needs_layers))
        logits = classes.logits_of(features)
        return score(logits, features, **settings), logits.pooled


def by_onnxruntime(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {name: value.numpy() for name, value in inputs.items()}), strict=True))


def export(
    model: Any, path: Path, score: str | Score = "gl_mcm", threshold: float = 0.7, family: str = "vit", **kwargs: Any
) -> OnnxCheck:
    classes = make_classes(getattr(model, "get_base_model", lambda: model)())
    score = find_score(score) if isinstance(score, str) else score
    settings = score.settings(classes.scale, {})
    return export_onnx(model, classes, score, settings, threshold, path, make_inputs(family, 2), **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_gives_what_the_model_gives_at_any_batch_size(family: str, tmp_path: Path) -> None:
    model, path, score = make_model(family), tmp_path / "model.onnx", find_score("gl_mcm")
    classes = make_classes(model)
    settings = score.settings(classes.scale, {})
    some = by_the_model(model, classes, score, settings, make_inputs(family, 5))[0]
    threshold = some.sort().values[1:3].mean().item()
    check = export(model, path, threshold=threshold, family=family)
    assert check.files == (path,)
    assert list(tmp_path.iterdir()) == [path]
    assert check.inputs == 8
    for count, length in ((1, 2), (1, 3), (5, 12)):
        inputs = make_inputs(family, count, length)
        outputs = by_onnxruntime(path, inputs)
        assert list(outputs) == ["score", "is_id", "label", "logits"]
        scores, logits = by_the_model(model, classes, score, settings, inputs)
        np.testing.assert_allclose(outputs["score"], scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose(outputs["logits"], logits, rtol=0, atol=1e-4)
        assert outputs["is_id"].tolist() == (scores >= threshold).tolist()
        assert outputs["label"].tolist() == logits.argmax(-1).tolist()
        assert [str(outputs[name].dtype) for name in outputs] == ["float32", "bool", "int64", "float32"]
    graph = onnx.load(path).graph
    sizes = {part.name: part.type.tensor_type.shape.dim for part in (*graph.input, *graph.output)}
    assert {name: dims[0].dim_param for name, dims in sizes.items()} == dict.fromkeys(sizes, "batch")
    assert all(sizes[name][1].dim_param == "length" for name in sizes if family in TEXT_MODELS and name in inputs)


def test_every_score_and_ones_own_can_be_exported(tmp_path: Path) -> None:
    model, path = make_model("clip"), tmp_path / "model.onnx"
    # torch 2.8 to 2.10 refuse the entropy's `entr`, and the export says so.
    left_out = set() if tuple(map(int, torch.__version__.split(".")[:2])) > (2, 10) else {"entropy"}
    classes = make_classes(model)
    readers = [score for name, score in SCORES.items() if not score.needs_fit and name not in left_out]

    def every(
        global_logits: Tensor, local_logits: Tensor, layer_logits: Tensor, negative_logits: Tensor, features: Tensor
    ) -> Tensor:
        logits = Logits(global_logits, local_logits, classes.scale, None, layer_logits, negative_logits)
        values = [score(logits, None, **score.settings(float(classes.scale), {})) for score in readers]
        values += [LayerFusion("mcm", [0, -1])(logits, None, temperature=20.0)]
        values += [layer_logits.mean(1).amax(-1), features.norm(dim=-1)]
        return torch.stack([value * 0.7**place for place, value in enumerate(values)]).sum(0)

    export(model, path, Score(every))
    inputs = make_inputs("clip", 4)
    expected, _ = by_the_model(model, classes, Score(every), {}, inputs)
    np.testing.assert_allclose(by_onnxruntime(path, inputs)["score"], expected, rtol=1e-5, atol=1e-5)
    assert len(readers) > 7
    assert expected.std() > 0.01


def truncated() -> Any:
    return get_peft_model(make_model("vit"), SeTARConfig(rank_ratios={"vit.layers.1.mlp.fc1": 0.5}))


@pytest.fixture(scope="module")
def base_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `truncated` with its adapter switched off."""
    path, adapted = tmp_path_factory.mktemp("base") / "base.onnx", truncated().train()
    with adapted.disable_adapter():
        export(adapted, path)
    assert all(module.training for module in adapted.modules())
    return path


def test_active_adapters_are_merged_into_the_graph_and_not_into_the_model(base_graph: Path, tmp_path: Path) -> None:
    adapted = truncated().train()
    classes = make_classes(adapted.get_base_model())
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    states = torch.get_rng_state()
    export(adapted, tmp_path / "model.onnx")
    assert torch.equal(torch.get_rng_state(), states)
    assert all(module.training for module in adapted.modules())
    assert not any(getattr(module, "merged", False) for module in adapted.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())

    inputs, score = make_inputs("vit", 3), find_score("gl_mcm")
    settings = score.settings(classes.scale, {})
    expected, _ = by_the_model(adapted, classes, score, settings, inputs)
    with adapted.disable_adapter():
        without, _ = by_the_model(adapted, classes, score, settings, inputs)
    np.testing.assert_allclose(by_onnxruntime(tmp_path / "model.onnx", inputs)["score"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(by_onnxruntime(base_graph, inputs)["score"], without, rtol=0, atol=1e-5)
    assert (expected - without).abs().max() > 1e-3
    # The factors are no part of the file.
    names = {tensor.name for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert not any("setar" in name for name in names)


def test_in_float16_the_weights_are_and_the_scores_are_not(tmp_path: Path) -> None:
    model, path = make_model("clip"), tmp_path / "model.onnx"
    check = export(model, path, dtype="float16")
    assert 0 < check.score_difference < 1e-3
    graph = onnx.load(path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds.values()
    assert all(part.type.tensor_type.elem_type != onnx.TensorProto.FLOAT16 for part in (*graph.input, *graph.output))
    big = {tensor.name for tensor in graph.initializer if tensor.data_type == 1 and np.prod(tensor.dims) > 16 * 32}
    assert not big


def test_a_graph_on_real_images_decides_as_the_model(shared_data: Path, tmp_path: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(shared_data / "fashion_vit")
    images = np.concatenate([np.load(shared_data / f"{name}_test.npz")["x"][:100] for name in ("fashion", "mnist")])
    pixels = (torch.from_numpy(images)[:, None] / 255 - 0.5) / 0.5
    score, classes = find_score("msp"), make_classes(model)
    expected, logits = by_the_model(model, classes, score, {"temperature": 1.0}, {"pixel_values": pixels})
    threshold = expected[:100].kthvalue(5).values.item()
    path = tmp_path / "model.onnx"
    export_onnx(model, classes, score, {"temperature": 1.0}, threshold, path, pixels[95:105], dtype="float16")
    outputs = by_onnxruntime(path, {"pixel_values": pixels})
    near = 3e-3
    assert 1e-5 < np.abs(outputs["score"] - expected.numpy()).max() < near
    apart = (expected - threshold).abs() > near
    assert apart.float().mean() > 0.97
    assert (torch.from_numpy(outputs["is_id"]) == (expected >= threshold))[apart].all()
    assert (torch.from_numpy(outputs["label"]) == logits.argmax(-1)).float().mean() > 0.99


def test_weights_that_one_file_cannot_hold_go_beside_it_and_the_graph_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 1000)
    path, model = tmp_path / "folder" / "model.onnx", make_model("vit")
    check = export(model, path, metadata={"classes": ["cat", "dog"], "license": "mine"})
    assert check.files == (path, tmp_path / "folder" / "model.onnx.data")
    assert "weights are in model.onnx.data beside it" in str(check)
    assert check.files[1].stat().st_size > 4 * sum(parameter.numel() for parameter in model.vit.layers.parameters())
    assert len(by_onnxruntime(path, make_inputs("vit", 3))["score"]) == 3

    carried = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(carried["classes"]) == ["cat", "dog"]
    assert carried["license"] == "mine"
    assert carried["score"] == "gl_mcm"
    assert json.loads(carried["settings"]) == {"temperature": 1.0, "pooling": "patch", "local_weight": 1.0}
    # float32 has no 0.7; a score is at least that if it is at least this.
    above = float(np.nextafter(np.float32(0.7), np.float32(1)))
    assert float(carried["threshold"]) == above > 0.7 > float(np.float32(0.7))
    assert set(json.loads(carried["versions"])) >= {"setar_peft", "torch"}
    assert b"site-packages" not in path.read_bytes()

    path.unlink()
    with pytest.raises(ValueError, match=r"model\.onnx\.data exists; give another path"):
        export(model, path)


def test_a_graph_that_differs_from_the_model_is_not_left_behind(
    base_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = truncated()
    monkeypatch.setattr(onnx_graph.DetectorGraph, "write", lambda _, path, metadata: shutil.copy(base_graph, path))

    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=f"onnxruntime.*{said}.*nothing was written"):
            export(adapted, tmp_path / "new" / "model.onnx")
        assert not (tmp_path / "new").exists()

    # What the base computes is not what the adapter computes.
    refused("score differs from the model's by up to")
    adapted.base_model.disable_adapter_layers()
    run = exporting._run
    for changed, said in (
        (lambda each: each._replace(is_id=~each.is_id), "decides otherwise than the model"),
        (lambda each: each._replace(label=each.label * 0 - 1), "decides otherwise than the model"),
        (lambda each: each._replace(logits=each.logits * torch.nan), "logits differs from the model's by up to nan"),
    ):
        monkeypatch.setattr(exporting, "_run", lambda *given, changed=changed: [changed(each) for each in run(*given)])
        refused(said)
    monkeypatch.setattr(exporting, "_run", run)
    export(adapted, tmp_path / "new" / "model.onnx")


def test_scores_are_compared_by_their_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(global_logits: Tensor) -> Tensor:
        return 0.002 + 1e-5 * global_logits.softmax(-1).amax(-1)

    model, run = make_model("vit"), exporting._run
    assert export(model, tmp_path / "right.onnx", Score(narrow), threshold=0.0).score_range < 1e-5
    monkeypatch.setattr(
        onnx_graph.DetectorGraph, "write", lambda _, path, metadata: shutil.copy(tmp_path / "right.onnx", path)
    )
    # Far below 1e-4, and yet half of what tells inputs from each other.
    monkeypatch.setattr(
        exporting, "_run", lambda *given: [each._replace(score=each.score + 3e-6) for each in run(*given)]
    )
    with pytest.raises(ValueError, match=r"onnxruntime's score differs .* by up to 3\.\de-06"):
        export(model, tmp_path / "wrong.onnx", Score(narrow), threshold=0.0)


def test_what_cannot_be_exported_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", make_model("vit")

    def by_value(global_logits: Tensor) -> Tensor:
        return global_logits.amax(-1) if global_logits.sum() > 0 else global_logits.amin(-1)

    with pytest.raises(ValueError, match=r"torch .* cannot follow ViTForImageClassification with the score by_value"):
        export(model, path, Score(by_value))
    with pytest.raises(ValueError, match=r"dtype is 'int8'; give one of 'float32', 'float16'"):
        export(model, path, dtype="int8")
    with pytest.raises(ValueError, match=r"The threshold is nan, .* fit the detector"):
        export(model, path, threshold=float("nan"))
    with pytest.raises(ValueError, match=r"images have shape .* takes \(images, 3, 16, 16\)"):
        export_onnx(
            model, make_classes(model), find_score("mcm"), {"temperature": 1.0}, 0.5, path, torch.zeros(1, 3, 8, 8)
        )
    with pytest.raises(ValueError, match=r"reads what is not there: negative_logits"):
        export(model, path, Score(lambda negative_logits: negative_logits.amax(-1), name="own"))
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"model\.onnx exists; give another path"):
        export(model, path)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_models_that_no_graph_can_hold_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", make_model("vit")
    model.is_quantized = True
    with pytest.raises(ValueError, match=r"ViTForImageClassification is quantised.* in float32 or bfloat16"):
        export(model, path)
    model.is_quantized = False
    classes = make_classes(model)
    model.vit.layers[0].to("meta")
    with pytest.raises(ValueError, match=r"ViTForImageClassification is offloaded or spread over several devices"):
        export_onnx(model, classes, find_score("mcm"), {"temperature": 1.0}, 0.5, path, make_inputs("vit", 1))

    vision = {**WIDTHS, "num_patches": 16, "patch_size": 4}
    config = transformers.Siglip2Config(vision_config=vision, text_config=TEXTS)
    flexible = checks.randomised(transformers.Siglip2Model(config))
    inputs = {
        "pixel_values": checks.random_images(1, 16, 48),
        "pixel_attention_mask": torch.ones(1, 16),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }
    classes = backbone_of(flexible).class_weights(torch.randn(4, 16))
    with pytest.raises(ValueError, match=r"Siglip2Model resizes its positions image by image.* SiglipModel"):
        export_onnx(flexible, classes, find_score("mcm"), {"temperature": 1.0}, 0.5, path, inputs)
    assert not list(tmp_path.iterdir())


def test_a_model_in_bfloat16_is_exported_with_a_warning_about_its_threshold(tmp_path: Path) -> None:
    model = make_model("vit").bfloat16()
    with pytest.warns(UserWarning, match=r"computes in bfloat16, and the graph does not.*Fit the detector"):
        check = export(model, tmp_path / "model.onnx")
    assert check.score_difference < 1e-5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def example_of_the_docs(folder: Path) -> dict[str, Any]:
    """The names that the docs' example defines, run for a folder and on a picture in it."""
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for given, stand_in in (("street-onnx", folder), ("street.jpg", folder / "street.jpg")):
        assert f'"{given}"' in block
        block = block.replace(f'"{given}"', f"r{str(stand_in)!r}")
    exec(compile(block, str(DOCS), "exec"), names)
    return names


@pytest.mark.parametrize("kind", ["resized and cropped", "resized"])
def test_the_example_of_the_docs_decides_as_the_detector(kind: str, detector: OODDetector, tmp_path: Path) -> None:
    if kind == "resized":
        processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
        detector = OODDetector(make_model("vit"), processor, ["ape", "bee", "cat", "dog"])
    found = made_up_pictures(20)
    found = [picture.resize((90 + 7 * number, 60 + 11 * number)) for number, picture in enumerate(found)]
    detector.fit([*pictures(20), *found], tpr=0.5)
    folder = tmp_path / "onnx"
    check = export_detector(detector, folder)
    assert check.files == (folder / "model.onnx",)
    assert sorted(path.name for path in folder.iterdir()) == ["detector.json", "model.onnx"]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    found[0].save(folder / "street.jpg", exif=exif)
    paths = [folder / "street.jpg", *written(tmp_path / "pictures", 6)]
    for number, picture in enumerate(found):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    names, records = example_of_the_docs(folder), detector(paths)
    for path, record in zip(paths, records, strict=True):
        score, is_id, label, _ = names["session"].run(None, {"pixel_values": names["pixel_values"](path)})
        assert score[0] == pytest.approx(record.score, abs=1e-5)
        assert bool(is_id[0]) == record.is_id or abs(record.score - record.threshold) < 1e-5
        assert names["detector"]["class_names"][label[0]] == record.label
    assert {record.is_id for record in records} == {True, False}

    document = json.loads((folder / "detector.json").read_text(encoding="utf-8"))
    carried = onnxruntime.InferenceSession(folder / "model.onnx").get_modelmeta().custom_metadata_map
    assert {
        name: value if isinstance(document[name], str) else json.loads(value) for name, value in carried.items()
    } == document
    assert document["kind"] == "image"
    assert document["class_names"] == detector.class_names
    assert document["prompt"] == detector.prompt
    assert document["settings"] == detector.settings
    assert document["threshold"] == detector.threshold.value
    assert document["threshold_found"]["n"] == 40
    assert document["threshold_found"]["interval"] == list(detector.threshold.interval)
    assert document["preprocessing"] == preprocessing_of(detector.processor, "image")
    assert document["dtype"] == "float32"


def test_a_text_detector_comes_with_its_tokenizer(text_model: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = text_model
    texts = [f"the cat {number} sat on {number % 7}" for number in range(20)]
    detector = OODDetector(model, tokenizer, score="msp").fit(texts, tpr=0.5)
    export_detector(detector, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    tokens = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for record, text in zip(detector(texts), texts, strict=True):
        encoded = tokens.encode(text)
        values = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        feed = {put.name: np.array([values[put.name]], dtype=np.int64) for put in session.get_inputs()}
        score, is_id, label, _ = session.run(None, feed)
        assert score[0] == pytest.approx(record.score, abs=1e-5)
        assert bool(is_id[0]) == record.is_id or abs(record.score - record.threshold) < 1e-5
        assert detector.class_names[label[0]] == record.label


def test_a_detector_that_cannot_decide_or_was_changed_is_not_exported(detector: OODDetector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no threshold, so that its graph could not decide; call fit"):
        export_detector(detector, tmp_path / "onnx")
    detector.at(threshold=0.3)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"is not an empty folder; give a new one"):
        export_detector(detector, tmp_path)
    with torch.no_grad():
        detector.model.visual_projection.weight.mul_(2)
    with pytest.raises(ValueError, match=r"The model has been changed"):
        export_detector(detector, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnx") else name)
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript, onnxruntime, .* pip install setar-peft\[onnx\]"):
        export(make_model("vit"), tmp_path / "model.onnx")
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    with pytest.raises(ValueError, match=r"needs torch 2\.8 or later.* this is 2\.7\.1"):
        export(make_model("vit"), tmp_path / "model.onnx")
