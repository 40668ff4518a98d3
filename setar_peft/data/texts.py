"""Inputs that are no images alone: texts, or what a processor or tokenizer has made of anything, by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from torch import Tensor

from setar_peft.data.labels import checked_labels


class NamedInputs:
    """A labelled set of texts or processed inputs, in a fixed order.

    Args:
        tokenizer: The model's tokenizer, or a processor with one in it. Not used for processed inputs.
        data: Texts, a `datasets.Dataset` with a column of them, or a mapping from the model's input names to tensors
            with one row an input.
        labels: One class index an input; a data set has them in its label column.
        class_names: Names of the classes.
        batch_size: Inputs a batch. Texts are padded to the longest of their batch.
        text_column: Name of the data set's text column.
        label_column: Name of the data set's label column.

    Raises:
        ValueError: If there are no inputs, tensors of unequal length, no tokenizer for texts, or wrong labels.
    """

    def __init__(
        self,
        tokenizer: Any,
        data: Sequence[str] | datasets.Dataset | Mapping[str, Tensor],
        labels: Tensor | Sequence[int] | None = None,
        *,
        class_names: Sequence[str],
        batch_size: int = 64,
        text_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; give an integer of 1 or more.")
        self.batch_size = batch_size
        self._tensors: Mapping[str, Tensor] | None = None
        self._texts: list[str] = []
        if isinstance(data, Mapping):
            lengths = {name: len(tensor) for name, tensor in data.items()}
            if len(set(lengths.values())) != 1:
                listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
                raise ValueError(f"The inputs need one row each in every tensor: {listed or 'there are none'}.")
            self._tensors, self._length = data, next(iter(lengths.values()))
        else:
            self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            if not callable(self._tokenizer):
                raise ValueError(f"Texts need the model's tokenizer; processor is {tokenizer!r}.")
            if isinstance(data, datasets.Dataset):
                wanted = [text_column or "text", *([label_column or "label"] if labels is None else [])]
                missing = [name for name in wanted if name not in data.column_names]
                if missing:
                    raise ValueError(
                        f"The data set has the columns {', '.join(data.column_names)}, but no {', '.join(missing)}; "
                        "say with text_column and label_column which hold the texts and the labels."
                    )
                labels = data[wanted[1]] if labels is None else labels
                data = data[wanted[0]]
            self._texts, self._length = list(data), len(data)
        if not self._length:
            raise ValueError("There are no inputs; give at least one.")
        self.labels = checked_labels(labels, self._length, class_names)

    def __len__(self) -> int:
        return self._length

    def batches(self) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """The model's inputs by name, (b, ...) each, and labels (b,) of all inputs, in order."""
        for start in range(0, len(self), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self._inputs(part), self.labels[part]

    def shard(self, index: int, count: int) -> NamedInputs:
        """Every `count`-th input from number `index` on; it may be empty."""
        part = copy.copy(self)
        part.labels = self.labels[index::count]
        part._length = len(part.labels)
        if self._tensors is not None:
            part._tensors = {name: tensor[index::count] for name, tensor in self._tensors.items()}
        part._texts = self._texts[index::count]
        return part

    def _inputs(self, part: slice) -> Mapping[str, Tensor]:
        if self._tensors is not None:
            return {name: tensor[part] for name, tensor in self._tensors.items()}
        return dict(self._tokenizer(self._texts[part], padding=True, truncation=True, return_tensors="pt"))
