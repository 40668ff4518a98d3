"""A detector's files: exact when they are read again, and every damage is a sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from setar_peft.backbones import ClassWeights
from setar_peft.hub.detector_files import DetectorFiles, SavedThreshold, detector_folder

JSON, TENSORS = "detector.json", "detector.safetensors"
NAMES = ["cat", "dog", "frog", "Ω & 船"]


def sample(**changes: Any) -> DetectorFiles:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, generator=generator)
    values: dict[str, Any] = {
        "kind": "image",
        "class_names": NAMES,
        "class_keys": None,
        "prompt": "a photo of a {class}",
        "negative_labels": ["stone", "river"],
        "score": "gl_mcm",
        "settings": {"temperature": float(torch.tensor(4.6052).exp()), "pooling": "patch", "local_weight": 0.1 + 0.2},
        "unfitted": {"layers": "auto"},
        "state": {"layers": [3, 5], "bins": 1e-300},
        "preprocessing": {"do_resize": True, "size": {"shortest_edge": 28}, "image_mean": [0.1, 1 / 3, 5e-324]},
        "model_type": "clip",
        "model_class": "CLIPModel",
        "dtype": "float32",
        "attention": "sdpa",
        "base_sha256": "0" * 64,
        "adapter_sha256": "a" * 64,
        "batch_size": 64,
        "versions": {"torch": "2.13.0"},
        "class_weights": ClassWeights(
            torch.randn(4, 6, generator=generator),
            torch.randn(4, generator=generator),
            torch.tensor(4.6052).exp(),
            torch.randn(2, 6, generator=generator),
        ),
        # ceil(0.95 * 40) = 38.
        "threshold": SavedThreshold(float(scores.sort(descending=True).values[37]), 0.95, 40, (0.87, 0.99), 0.95),
        "id_scores": scores,
        "state_tensors": {"bank": torch.randn(5, 6, generator=generator), "labels": torch.arange(5)},
    }
    return DetectorFiles(**{**values, **changes})


def saved(folder: Path, files: DetectorFiles | None = None) -> Path:
    """A folder with an adapter, a processor and a detector."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "SETAR"}')
    (folder / "adapter_model.safetensors").write_bytes(save({"x": torch.ones(3)}))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "README.md").write_text("# Mine\n")
    (files or sample()).write(folder)
    return folder


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, item.name), getattr(other, item.name)) for item in dataclasses.fields(one))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


CASES: dict[str, dict[str, Any]] = {
    "fitted": {},
    "what the data call the classes": {"class_keys": ["n1", None, "n3", "n4"]},
    "unfitted": {"threshold": None, "id_scores": None},
    "set by hand": {"threshold": SavedThreshold(0.1 + 0.2, None, 0, None, 0.95), "id_scores": None},
    "set by hand after a fit": {"threshold": SavedThreshold(0.1 + 0.2, None, 0, None, 0.95)},
    "one prompt a class": {"prompt": [f"one {name}" for name in NAMES]},
    "a classifier": {
        "prompt": None,
        "negative_labels": [],
        "adapter_sha256": None,
        "class_weights": ClassWeights(torch.eye(4), torch.zeros(4), 1.0),
    },
    "a text classifier": {"kind": "text", "prompt": None, "state": {}, "state_tensors": {}, "settings": {}},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_was_written(case: str, tmp_path: Path) -> None:
    files = sample(**CASES[case])
    assert same(files, DetectorFiles.read(saved(tmp_path, files)))
    # Once more, from what was read.
    again = tmp_path / "again"
    DetectorFiles.read(tmp_path).write(again)
    assert same(files, DetectorFiles.read(again))
    assert (again / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()


def test_views_of_one_tensor_can_be_written(tmp_path: Path) -> None:
    both = torch.randn(6, 5)
    files = sample(class_weights=ClassWeights(both[:4], None, 1.0, both[4:]), state_tensors={"bank": both.T})
    files.write(tmp_path)
    assert same(files, DetectorFiles.read(tmp_path))


def test_the_card_may_be_written_further_and_a_detector_saved_anew(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "README.md").write_text("# Other\n")
    (tmp_path / "notes.txt").write_text("later")
    assert DetectorFiles.read(tmp_path).class_names == NAMES
    sample(class_names=["a", "b", "c", "d"]).write(tmp_path)
    assert DetectorFiles.read(tmp_path).class_names == ["a", "b", "c", "d"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


REFUSED_ON_WRITING: dict[str, tuple[dict[str, Any], str]] = {
    "a setting that is no number": ({"settings": {"temperature": math.inf}}, "temperature is inf, which cannot be"),
    "a setting that is a function": ({"settings": {"of": len}}, "of is <built-in function len>, which cannot be"),
    "a state that is a tensor": ({"state": {"a": torch.ones(1)}}, r"a is tensor\(\[1.\]\), which cannot be written"),
    "preprocessing with a type": (
        {"preprocessing": {"resample": int}},
        "the preprocessing: resample is <class 'int'>, which cannot",
    ),
    "too many classes": ({"class_names": [*NAMES, "e"]}, r"weight has shape \(4, 6\), and \(5, d\) belongs there"),
    "a threshold on other scores": (
        {"threshold": SavedThreshold(0.3, 0.95, 41, (0.8, 0.9), 0.95)},
        "the threshold was found on 41 scores, and 40 are here",
    ),
    "a threshold that is no number": (
        {"threshold": SavedThreshold(math.nan, 0.95, 40, (0.8, 0.9), 0.95)},
        "the detector, threshold: value is nan, and a finite number belongs there",
    ),
    "half a threshold": (
        {"threshold": SavedThreshold(0.3, None, 40, (0.8, 0.9), 0.95)},
        "some of tpr, n and interval, which go together",
    ),
    "NaN in the bank": (
        {"class_weights": ClassWeights(torch.full((4, 6), torch.nan), None, 1.0, torch.ones(2, 6))},
        "weight does not hold finite values",
    ),
    "a scale of nothing": (
        {"class_weights": ClassWeights(torch.ones(4, 6), None, 0.0, torch.ones(2, 6))},
        "scale is 0.0; a logit scale is positive",
    ),
}


@pytest.mark.parametrize("case", REFUSED_ON_WRITING)
def test_what_cannot_be_read_again_is_not_written(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED_ON_WRITING[case]
    saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        sample(**changes).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match=message):
        sample(**changes).write(tmp_path / "new" / "one")
    assert not (tmp_path / "new").exists()


# Damages: what is done to the folder, and what is said.
Damage = tuple[str, Callable[[Path], Any], str]


def rewritten(change: Callable[[dict[str, Any]], Any], *, signed: bool = True) -> Callable[[Path], None]:
    """`detector.json` with something changed; signed: its digest is brought up to date, as by someone who knows how."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / JSON).read_text())
        change(document)
        if signed and "sha256" in document:
            values = {key: value for key, value in document.items() if key != "sha256"}
            document["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        (folder / JSON).write_text(json.dumps(document))

    return damage


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load((folder / TENSORS).read_bytes())
        change(tensors)
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        (folder / TENSORS).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        rewritten(lambda document: document["files"].__setitem__(TENSORS, digest))(folder)

    return damage


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def cut_and_flipped() -> Iterator[Damage]:
    for name in (JSON, TENSORS, "adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json"):
        yield f"{name} is gone", lambda folder, name=name: (folder / name).unlink(), f"has no {name}"
        yield f"{name} is empty", bytes_of(name, lambda _: b""), name
        yield f"{name} is cut", bytes_of(name, lambda data: data[: len(data) // 2]), name
        yield f"{name} is cut by one", bytes_of(name, lambda data: data.rstrip(b"\n")[:-1]), name
        for at in (0, 1, -2):
            yield f"{name} has another byte {at}", bytes_of(name, flipped(at % 2 if at >= 0 else at)), name
    for at in range(150, 2400, 211):
        yield f"{JSON} has another byte {at}", bytes_of(JSON, lambda data, at=at: flipped(at % len(data))(data)), JSON
    yield (
        "an adapter of another",
        bytes_of("adapter_model.safetensors", lambda _: save({"x": torch.zeros(3)})),
        "adapter_model.safetensors is not the file that was saved with detector.json",
    )


def unsigned() -> Iterator[Damage]:
    def swap(document: dict[str, Any]) -> None:
        names = document["class_names"]
        names[0], names[1] = names[1], names[0]

    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "classes swapped": swap,
        "another threshold": lambda document: document["threshold"].__setitem__("value", 0.5),
        "another temperature": lambda document: document["settings"].__setitem__("temperature", 1.0),
        "another score": lambda document: document.__setitem__("score", "mcm"),
        "another prompt": lambda document: document.__setitem__("prompt", "a drawing of a {class}"),
        "other pixels": lambda document: document["preprocessing"].__setitem__("do_resize", False),
        "no adapter": lambda document: document.__setitem__("adapter_sha256", None),
        "an interval": lambda document: document["threshold"].__setitem__("interval", [0.9, 0.91]),
        "fewer files": lambda document: document["files"].pop("adapter_model.safetensors"),
    }
    for name, change in changes.items():
        yield name, rewritten(change, signed=False), "detector.json was changed after it was saved"


def signed() -> Iterator[Damage]:
    for key in json.loads(json.dumps(sample()._values())):
        yield f"no {key}", rewritten(lambda document, key=key: document.pop(key)), f"detector.json lacks {key}"
        for value in (-5, True, [1], {"a": float("nan")}):
            change = rewritten(lambda document, key=key, value=value: document.__setitem__(key, value))
            yield f"{key} is {value}", change, "detector.json"
    for key in ("format", "files", "sha256"):
        yield f"no {key}", rewritten(lambda document, key=key: document.pop(key)), f"detector.json lacks {key}"
    yield "a key more", rewritten(lambda d: d.__setitem__("extra", 1)), "detector.json has extra, which is unknown"
    yield "newer", rewritten(lambda d: d.__setitem__("format", 2)), "has the format 2, and this version .* reads 1: upd"
    yield "newer, with more keys", rewritten(lambda d: d.update(format=3, more=1)), "has the format 3, and this version"
    for value in (0, -1, 1.0, "1", None, True):
        yield f"format {value!r}", rewritten(lambda d, v=value: d.__setitem__("format", v)), "format is"
    for key in ("value", "tpr", "n", "interval", "confidence"):
        yield (
            f"threshold without {key}",
            rewritten(lambda d, key=key: d["threshold"].pop(key)),
            f"detector.json, threshold lacks {key}",
        )
    for key, value in [
        ("tpr", None),
        ("interval", None),
        ("value", float("nan")),
        ("value", "0.5"),
        ("tpr", 0),
        ("tpr", 1.5),
        ("n", 39),
        ("n", 41),
        ("n", 0),
        ("n", 40.0),
        ("interval", [0.9]),
        ("interval", [0.9, 0.8]),
        ("interval", [-1, 2]),
        ("confidence", 1),
    ]:
        change = rewritten(lambda d, key=key, value=value: d["threshold"].__setitem__(key, value))
        yield f"threshold {key} is {value!r:.9}", change, "detector"
    yield "a class more", rewritten(lambda d: d["class_names"].append("e")), r"weight has shape \(4, 6\), and \(5, d\)"
    yield "a class less", rewritten(lambda d: d["class_names"].pop()), r"weight has shape \(4, 6\), and \(3, d\)"
    yield "a prompt less", rewritten(lambda d: d.__setitem__("prompt", ["a", "b"])), "there are 2 prompts for 4 classes"
    yield "a key less", rewritten(lambda d: d.__setitem__("class_keys", ["a", None])), "2 keys for 4 classes"
    yield "no class in it", rewritten(lambda d: d.__setitem__("prompt", "a photo")), "prompt is 'a photo', and a text"
    yield (
        "a negative less",
        rewritten(lambda d: d["negative_labels"].pop()),
        r"negative has shape \(2, 6\), and \(1, 6\)",
    )
    yield "no negatives", rewritten(lambda d: d.__setitem__("negative_labels", [])), "there is negative, and nothing"
    for name in ("../up", "/etc/passwd", "", "a/b", ".."):
        change = rewritten(lambda d, name=name: d["files"].__setitem__(name, "0" * 64))
        yield f"file {name!r}", change, "files is .*, and names of files and their SHA-256"
    for text in ("", "5", "[]", "null", "{", '{"format": 1}', "[" * 100_000, '{"a": NaN}', "\x00"):
        yield f"{text[:9]!r}", lambda folder, text=text: (folder / JSON).write_text(text), "detector.json"
    yield "latin-1", lambda folder: (folder / JSON).write_bytes(b'{"\xe9": 1}'), "detector.json is not readable as JSON"
    deep = "[" * 400 + "]" * 400
    yield (
        "deep",
        lambda folder: (folder / JSON).write_text(
            (folder / JSON).read_text().replace('"bins": 1e-300', f'"b": {deep}')
        ),
        "state is .*, and named plain values",
    )


def tensors() -> Iterator[Damage]:
    for name in ("weight", "scale", "id_scores", "negative"):
        yield f"no {name}", with_tensors(lambda all_, name=name: all_.pop(name)), "lacks|is missing|and 0 are here"
    yield "a tensor more", with_tensors(lambda all_: all_.__setitem__("x", torch.ones(1))), "has x, which is unknown"
    for name in ("weight", "bias", "scale", "negative", "id_scores", "score.bank"):
        for value in (torch.nan, torch.inf):
            change = with_tensors(lambda all_, name=name, value=value: all_[name].view(-1)[-1:].fill_(value))
            yield f"{name} with {value}", change, f"{name} does not hold finite values|scale is nan"
    for name in ("weight", "bias", "scale", "negative", "id_scores"):
        change = with_tensors(lambda all_, name=name: all_.__setitem__(name, all_[name][None]))
        yield f"{name} of another shape", change, f"{name} has shape"
        change = with_tensors(lambda all_, name=name: all_.__setitem__(name, all_[name].to(torch.int32)))
        yield f"{name} of another dtype", change, f"{name} has dtype torch.int32"
    yield "a row less", with_tensors(lambda all_: all_.__setitem__("weight", all_["weight"][1:])), "weight has shape"
    yield "transposed", with_tensors(lambda all_: all_.__setitem__("weight", all_["weight"].T)), "weight has shape"
    yield "a negative scale", with_tensors(lambda all_: all_["scale"].neg_()), "a logit scale is positive"
    yield (
        "a score less",
        with_tensors(lambda all_: all_.__setitem__("id_scores", all_["id_scores"][1:])),
        "found on 40 scores, and 39 are",
    )

    def header(folder: Path) -> None:
        data = struct.pack("<Q", 2**40) + b"{}"
        (folder / TENSORS).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        rewritten(lambda document: document["files"].__setitem__(TENSORS, digest))(folder)

    yield "a bad header", header, "detector.safetensors is no file of tensors"


DAMAGES = [*cut_and_flipped(), *unsigned(), *signed(), *tensors()]


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("detector"))


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_damage_is_a_sentence(damage: Callable[[Path], Any], message: str, undamaged: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(undamaged, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        DetectorFiles.read(folder)
    assert 40 < len(str(caught.value)) < 1000
    assert "UnicodeDecodeError" not in caught.typename


def test_many_were_tried() -> None:
    assert len(DAMAGES) >= 150


def test_what_is_no_detector(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no detector\.json, so that it is no saved detector; give the folder"):
        DetectorFiles.read(tmp_path)
    assert detector_folder(tmp_path) == tmp_path
    for name in (tmp_path / "missing", "user/nothing", "", "a/b/c", "./here"):
        with pytest.raises(ValueError, match=r"There is no detector .*no such folder is here, and the Hub gave none"):
            detector_folder(name)
