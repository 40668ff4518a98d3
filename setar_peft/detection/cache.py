"""Features and scores of a set on disk, so that an evaluation computes nothing twice.

A set, as one model reads it, is a folder: `part-*.safetensors` with the pooled features of some of its inputs, one
`values-*.safetensors` for each score and for the predictions, and `set.json`, written last, which says what is whole.
Each file carries a digest of its tensors. What is damaged is said, and computed again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from setar_peft.hub.digests import facts_digest, tensors_digest
from setar_peft.writing import whole_file

# Inputs whose features go into one file.
_ROWS = 16_384


class SetCache:
    """What one model says of one set, on disk.

    Args:
        folder: The folder of the whole cache.
        key: Of the model, the set and all that its features depend on.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / key
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._parts: list[str] = []

    @property
    def is_whole(self) -> bool:
        """Whether the features of the whole set are there."""
        found = self._manifest()
        return found is not None and all((self._folder / name).is_file() for name in found["parts"])

    @property
    def errors(self) -> dict[int, str]:
        """Number of an input that could not be read -> why."""
        found = self._manifest()
        return {} if found is None else {int(number): sentence for number, sentence in found["errors"].items()}

    def add(self, numbers: Tensor, features: Tensor, process: int) -> None:
        """Keep the features of some inputs.

        Args:
            numbers: Their places in the set, (n,) int64.
            features: (n, d) float32, on the CPU.
            process: Number of the process that computed them, for the files' names.
        """
        self._waiting.append((numbers, features.clone()))
        if sum(len(waiting) for waiting, _ in self._waiting) >= _ROWS:
            self.flush(process)

    def flush(self, process: int) -> list[str]:
        """Write what has been kept, and return the names of all files written."""
        if self._waiting:
            numbers, features = (torch.cat(columns) for columns in zip(*self._waiting, strict=True))
            name = f"part-{process:04}-{len(self._parts):06}.safetensors"
            self._save(name, {"numbers": numbers, "features": features}, {})
            self._waiting.clear()
            self._parts.append(name)
        return self._parts

    def finish(self, parts: list[str], errors: Mapping[int, str]) -> None:
        """Say that the set is whole.

        Args:
            parts: Names of the files of features of every process.
            errors: Number of an input that could not be read -> why.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self._folder / "set.json") as temporary:
            temporary.write_text(json.dumps({"parts": parts, "errors": errors}, indent=1), encoding="utf-8")

    def features(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers (n,) and features (n, d) of the set, some inputs at a time.

        Raises:
            DamagedError: If a file is damaged.
        """
        found = self._manifest()
        for name in [] if found is None else found["parts"]:
            tensors, _ = self._load(name)
            yield tensors["numbers"], tensors["features"]

    def values(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors of a score, or of the predictions, and what was said of them; None where there are none.

        Args:
            key: Of the score and all that it depends on beside the features.
        """
        name = f"values-{key}.safetensors"
        if not (self._folder / name).is_file():
            return None
        try:
            return self._load(name)
        except DamagedError as error:
            say_damaged(error)
            return None

    def save_values(self, key: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
        """Keep the tensors of a score, or of the predictions, and what is to be said of them, as plain values."""
        self._save(f"values-{key}.safetensors", tensors, said)

    def _manifest(self) -> dict[str, Any] | None:
        path = self._folder / "set.json"
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if {"parts", "errors"} <= set(found) and all(isinstance(name, str) for name in found["parts"]):
                return dict(found)
        except (OSError, ValueError, TypeError) as error:
            say_damaged(DamagedError(f"{path} ({error})"))
            return None
        say_damaged(DamagedError(str(path)))
        return None

    def _save(self, name: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(said)
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        with whole_file(self._folder / name) as temporary:
            save_file(whole, temporary, {"said": text, "digest": _digest(whole, text)})

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self._folder / name
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except Exception as error:
            raise DamagedError(f"{path} ({error})") from error
        if facts.get("digest") != _digest(tensors, facts.get("said", "")):
            raise DamagedError(f"{path} (its digest is another)")
        return tensors, json.loads(facts["said"])


class DamagedError(Exception):
    """A file of the cache is not what was written."""


def say_damaged(error: DamagedError) -> None:
    """Warn of a damaged file."""
    warnings.warn(f"A file of the cache is damaged and is computed again: {error}.", UserWarning, stacklevel=2)


def _digest(tensors: Mapping[str, Tensor], said: str) -> str:
    return facts_digest(tensors=tensors_digest(tensors), said=said)
