"""Inputs that are no images alone: texts, or what a processor or tokenizer has made of anything, by name."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from setar_peft.data.contents import digest_of, digest_of_tensors
from setar_peft.data.images import picture_of
from setar_peft.data.inputs import InputBatch, Inputs, checked_batch_size, finite_rows
from setar_peft.data.labels import ClassNames, check_has_classes, class_indices
from setar_peft.data.rows import check_is_one_set, rows_of

if TYPE_CHECKING:
    import datasets

_SHOWN = 32


class NamedInputs(Inputs):
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

    _kind = "text"

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
            self._tensors, count = data, next(iter(lengths.values()))
        else:
            self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            if not callable(self._tokenizer):
                raise ValueError(f"Texts need the model's tokenizer; processor is {tokenizer!r}.")
            labelled = self.classes is not None and labels is None
            rows = rows_of(data, "text", text_column, label_column, labelled=labelled)
            own, label_names = (rows.labels if labels is None else labels), rows.label_names
            self._texts, count = [rows.input(number) for number in range(rows.count)], rows.count
        if not count:
            raise ValueError("There are no inputs; give at least one.")
        self.labels, self.matched = class_indices(own, label_names, count, self.classes, beside=labels is not None)
        self.numbers = range(count)

    def readable_batches(self) -> Generator[InputBatch, None, None]:
        """The model's inputs by name, (b, ...) each, in order; what is no text is an error of its batch."""
        for part in self._parts():
            rows = [self._row(number) for number in part]
            errors: dict[int, str] = {}
            if self._tensors is None:
                for number, row in zip(part, rows, strict=True):
                    strange = _strange(self._texts[row])
                    if strange:
                        errors[number] = f"{self._called(number)} {strange}."
                rows = [row for number, row in zip(part, rows, strict=True) if number not in errors]
                yield self._batch(part, self._tokens([self._texts[row] for row in rows]) if rows else None, errors)
                continue
            tensors = {name: tensor[rows] for name, tensor in self._tensors.items()}
            finite = finite_rows(tensors)
            for number, is_finite in zip(part, finite, strict=True):
                if not is_finite:
                    errors[number] = f"{self._called(number)} holds values that are not finite."
            if errors:
                tensors = {name: tensor[finite] for name, tensor in tensors.items()}
            yield self._batch(part, tensors, errors)

    def shown(self, number: int) -> Image.Image | str:
        """A text; of processed inputs the picture, or the numbers of the tokens.

        Raises:
            ValueError: If it is no text.
        """
        row = self._row(number)
        if self._tensors is None:
            strange = _strange(self._texts[row])
            if strange:
                raise ValueError(f"{self._called(number)} {strange}.")
            return self._texts[row]
        pixels = self._tensors.get("pixel_values")
        if pixels is not None and pixels.dim() == 4:
            return picture_of(pixels[row])
        name = "input_ids" if "input_ids" in self._tensors else next(iter(self._tensors))
        return f"{name} {self._tensors[name][row].flatten()[:_SHOWN].tolist()}"

    def _name(self, row: int) -> str | None:
        return None

    def _content(self, row: int) -> bytes:
        if self._tensors is not None:
            return digest_of_tensors({name: tensor[row] for name, tensor in self._tensors.items()})
        text = self._texts[row]
        return digest_of("unreadable" if _strange(text) else digest_of_tensors(self._tokens([text])), repr(text))

    def _preprocessing(self) -> Any:
        # Besides the tokens themselves, which take part with each text: what batches of several are made by.
        return None if self._tensors is not None else getattr(self._tokenizer, "padding_side", None)

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))


def _strange(text: Any) -> str | None:
    """What is wrong with a text."""
    if not isinstance(text, str):
        return f"is {text!r:.80}, which is no text"
    return None if text.strip() else "is empty"
