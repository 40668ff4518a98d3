"""What sets of images and of texts have in common: batches of what can be read, numbers and names, parts, a digest."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from setar_peft.data.labels import ClassNames

if TYPE_CHECKING:
    from typing import Self


class InputBatch(NamedTuple):
    """Some inputs as a model takes them, and why the others of their batch cannot be read.

    Attributes:
        numbers: Places in the source of the inputs that could be read, ascending.
        inputs: Pixel values, or the model's inputs by name, (b, ...) each; None where none of the batch could be read.
        labels: Class indices (b,), int64, -1 without classes.
        errors: Place in the source -> a sentence with the input's name, for each input that could not be read.
    """

    numbers: list[int]
    inputs: Tensor | Mapping[str, Tensor] | None
    labels: Tensor
    errors: dict[int, str]


class Inputs(ABC):
    """A set of inputs in a fixed order, labelled or not, read batch by batch whenever it is used.

    An input's place in the set, from 0, is what every method counts by. `numbers` says which place it has in the set
    or stream that a part was taken from.

    Attributes:
        labels: (inputs,) class indices, -1 without classes.
        classes: The classes that the labels mean; None without.
        matched: What the data call each class -> its class name; empty where the data have no names.
        batch_size: Inputs a batch.
        numbers: Number of each input in the whole set or stream, from 0.
        kind: What they are: "image", "text", or "input" where a processor has made them already.
    """

    labels: Tensor
    classes: ClassNames | None
    matched: dict[str, str]
    batch_size: int
    numbers: Sequence[int]
    kind: str
    # Number of the first input of what is held here: a part of a stream goes on counting.
    _first: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def readable_batches(self) -> Generator[InputBatch, None, None]:
        """All inputs in order, batch by batch; one that cannot be read is an error of its batch, and no exception."""

    @abstractmethod
    def shown(self, number: int) -> Image.Image | str:
        """An input as a person sees it: an RGB picture, or a text; values of a tensor are scaled to their own range.

        Raises:
            ValueError: If it cannot be read.
        """

    @abstractmethod
    def _name(self, row: int) -> str | None:
        """The path or URL of a row of what is held here, if it has one."""

    @abstractmethod
    def _content(self, number: int) -> bytes:
        """A digest of the content of an input."""

    @abstractmethod
    def _preprocessing(self) -> Any:
        """What decides how contents become a model's inputs, as plain values."""

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Inputs (b, ...), or by name (b, ...) each, and labels (b,) of all inputs, in order.

        Raises:
            ValueError: If an input cannot be read, with its path or number.
        """
        # Closed here, and not whenever it is collected: threads that read end with this loop, however that ends.
        with closing(self.readable_batches()) as batches:
            for batch in batches:
                if batch.errors:
                    first = min(batch.errors)
                    raise ValueError(
                        f"{batch.errors[first]} {first} of {len(self)} {self.kind}s come before it. Replace it, or "
                        "take it away."
                    )
                yield batch.inputs, batch.labels

    def name(self, number: int) -> str:
        """The path or URL of an input, or its number in the whole set or stream as text."""
        return self._name(self._row(number)) or str(self.numbers[number])

    def select(self, numbers: Iterable[int]) -> Self:
        """Some of the inputs, by their places in this set; there may be none.

        Raises:
            ValueError: If a place is none of 0 to the number of inputs less one.
        """
        chosen = numbers.tolist() if isinstance(numbers, (Tensor, np.ndarray)) else list(numbers)
        # A mask is no list of places.
        strange = [
            place
            for place in chosen
            if not isinstance(place, (int, np.integer)) or isinstance(place, bool) or not 0 <= place < len(self)
        ]
        if strange:
            raise ValueError(
                f"numbers holds {strange[0]!r}; give the places of the {self.kind}s that are wanted, from 0 to "
                f"{len(self) - 1}."
            )
        places = [int(place) for place in chosen]
        part = copy.copy(self)
        part.labels = self.labels[torch.tensor(places, dtype=torch.long)]
        part.numbers = [self.numbers[place] for place in places]
        return part

    def shard(self, index: int, count: int) -> Self:
        """Every `count`-th input from place `index` on; it may be empty."""
        return self.select(range(index, len(self), count))

    def batch_places(self, index: int, count: int) -> list[int]:
        """The places of every `count`-th batch from batch `index` on: `select` of them has the batches of the whole."""
        return [place for part in self._parts()[index::count] for place in part]

    def digest(self) -> str:
        """SHA-256 of contents, labels, class names and preprocessing, in hexadecimal; contents are read one by one.

        Files count by their bytes and not by their paths, pictures and arrays by their pixels. Sets of equal contents
        in one order have one digest, wherever they lie and however they are cut into batches. What cannot be read
        counts as such.
        """
        settings = [
            self.kind,
            None if self.classes is None else [self.classes.names, self.classes.keys],
            self.labels.tolist(),
            self._preprocessing(),
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
        for content in self.contents():
            digest.update(content)
        return digest.hexdigest()

    def contents(self) -> Iterator[bytes]:
        """A digest of the content of each input, in order, whatever it is called, labelled and processed."""
        return map(self._content, range(len(self)))

    def numbered_from(self, first: int) -> Self:
        """The same inputs as a part of a stream, of which `first` inputs come before them."""
        part = copy.copy(self)
        part.numbers = [number - self._first + first for number in self.numbers]
        part._first = first
        return part

    def _row(self, number: int) -> int:
        return self.numbers[number] - self._first

    def _parts(self) -> list[range]:
        """The places of each batch."""
        starts = range(0, len(self), self.batch_size)
        return [range(start, min(start + self.batch_size, len(self))) for start in starts]

    def _called(self, number: int) -> str:
        """An input in an error: its path or URL, or its number in the whole set or stream."""
        return self._name(self._row(number)) or f"{self.kind.capitalize()} {self.numbers[number]} (from 0)"

    def _unreadable(self, number: int, error: Exception) -> str:
        # A `KeyError` or `AttributeError` says little by its message alone.
        kind = "" if isinstance(error, (OSError, ValueError)) and str(error) else f"{type(error).__name__}: "
        return f"{self._called(number)} cannot be read: {kind}{error}".rstrip(".: ") + "."

    def _batch(
        self, part: Sequence[int], inputs: Tensor | Mapping[str, Tensor] | None, errors: dict[int, str]
    ) -> InputBatch:
        read = [number for number in part if number not in errors]
        return InputBatch(read, inputs if read else None, self.labels[torch.tensor(read, dtype=torch.long)], errors)

    def _of_tensors(self, tensors: Mapping[str, Tensor], part: range) -> tuple[dict[str, Tensor], dict[int, str]]:
        """The rows of a batch out of tensors with one row an input, and an error for each that is not finite."""
        rows = [self._row(number) for number in part]
        whole = slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else rows
        batch = {name: tensor[whole] for name, tensor in tensors.items()}
        finite = finite_rows(batch)
        errors = {
            number: f"{self._called(number)} holds values that are not finite."
            for number, is_finite in zip(part, finite, strict=True)
            if not is_finite
        }
        if errors:
            batch = {name: tensor[torch.tensor(finite)] for name, tensor in batch.items()}
        return batch, errors


def finite_rows(tensors: Mapping[str, Tensor]) -> list[bool]:
    """Whether all values of each row are finite."""
    finite = [
        tensor.isfinite().reshape(len(tensor), -1).all(1) for tensor in tensors.values() if tensor.is_floating_point()
    ]
    count = len(next(iter(tensors.values())))
    return torch.stack(finite).all(0).tolist() if finite else [True] * count


def checked_batch_size(batch_size: int) -> int:
    """A batch size as it is.

    Raises:
        ValueError: If it is no integer of 1 or more.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; give an integer of 1 or more.")
    return batch_size
