"""Detectors of pytorch-ood as scores, against their definitions in numpy; skipped where it is not installed."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import logsumexp
from torch import Tensor

from setar_peft.backbones import ClassWeights, ImageFeatures, Logits
from setar_peft.data.images import ImageSource
from setar_peft.detection import external
from setar_peft.detection.detector import OODDetector
from setar_peft.detection.external import DETECTORS, PytorchOOD
from setar_peft.detection.metrics import ood_metrics
from setar_peft.detection.scores import find_score, score
from setar_peft.detection.scoring import Reading
from tests.detection.pictures import pictures, written
from tests.refusals import message_of

needs_pytorch_ood = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_ood") is None,
    reason="needs pytorch-ood: pip install --no-deps pytorch-ood",
)
OPTIONS: dict[str, dict[str, Any]] = {"KNN": {"k": 5}, "ViM": {"d": 6}, "DICE": {"p": 0.5}}
WIDTH, CLASSES = 12, 3


def clusters(inputs: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features around the centres of three classes, or shifted away from them, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(inputs) % CLASSES
    spread = torch.linspace(0.3, 1.2, WIDTH)
    noise = spread * torch.randn(inputs, WIDTH, generator=generator)
    return 4 * torch.eye(WIDTH)[labels] + noise + shift * torch.ones(WIDTH), labels


def classifier() -> ClassWeights:
    generator = torch.Generator().manual_seed(9)
    weight = torch.eye(WIDTH)[:CLASSES] + 0.1 * torch.randn(CLASSES, WIDTH, generator=generator)
    return ClassWeights(weight, 0.2 * torch.randn(CLASSES, generator=generator))


def readings(features: Tensor, labels: Tensor, classes: ClassWeights | None = None, batch: int = 1000) -> list[Reading]:
    weights = classifier() if classes is None else classes
    found = []
    for start in range(0, len(features), batch):
        part = ImageFeatures(features[start : start + batch], features[start : start + batch, None])
        found.append(Reading(weights.logits_of(part), part, labels[start : start + batch], weights))
    return found


def fitted(name: str, **given: Any) -> PytorchOOD:
    return PytorchOOD(name, **(given or OPTIONS.get(name, {}))).fit(readings(*clusters(90, seed=0)))


def scored(detector: PytorchOOD, features: Tensor) -> Tensor:
    return score(detector, Logits(features, None, 1.0), ImageFeatures(features, features[:, None]))


def knn(train: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Distance of unit vectors to the fifth nearest."""
    del labels
    train, new = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (train, new))
    return np.sort(np.linalg.norm(new[:, None] - train[None], axis=2), axis=1)[:, 4]


def class_distances(train: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance to each class's centre under one scatter matrix, (n, classes)."""
    centres = np.array([train[labels == label].mean(0) for label in np.unique(labels)])
    residual = train - centres[labels]
    precision = np.linalg.inv(residual.T @ residual)
    difference = new[:, None] - centres[None]
    return np.einsum("ncd,de,nce->nc", difference, precision, difference)


def mahalanobis(train: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    return class_distances(train, labels, new).min(1) / 2


def rmd(train: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    background = class_distances(train, np.zeros_like(labels), new)
    return (class_distances(train, labels, new) - background).min(1)


def vim(train: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Norm outside the six principal directions, scaled as logits are, minus the energy."""
    del labels
    weight, bias = (part.double().numpy() for part in classifier()[:2])  # type: ignore[union-attr]
    origin = -np.linalg.pinv(weight) @ bias
    values, vectors = np.linalg.eigh((train - origin).T @ (train - origin))
    outside = vectors[:, np.argsort(values)[: WIDTH - 6]]

    def norm(features: np.ndarray) -> np.ndarray:
        return np.linalg.norm((features - origin) @ outside, axis=1)

    alpha = (train @ weight.T + bias).max(1).mean() / norm(train).mean()
    return alpha * norm(new) - logsumexp(new @ weight.T + bias, axis=1)


def react(train: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Minus the energy of features clipped at the ninetieth percentile."""
    del labels
    weight, bias = (part.double().numpy() for part in classifier()[:2])  # type: ignore[union-attr]
    clipped = np.minimum(new, np.percentile(train, 90))
    return -logsumexp(clipped @ weight.T + bias, axis=1)


@needs_pytorch_ood
@pytest.mark.parametrize(
    ("name", "definition"),
    [("KNN", knn), ("Mahalanobis", mahalanobis), ("RMD", rmd), ("ViM", vim), ("ReAct", react)],
)
def test_the_score_is_minus_the_published_distance(name: str, definition: Callable[..., np.ndarray]) -> None:
    (train, labels), (new, _) = clusters(90, seed=0), clusters(20, seed=1, shift=0.5)
    expected = -definition(train.double().numpy(), labels.numpy(), new.double().numpy())
    found = scored(fitted(name), new)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-4, atol=2e-4)


@needs_pytorch_ood
@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_higher_means_in_distribution(name: str) -> None:
    """Each tells unseen inputs of the classes from others; ReAct and its kin need ones with small logits."""
    detector = fitted(name)
    assert detector.reads == {"features"}
    assert not detector.needs_local
    assert not detector.needs_layers
    known = scored(detector, clusters(200, seed=2)[0])
    generator = torch.Generator().manual_seed(3)
    others = 1.2 * torch.randn(200, WIDTH, generator=generator)
    assert ood_metrics(known, scored(detector, others)).auroc > 0.75


@needs_pytorch_ood
@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_saved_and_loaded_it_gives_the_same_scores_to_the_bit(name: str, tmp_path: Path) -> None:
    detector, new = fitted(name), clusters(20, seed=1)[0]
    values, tensors = detector.state()
    save_file(tensors, tmp_path / "state.safetensors")
    loaded = find_score(detector.name).with_state(
        json.loads(json.dumps(values)), load_file(tmp_path / "state.safetensors")
    )
    assert isinstance(loaded, PytorchOOD)
    assert loaded.name == detector.name
    assert not loaded.needs_fit
    assert torch.equal(scored(loaded, new), scored(detector, new))


@needs_pytorch_ood
def test_nor_does_another_process_change_a_bit(tmp_path: Path) -> None:
    detector, new = fitted("ViM"), clusters(20, seed=1)[0]
    values, tensors = detector.state()
    save_file({**tensors, "new": new}, tmp_path / "state.safetensors")
    code = f"""
import torch
from safetensors.torch import load_file
from setar_peft.backbones import ImageFeatures, Logits
from setar_peft.detection.scores import find_score
torch.set_num_threads({torch.get_num_threads()})
tensors = load_file({str(tmp_path / "state.safetensors")!r})
new = tensors.pop("new").clone()
loaded = find_score({detector.name!r}).with_state({values!r}, tensors)
print(loaded(Logits(new, None, 1.0), ImageFeatures(new, new)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert torch.tensor(json.loads(done.stdout)).equal(scored(detector, new))


@needs_pytorch_ood
def test_another_process_gets_its_state() -> None:
    """None of pytorch-ood's own objects, whose classes cannot be found there without torchvision."""
    detector, new = fitted("ViM"), clusters(20, seed=1)[0]
    data = pickle.dumps(detector)
    assert b"pytorch_ood.detector" not in data
    assert torch.equal(scored(pickle.loads(data), new), scored(detector, new))
    assert torch.equal(scored(copy.deepcopy(detector), new), scored(detector, new))
    assert pickle.loads(pickle.dumps(PytorchOOD("KNN", k=5))).needs_fit


@needs_pytorch_ood
def test_before_it_is_fitted() -> None:
    unfitted = PytorchOOD("KNN", k=5)
    assert unfitted.needs_fit
    assert "has not been fitted yet; call fit with in-distribution inputs" in message_of(
        scored, unfitted, torch.ones(2, 3)
    )
    values, tensors = unfitted.state()
    assert tensors == {}
    assert find_score(unfitted.name).with_state(values, tensors).needs_fit
    first = unfitted.fit(readings(*clusters(90, seed=0)))
    assert unfitted.needs_fit
    second = first.fit(readings(*clusters(90, seed=4)))
    new = clusters(20, seed=1)[0]
    assert not torch.equal(scored(first, new), scored(second, new))


@needs_pytorch_ood
def test_batches_change_nothing() -> None:
    (train, labels), (new, _) = clusters(90, seed=0), clusters(20, seed=1)
    for name in ("KNN", "ViM", "Mahalanobis"):
        made = PytorchOOD(name, **OPTIONS.get(name, {}))
        whole, parts = made.fit(readings(train, labels)), made.fit(iter(readings(train, labels, batch=7)))
        assert torch.equal(scored(whole, new), scored(parts, new))
        one_by_one = torch.cat([scored(whole, row[None]) for row in new])
        torch.testing.assert_close(one_by_one, scored(whole, new), rtol=1e-4, atol=1e-5)
        assert scored(whole, new[:0]).shape == (0,)


@needs_pytorch_ood
def test_labels_are_read_where_classes_are_compared() -> None:
    train, labels = clusters(90, seed=0)
    new = clusters(20, seed=1)[0]
    for name, reads_labels in DETECTORS.items():
        made = PytorchOOD(name, **OPTIONS.get(name, {}))
        unlabelled = readings(train, torch.where(labels == 1, -1, labels))
        if reads_labels:
            message = message_of(made.fit, unlabelled)
            assert "compares classes, and 30 of 90 inputs have no label" in message
            assert "fit it on labelled inputs, such as an ImageSource with class_names, or take one without" in message
        else:
            assert torch.equal(scored(made.fit(unlabelled), new), scored(made.fit(readings(train, labels)), new))


@needs_pytorch_ood
@pytest.mark.parametrize("name", ["Mahalanobis", "RMD", "GMM"])
def test_a_class_without_inputs_has_no_centre(name: str) -> None:
    train, labels = clusters(90, seed=0)
    new = clusters(20, seed=1)[0]
    seen = labels != 1
    numbered = torch.where(labels[seen] == 2, 1, 0)
    with_gap = PytorchOOD(name).fit(readings(train[seen], labels[seen]))
    assert torch.equal(scored(with_gap, new), scored(PytorchOOD(name).fit(readings(train[seen], numbered)), new))


@needs_pytorch_ood
def test_the_classifier_is_the_models() -> None:
    """With the bias where there is one, and zeros where there is none."""
    (train, labels), (new, _) = clusters(90, seed=0), clusters(20, seed=1)
    weight = classifier().weight
    without = PytorchOOD("ViM", d=6).fit(readings(train, labels, ClassWeights(weight)))
    of_zeros = PytorchOOD("ViM", d=6).fit(readings(train, labels, ClassWeights(weight, torch.zeros(CLASSES))))
    assert torch.equal(scored(without, new), scored(of_zeros, new))
    assert not torch.equal(scored(without, new), scored(fitted("ViM"), new))
    bare = [reading._replace(classes=None) for reading in readings(train, labels)]
    assert "reads the classifier; give readings with classes" in message_of(PytorchOOD("ViM", d=6).fit, bare)
    assert PytorchOOD("KNN", k=5).fit(bare).state()[1].keys() == {"features", "labels"}


@needs_pytorch_ood
def test_names_hold_the_options() -> None:
    made = PytorchOOD("KNN", k=5, normalize=False)
    assert made.name == "pytorch_ood:KNN(k=5, normalize=False)"
    for same in (
        find_score(made.name),
        PytorchOOD("KNN(k=5, normalize=False)"),
        PytorchOOD("KNN(k=5)", normalize=False),
    ):
        assert isinstance(same, PytorchOOD)
        assert (same.name, same.options) == (made.name, made.options)
    assert find_score("pytorch_ood:Mahalanobis").name == "pytorch_ood:Mahalanobis"


@needs_pytorch_ood
@pytest.mark.parametrize("wrong", ["Knn", "MCM", "ASH", "ODIN", "Energy", "SHE"])
def test_detectors_of_other_things_are_refused(wrong: str) -> None:
    message = message_of(PytorchOOD, wrong)
    assert f"pytorch-ood's detector is {wrong!r}; write one of" in message
    assert "'KNN'" in message
    assert "one feature vector an input" in message


@pytest.mark.parametrize("wrong", ["", "KNN(5)", "KNN(k=open())", "KNN; 1", "a.KNN", "KNN(**x)", None, 3])
def test_names_that_are_none(wrong: Any) -> None:
    message = message_of(PytorchOOD, wrong)
    assert f"pytorch-ood's detector is {wrong!r}; write its name, such as 'KNN', or 'KNN(k=5)'" in message


@needs_pytorch_ood
def test_wrong_options() -> None:
    assert "pytorch-ood's KNN takes no option kk; it has k, normalize" in message_of(PytorchOOD, "KNN", kk=5)
    assert "takes no option algorithm" in message_of(PytorchOOD, "KNN", algorithm="brute")
    assert "takes no option w; it has d" in message_of(PytorchOOD, "ViM", d=3, w=1)
    assert "Mahalanobis takes no option k; it has none" in message_of(PytorchOOD, "Mahalanobis", k=3)
    assert "pytorch-ood's ViM needs the option d: PytorchOOD('ViM', d=...)" in message_of(PytorchOOD, "ViM")
    assert "The option k of pytorch-ood's KNN is [5]; give a number" in message_of(PytorchOOD, "KNN", k=[5])
    assert "The option reg of pytorch-ood's GMM is inf" in message_of(PytorchOOD, "GMM", reg=float("inf"))
    message = message_of(fitted, "KNN", k=91)
    assert "pytorch-ood's KNN cannot be fitted on features (90, 12) of 1 classes (ValueError: k=91 exceeds" in message
    assert "cannot be fitted on features (90, 12)" in message_of(fitted, "ReAct", percentile=90)
    for wrong in (0, 12, 13):
        assert f"has d={wrong} for features of 12; give 1 to 11" in message_of(fitted, "ViM", d=wrong)
    assert "has no setting 'temperature'; it has none" in message_of(
        PytorchOOD("KNN").fit, readings(*clusters(90, seed=0)), temperature=1.0
    )


@needs_pytorch_ood
def test_what_cannot_be_fitted_or_scored() -> None:
    assert "is fitted on in-distribution inputs, and there are none" in message_of(PytorchOOD("KNN").fit, [])
    message = message_of(scored, fitted("KNN"), torch.ones(2, 7))
    assert "was fitted on features of 12, and these are of 7" in message
    labels = clusters(90, seed=0)[1]
    nothing = torch.zeros(90, WIDTH)
    assert "gives no finite score for what it was fitted on" in message_of(
        PytorchOOD("NCI").fit, readings(nothing, labels)
    )


@needs_pytorch_ood
def test_it_cannot_be_exported() -> None:
    """Instead of the scores of the example for every input."""

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = fitted("KNN")

        def forward(self, features: Tensor) -> Tensor:
            return scored(self.score, features)

    with pytest.raises(ValueError, match=r"KNN\(k=5\) is computed by pytorch-ood and not by torch alone"):
        torch.export.export(Graph(), (clusters(4, seed=1)[0],))


@needs_pytorch_ood
def test_a_damaged_state_is_refused() -> None:
    detector = fitted("ViM")
    values, tensors = detector.state()
    restore = PytorchOOD("ViM", d=6).with_state
    assert "This is no state of pytorch_ood:ViM(d=6): it has nothing" in message_of(restore, {}, {})
    without = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    assert "bias, detector, features, labels, options, version, weight are needed" in message_of(
        restore, values, without
    )
    assert "but of ViM with the options {'d': 5}" in message_of(restore, {**values, "options": {"d": 5}}, tensors)
    assert "but of KNN with" in message_of(restore, {**values, "detector": "KNN"}, tensors)
    broken = {**tensors, "features": tensors["features"][:, :7]}
    assert "pytorch-ood's ViM cannot be fitted on features (90, 7)" in message_of(restore, values, broken)


@needs_pytorch_ood
def test_another_version_is_said() -> None:
    detector, new = fitted("KNN"), clusters(20, seed=1)[0]
    values, tensors = detector.state()
    with pytest.warns(
        UserWarning, match=r"saved with pytorch-ood 0\.0\.1 and is fitted again with .*fit the threshold"
    ):
        loaded = PytorchOOD("KNN", k=5).with_state({**values, "version": "0.0.1"}, tensors)
    assert torch.equal(score(loaded, *readings(new, new[:, 0])[0][:2]), scored(detector, new))


def test_without_pytorch_ood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch_ood"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (lambda: PytorchOOD("KNN"), lambda: find_score("pytorch_ood:KNN")):
        message = message_of(call)
        assert "pytorch-ood is not installed: pip install setar-peft[pytorch-ood]" in message
        assert "pip install --no-deps pytorch-ood to leave torch as it is" in message


def test_with_a_broken_pytorch_ood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch_ood"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "pytorch_ood" / "detector"
    package.mkdir(parents=True)
    (tmp_path / "pytorch_ood" / "__init__.py").write_text("raise AssertionError('not to be run')")
    (package / "__init__.py").write_text("import a_module_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    message = message_of(PytorchOOD, "KNN")
    assert "pytorch-ood cannot be imported (No module named 'a_module_that_is_missing')" in message
    assert not [name for name in sys.modules if name.partition(".")[0] == "pytorch_ood"]


@needs_pytorch_ood
def test_the_detectors_come_without_torchvision() -> None:
    """And pytorch-ood itself is not taken for imported afterwards."""
    code = """
import sys
sys.modules["torchvision"] = None
from setar_peft.detection.external import PytorchOOD
PytorchOOD("KNN")
assert "pytorch_ood" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert external._detectors() is sys.modules["pytorch_ood.detector"]


@needs_pytorch_ood
def test_a_detector_decides_by_it(load_clip: Callable[..., Any], processor: Any, class_names: list[str]) -> None:
    """On half of the ID images it is fitted, on the other half the threshold."""
    images = pictures(40)
    for made in (PytorchOOD("KNN", k=5), PytorchOOD("ViM", d=4)):
        detector = OODDetector(load_clip(), processor, class_names, made, batch_size=7)
        with pytest.warns(UserWarning, match="20 ID inputs are few"):
            detector.fit(images)
        found = detector.scores(images)["score"]
        assert np.isfinite(found).all()
        assert detector(images[1]).score == pytest.approx(float(found[1]), rel=1e-3)
        if made.detector == "KNN":
            features = detector.features(images)["features"].astype(np.float64)
            # In float32 an image's distance to itself is only nearly 0.
            np.testing.assert_allclose(found, -knn(features[::2], features[::2, 0], features), rtol=1e-3, atol=2e-3)


@needs_pytorch_ood
def test_a_detector_gives_it_the_labels(
    load_clip: Callable[..., Any], processor: Any, class_names: list[str], tmp_path: Path
) -> None:
    """Of a source that has them; of images alone there are none, which is said."""
    for number, name in enumerate(class_names[:3]):
        written(tmp_path / name, 8, seed=number)
    detector = OODDetector(load_clip(), processor, class_names, PytorchOOD("Mahalanobis"), batch_size=7)
    with pytest.warns(UserWarning, match="12 ID inputs are few"):
        detector.fit(ImageSource(processor, tmp_path, class_names=class_names[:3]))
    features = detector.features(tmp_path)["features"].astype(np.float64)
    centres = [features[start : start + 8 : 2].mean(0) for start in (0, 8, 16)]
    residual = np.concatenate(
        [features[start : start + 8 : 2] - c for start, c in zip((0, 8, 16), centres, strict=True)]
    )
    precision = np.linalg.inv(residual.T @ residual + 1e-6 * np.eye(features.shape[1]))
    difference = features[:, None] - np.stack(centres)[None]
    distance = np.einsum("ncd,de,nce->nc", difference, precision, difference).min(1) / 2
    np.testing.assert_allclose(detector.scores(tmp_path)["score"], -distance, rtol=0.05)
    with pytest.raises(ValueError, match="compares classes, and 12 of 12 inputs have no label"):
        detector.fit(pictures(24))
