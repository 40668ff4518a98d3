"""Inputs that are no images alone: texts, or what a processor or tokenizer has made of anything, by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from setar_peft.data.images import checked_batch_size
from setar_peft.data.labels import ClassNames, check_has_classes, class_indices
from setar_peft.data.rows import check_is_one_set, rows_of

if TYPE_CHECKING:
    import datasets


class NamedInputs:
    """A set of texts or processed inputs, in a fixed order, labelled or not.

    Args:
        tokenizer: The model's tokenizer, or a processor with one in it. Not used for processed inputs.
        data: Texts, a `datasets.Dataset` with a column of them, a streamed one (read once, to its end), a
            `torch.utils.data.Dataset` of (text, label), or a mapping from the model's input names to tensors with one
            row an input.
        labels: One class index or class name an input; a data set has them in its label column.
        class_names: Names of the classes in the labels' order, or a mapping from what the data call them to their
            names. Names that the data have (a `ClassLabel`, labels that are strings) are matched with them by name.
            None for inputs without labels, such as an OOD set.
        batch_size: Inputs a batch. Texts are padded to the longest of their batch.
        text_column: Name of the data set's text column.
        label_column: Name of the data set's label column.

    Attributes:
        labels: (inputs,) class indices, -1 without classes.
        classes: The classes that the labels mean; None without.
        matched: What the data call each class -> its class name; empty where the data have no names.
        batch_size: Inputs a batch.

    Raises:
        ValueError: If there are no inputs, tensors of unequal length, no tokenizer for texts, or wrong labels.
    """

    def __init__(
        self,
        tokenizer: Any,
        data: Sequence[str] | datasets.Dataset | datasets.IterableDataset | Mapping[str, Tensor] | Any,
        labels: Tensor | Sequence[int] | Sequence[str] | None = None,
        *,
        class_names: Sequence[str] | Mapping[Any, str] | ClassNames | None = None,
        batch_size: int = 64,
        text_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self.batch_size = checked_batch_size(batch_size)
        check_is_one_set(data)
        self.classes = None if class_names is None else ClassNames.of(class_names)
        check_has_classes(labels, self.classes)
        own, label_names = labels, None
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
            labelled = self.classes is not None and labels is None
            rows = rows_of(data, "text", text_column, label_column, labelled=labelled)
            own, label_names = (rows.labels if labels is None else labels), rows.label_names
            self._texts, self._length = [rows.input(number) for number in range(rows.count)], rows.count
            strange = [number for number, text in enumerate(self._texts) if not isinstance(text, str)]
            if strange:
                raise ValueError(
                    f"Text {strange[0]} (from 0) is {self._texts[strange[0]]!r:.80}, which is no text; leave it out."
                )
        if not self._length:
            raise ValueError("There are no inputs; give at least one.")
        self.labels, self.matched = class_indices(
            own, label_names, self._length, self.classes, beside=labels is not None
        )

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
