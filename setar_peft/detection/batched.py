"""A detector on a column of a table, batch by batch, also in other processes: for `datasets.Dataset.map` and others."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from setar_peft.detection.adapters import active_adapters, adapted_modules
from setar_peft.hub.digests import adapter_digest, facts_digest, model_digest, tensors_digest
from setar_peft.hub.processors import preprocessing_of
from setar_peft.versions import __version__

COLUMNS = ("label", "probability", "score", "is_id", "threshold", "error")


class _Detector(Protocol):
    model: Any
    folder: Any

    def __call__(self, data: Any, /) -> Any: ...

    @classmethod
    def from_pretrained(cls, folder: Any, /) -> Any: ...


# Detectors by digest. Processes that are forked from this one have them, too.
_LIVE: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_HOME = os.getpid()


class Batched:
    """Takes a batch of columns and gives a detector's verdicts as columns; see `OODDetector.on`.

    Pickled, it holds no model but the detector's digest, which is what caches tell it by, and where the detector lies.
    In another process it finds the detector again: the one that the process was forked with, or else the one in the
    folder that it was saved to or loaded from.

    Args:
        detector: The detector.
        column: Name of the column with the inputs.
        prefix: Before the names of the columns that are given.
    """

    def __init__(self, detector: _Detector, column: str, prefix: str = "") -> None:
        self._detector: _Detector | None = detector
        self._kind, self._column, self._prefix = type(detector), column, prefix

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The columns "label", "probability", "score", "is_id", "threshold" and "error" of a batch.

        Raises:
            ValueError: If the batch has no such column, or has one of those that are given already; or if the detector
                is not to be found in this process.
        """
        if self._column not in batch:
            raise ValueError(f"The batch has the columns {', '.join(batch)}, and no {self._column!r}.")
        taken = [self._prefix + name for name in COLUMNS if self._prefix + name in batch]
        if taken:
            raise ValueError(
                f"The batch has a column {taken[0]!r} of its own, which the detector's would replace; give theirs "
                f"another name, detector.on({self._column!r}, prefix='detected_'), or take yours away."
            )
        if self._detector is None:
            self._detector = self._found()
        records = self._detector(list(batch[self._column]))
        return {self._prefix + name: [getattr(record, name) for record in records] for name in COLUMNS}

    def __getstate__(self) -> dict[str, Any]:
        if self._detector is not None:
            self._digest, self._folder = detector_digest(self._detector), self._detector.folder
            _LIVE[self._digest] = self._detector
        return {
            "kind": self._kind,
            "column": self._column,
            "prefix": self._prefix,
            "digest": self._digest,
            "folder": None if self._folder is None else str(Path(self._folder).absolute()),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._detector = None
        self._kind, self._column, self._prefix = state["kind"], state["column"], state["prefix"]
        self._digest, self._folder = state["digest"], state["folder"]

    def _found(self) -> _Detector:
        """The detector that was pickled, in the process that this is now."""
        live = _LIVE.get(self._digest)
        if live is not None and detector_digest(_after_fork(live)) == self._digest:
            return live
        if self._folder is None:
            raise ValueError(
                "The detector went into another process, which cannot find it there: it was neither saved nor loaded "
                "from a folder. Call save_pretrained(folder) first, or leave out num_proc."
                if live is None
                else "The detector was given another threshold, score or model after it went into this process. Make "
                'the function anew: detector.on("...").'
            )
        detector = self._kind.from_pretrained(self._folder)
        if detector_digest(detector) != self._digest:
            raise ValueError(
                f"The detector in {self._folder} is another one than went into this process: its weights, classes, "
                "score, threshold or preprocessing are others. Save it again, save_pretrained(folder)."
            )
        return detector


def _after_fork(detector: _Detector) -> _Detector:
    """A detector of the process that this one may have been forked from, fit for use here."""
    if os.getpid() != _HOME:
        device = next(detector.model.parameters()).device
        if device.type != "cpu":
            raise ValueError(
                f"The detector's model is on {device}, which a forked process cannot use; leave out num_proc, or move "
                "the model to the CPU before the detector is made."
            )
        # As in the workers of torch's DataLoader: the threads of the process above are not here, and to wait for them
        # would be for ever.
        torch.set_num_threads(1)
    return detector


def detector_digest(detector: Any) -> str:
    """SHA-256 of what decides a detector's verdicts, in hexadecimal; equal again after it was saved and loaded.

    The model counts by its weights and active adapters, whatever those are called, and a score of one's own by its
    code.

    Args:
        detector: The detector.

    Raises:
        ValueError: If a weight is not in memory.
    """
    from datasets.fingerprint import Hasher

    score, processor = detector.score, detector.processor
    values, tensors = score.state()
    known = processor is None or hasattr(processor, "save_pretrained")
    named = detector.class_weights.tensors() | {f"score.{key}": tensor for key, tensor in tensors.items()}
    return facts_digest(
        version=__version__,
        weights=_weights(detector.model),
        tensors=tensors_digest(named),
        classes=detector.class_names,
        preprocessing=preprocessing_of(processor, detector.kind) if known else Hasher.hash(processor),
        score=[detector.score_name, detector.settings, values, Hasher.hash(_code(score))],
        threshold=detector.threshold and detector.threshold.value,
    )


def _weights(model: nn.Module) -> list[str]:
    if any(getattr(layer, "merged", False) for _, layer in adapted_modules(model)):
        return [tensors_digest(model.state_dict())]
    return [model_digest(model), *(adapter_digest(model, name) for name in active_adapters(model))]


def _code(score: Any) -> list[Any]:
    """What computes a score, and the one that it is made of."""
    inner = getattr(score, "score", None)
    return [type(score), getattr(score.function, "__func__", score.function), *([] if inner is None else _code(inner))]
