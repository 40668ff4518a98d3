"""The two files that make a detector of a model's folder: `detector.json` and `detector.safetensors`, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from setar_peft.backbones import ClassWeights
from setar_peft.hub.detector_schema import AGAIN, FORMAT, check_document, check_plain
from setar_peft.hub.digests import facts_digest
from setar_peft.tuner.adapter_file import file_digest
from setar_peft.writing import whole_files

DETECTOR_NAME = "detector.json"
TENSORS_NAME = "detector.safetensors"
# A base's weights have a digest of their own, and a card may be written further.
_WITHOUT_DIGEST = ("README.md", ".gitattributes", DETECTOR_NAME)
_WEIGHTS = ("model.safetensors", "model-*.safetensors")
_STATE = "score."


@dataclass(frozen=True)
class SavedThreshold:
    """A threshold and what it rests on: see `setar_peft.detection.threshold.Threshold`, whose fields these are.

    Attributes:
        value: A score of this or more is in-distribution.
        tpr: The level that it was found for, in (0, 1]; None for one set by hand.
        n: In-distribution inputs that it was found on; 0 for one set by hand.
        interval: Bounds of the TPR that will be realised; None for one set by hand.
        confidence: How sure these bounds are, in (0, 1).
    """

    value: float
    tpr: float | None
    n: int
    interval: tuple[float, float] | None
    confidence: float


@dataclass(frozen=True)
class DetectorFiles:
    """A detector as it is saved, beside its model or adapter: plain values, and tensors.

    Attributes:
        kind: "image" or "text": what is classified.
        class_names: Names of the classes.
        class_keys: What labelled data call each class, None for one that they do not have; None alone where that is its
            name.
        prompt: Text with "{class}" in it, or one text a class; None where there are no prompts.
        negative_labels: Words that name none of the classes; may be empty.
        score: Name of the score.
        settings: Every setting of the score, by name, with the temperature in use.
        unfitted: How the score was made, as plain values, for a score that has to be fitted itself.
        state: That, and what it has found out.
        preprocessing: Settings of the image processor or tokenizer.
        model_type: The base's family in transformers.
        model_class: The base's class in transformers.
        dtype: Of the base's weights, such as "float32".
        attention: How the base computes its attention, such as "sdpa": its last digits depend on it.
        base_sha256: `model_digest` of the base.
        adapter_sha256: `adapter_digest` of the adapter; None without one.
        batch_size: Inputs a batch, on which the last digits of a score depend.
        versions: Name -> version, of what the detector was made with.
        class_weights: The classes as rows, and the negative labels.
        threshold: None where the detector was not fitted.
        id_scores: The scores that a threshold was found on, (n,) float32; None where there are none.
        state_tensors: What a fitted score has found out, as tensors.
    """

    kind: str
    class_names: Sequence[str]
    class_keys: Sequence[str | None] | None
    prompt: str | Sequence[str] | None
    negative_labels: Sequence[str]
    score: str
    settings: Mapping[str, Any]
    unfitted: Mapping[str, Any]
    state: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    model_type: str
    model_class: str
    dtype: str
    attention: str
    base_sha256: str
    adapter_sha256: str | None
    batch_size: int
    versions: Mapping[str, str]
    class_weights: ClassWeights
    threshold: SavedThreshold | None = None
    id_scores: Tensor | None = None
    state_tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def write(self, folder: str | Path) -> None:
        """Write both files, together or not at all, and with them the digests of what else is in the folder.

        Whoever changes another file of the folder afterwards, but its card, has another detector, which `read` refuses.

        Raises:
            ValueError: If a value cannot be written or the values do not fit each other; nothing is written then.
        """
        check_plain("the score's settings", self.settings)
        check_plain("the score's state", {**self.unfitted, **self.state})
        check_plain("the preprocessing", self.preprocessing)
        # Copies: views of one tensor are refused by safetensors.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._tensors().items()
        }
        self.check("the detector")
        data = save(tensors)
        with whole_files(folder) as unfinished:
            digests = {**_digests(Path(folder)), TENSORS_NAME: hashlib.sha256(data).hexdigest()}
            document = {"format": FORMAT, **self._values(), "files": digests, "sha256": "0" * 64}
            check_document(document, "the detector")
            document["sha256"] = _own_digest(document)
            (unfinished / TENSORS_NAME).write_bytes(data)
            text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
            (unfinished / DETECTOR_NAME).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> DetectorFiles:
        """Read both files and check them, and every file of the folder that they name.

        Raises:
            ValueError: If a file is missing, damaged, of a newer format, or does not belong to the others.
        """
        folder = Path(folder)
        path = folder / DETECTOR_NAME
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {DETECTOR_NAME}, so that it is no saved detector; give the folder that "
                "OODDetector.save_pretrained wrote."
            )
        document = _read_json(path)
        check_document(document, str(path))
        if document["sha256"] != _own_digest(document):
            raise ValueError(
                f"{path} was changed after it was saved: its own digest is another one. A threshold holds for the "
                f"score, temperature, prompt and classes that it was found with. {AGAIN}"
            )
        _check_digests(folder, document["files"])
        try:
            # Copies lie in memory as what torch makes does; the last digits of a product depend on it.
            tensors = {name: tensor.clone() for name, tensor in load((folder / TENSORS_NAME).read_bytes()).items()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{folder / TENSORS_NAME} is no file of tensors ({error}). {AGAIN}") from error
        files = _from(document, tensors, str(folder / TENSORS_NAME))
        files.check(str(folder))
        return files

    def check(self, where: str) -> None:
        """Check that values and tensors fit each other.

        Raises:
            ValueError: If they do not; the message says which.
        """
        weight, bias, scale, negative = self.class_weights
        classes = len(self.class_names)
        _check_tensor(where, "weight", weight, (classes, None))
        _check_tensor(where, "bias", bias, (classes,), may_miss=True)
        _check_tensor(where, "scale", torch.as_tensor(scale), ())
        if not float(scale) > 0:
            raise ValueError(f"{where}: scale is {float(scale)}; a logit scale is positive. {AGAIN}")
        count = len(self.negative_labels)
        _check_tensor(where, "negative", negative, (count, weight.shape[1]), may_miss=not count)
        for named, given in (("prompts", self.prompt), ("keys", self.class_keys)):
            if not isinstance(given, (str, type(None))) and len(given) != classes:
                raise ValueError(f"{where}: there are {len(given)} {named} for {classes} classes. {AGAIN}")
        if self.id_scores is not None:
            _check_tensor(where, "id_scores", self.id_scores, (None,))
        found, known = getattr(self.threshold, "n", 0), 0 if self.id_scores is None else len(self.id_scores)
        if found and found != known:
            raise ValueError(f"{where}: the threshold was found on {found} scores, and {known} are here. {AGAIN}")
        for name, tensor in self.state_tensors.items():
            _check_tensor(where, f"{_STATE}{name}", tensor, None)

    def _values(self) -> dict[str, Any]:
        threshold = None
        if self.threshold is not None:
            interval = self.threshold.interval
            threshold = {**vars(self.threshold), "interval": None if interval is None else list(interval)}
        prompt = self.prompt if isinstance(self.prompt, (str, type(None))) else list(self.prompt)
        return {
            "kind": self.kind,
            "class_names": list(self.class_names),
            "class_keys": None if self.class_keys is None else list(self.class_keys),
            "prompt": prompt,
            "negative_labels": list(self.negative_labels),
            "score": self.score,
            "settings": dict(self.settings),
            "unfitted": dict(self.unfitted),
            "state": dict(self.state),
            "threshold": threshold,
            "preprocessing": dict(self.preprocessing),
            "model_type": self.model_type,
            "model_class": self.model_class,
            "dtype": self.dtype,
            "attention": self.attention,
            "base_sha256": self.base_sha256,
            "adapter_sha256": self.adapter_sha256,
            "batch_size": self.batch_size,
            "versions": dict(self.versions),
        }

    def _tensors(self) -> dict[str, Tensor]:
        id_scores = {} if self.id_scores is None else {"id_scores": self.id_scores}
        state = {f"{_STATE}{name}": tensor for name, tensor in self.state_tensors.items()}
        return {**self.class_weights.tensors(), **id_scores, **state}


def detector_folder(name_or_path: str | Path, **hub_settings: Any) -> Path:
    """The folder of a saved detector: the one that is given, or a copy of the one on the Hub.

    Args:
        name_or_path: Folder, or a Hub name.
        hub_settings: For `huggingface_hub.snapshot_download`, such as `revision` or `token`.

    Raises:
        ValueError: If there is neither, or the Hub could not be asked.
    """
    if str(name_or_path) and Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return Path(snapshot_download(str(name_or_path), **hub_settings))
    except (OSError, HFValidationError, ValueError) as error:
        raise ValueError(
            f"There is no detector {str(name_or_path)!r}: no such folder is here, and the Hub gave none "
            f"({(str(error).strip() or type(error).__name__).splitlines()[0]}). Give the folder that "
            "OODDetector.save_pretrained wrote, or a Hub name."
        ) from error


def _from(document: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> DetectorFiles:
    values = {key: value for key, value in document.items() if key not in ("format", "files", "sha256")}
    threshold = values["threshold"]
    if threshold is not None:
        interval = threshold["interval"]
        interval = None if interval is None else tuple(interval)
        values["threshold"] = SavedThreshold(**{**threshold, "interval": interval})
    state = {name.removeprefix(_STATE): tensors.pop(name) for name in sorted(tensors) if name.startswith(_STATE)}
    named = {name: tensors.pop(name, None) for name in ("weight", "bias", "scale", "negative", "id_scores")}
    missing = [name for name in ("weight", "scale") if named[name] is None]
    if missing or tensors:
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(sorted(tensors))}, which is unknown"
        raise ValueError(f"{where} {what}. {AGAIN}")
    scale: Any = named["scale"]
    if scale.dtype == torch.float64 and scale.numel() == 1:
        scale = float(scale)
    class_weights = ClassWeights(named["weight"], named["bias"], scale, named["negative"])  # type: ignore[arg-type]
    return DetectorFiles(**values, class_weights=class_weights, id_scores=named["id_scores"], state_tensors=state)


def _check_tensor(
    where: str, name: str, tensor: Tensor | None, shape: tuple[int | None, ...] | None, *, may_miss: bool = False
) -> None:
    if tensor is None and may_miss:
        return
    if tensor is None:
        raise ValueError(f"{where}: {name} is missing. {AGAIN}")
    if may_miss and shape is not None and shape[0] == 0:
        raise ValueError(f"{where}: there is {name}, and nothing that it belongs to. {AGAIN}")
    given = tuple(tensor.shape)
    fits = shape is None or (
        len(given) == len(shape)
        and all(size == wanted or wanted is None for size, wanted in zip(given, shape, strict=True))
    )
    if not fits:
        assert shape is not None
        wanted = ", ".join("d" if size is None else str(size) for size in shape)
        raise ValueError(f"{where}: {name} has shape {given}, and ({wanted}) belongs there. {AGAIN}")
    if shape is not None and not tensor.is_floating_point():
        raise ValueError(f"{where}: {name} has dtype {tensor.dtype}, and floats belong there. {AGAIN}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{where}: {name} does not hold finite values. {AGAIN}")


def _read_json(path: Path) -> Any:
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}). {AGAIN}") from error


def _own_digest(document: Mapping[str, Any]) -> str:
    return facts_digest(**{key: value for key, value in document.items() if key != "sha256"})


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a detector rests on."""
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    weights = {path.name for pattern in _WEIGHTS for path in folder.glob(pattern)}
    return {name: file_digest(folder / name) for name in sorted(names - weights - {*_WITHOUT_DIGEST, TENSORS_NAME})}


def _check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}, which was saved with the detector. {AGAIN}")
        if file_digest(path) != digest:
            raise ValueError(
                f"{path} is not the file that was saved with {DETECTOR_NAME}: its SHA-256 is another one. {AGAIN}"
            )
