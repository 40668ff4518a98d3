"""Inputs that are no images alone: texts, or what a processor or tokenizer has made of anything, by name."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from setar_peft.data.contents import digest_of, digest_of_row
from setar_peft.data.images import picture_of, processes_images
from setar_peft.data.inputs import InputBatch, Inputs, checked_batch_size
from setar_peft.data.labels import ClassNames, check_has_classes, class_indices
from setar_peft.data.rows import check_is_one_set, rows_of

if TYPE_CHECKING:
    import datasets

_SHOWN = 32  # numbers of a row
_NAMED = 4  # texts in a warning
_FEWEST_AXES = {"pixel_values": 3, "input_ids": 2, "attention_mask": 2, "token_type_ids": 2}


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

    kind = "text"

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
        if isinstance(data, Mapping):
            _check_rows(data)
            lengths = {name: len(tensor) for name, tensor in data.items()}
            if len(set(lengths.values())) != 1:
                listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
                raise ValueError(f"The inputs need one row each in every tensor: {listed or 'there are none'}.")
            self._tensors, count = data, next(iter(lengths.values()))
            self.kind = "input"
        else:
            self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            if not callable(self._tokenizer) or processes_images(self._tokenizer):
                raise ValueError(f"Texts need the model's tokenizer; processor is {tokenizer!r:.80}.")
            labelled = self.classes is not None and labels is None
            rows = rows_of(data, "text", text_column, label_column, labelled=labelled)
            own, label_names = (rows.labels if labels is None else labels), rows.label_names
            self._input, count = rows.input, rows.count
        if not count:
            raise ValueError("There are no inputs; give at least one.")
        self.labels, self.matched = class_indices(own, label_names, count, self.classes, beside=labels is not None)
        self.numbers = range(count)

    def readable_batches(self) -> Generator[InputBatch, None, None]:
        """The model's inputs by name, (b, ...) each, in order; what is no text is an error of its batch.

        Warns of texts that are longer than the tokenizer takes, when it has come to the end.
        """
        cut: list[str] = []
        for part in self._parts():
            if self._tensors is not None:
                yield self._batch(part, *self._of_tensors(self._tensors, part))
                continue
            texts, errors = self._texts(part)
            try:
                tokens = self._tokens(list(texts.values())) if texts else None
            except Exception:
                texts, errors = self._those_with_tokens(texts, errors)
                tokens = self._tokens(list(texts.values())) if texts else None
            if tokens is not None:
                cut += [self._called(number) for number in self._cut(texts, tokens)]
            yield self._batch(part, tokens, errors)
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(self)} texts are longer than the {self._tokenizer.model_max_length} tokens that "
                f"the tokenizer takes and are cut. The first: {', '.join(cut[:_NAMED])}.",
                UserWarning,
                stacklevel=2,
            )

    def shown(self, number: int) -> Image.Image | str:
        """A text; of processed inputs the picture, or the tokens' numbers.

        Raises:
            ValueError: If it is no text.
        """
        row = self._row(number)
        if self._tensors is None:
            texts, errors = self._texts([number])
            if errors:
                raise ValueError(errors[number])
            return texts[number]
        pixels = self._tensors.get("pixel_values")
        if pixels is not None and pixels.dim() == 4:
            return picture_of(pixels[row])
        name = "input_ids" if "input_ids" in self._tensors else next(iter(self._tensors))
        values = self._tensors[name][row].flatten().tolist()
        return f"{name} {', '.join(map(str, values[:_SHOWN]))}{', ...' if len(values) > _SHOWN else ''}"

    def _name(self, row: int) -> str | None:
        return None

    def _content(self, number: int) -> bytes:
        if self._tensors is not None:
            return digest_of_row(self._tensors, self._row(number))
        texts, errors = self._those_with_tokens(*self._texts([number]))
        if errors:
            return digest_of("unreadable")
        # Of a tokenizer counts what it makes of the text.
        return digest_of("text", texts[number], digest_of_row(self._tokens([texts[number]]), 0))

    def _preprocessing(self) -> Any:
        # What batches of several texts are made by.
        return None if self._tensors is not None else getattr(self._tokenizer, "padding_side", None)

    def _texts(self, part: Iterable[int]) -> tuple[dict[int, str], dict[int, str]]:
        """Texts by their places, and what is wrong with those that are none."""
        texts: dict[int, str] = {}
        errors: dict[int, str] = {}
        for number in part:
            try:
                text = self._input(self._row(number))
            except Exception as error:
                errors[number] = self._unreadable(number, error)
                continue
            if not isinstance(text, str):
                errors[number] = f"{self._called(number)} is {text!r:.80}, which is no text."
            elif not text.strip():
                errors[number] = f"{self._called(number)} is empty."
            else:
                texts[number] = text
        return texts, errors

    def _those_with_tokens(
        self, texts: Mapping[int, str], errors: Mapping[int, str]
    ) -> tuple[dict[int, str], dict[int, str]]:
        """The same without the texts that the tokenizer refuses, such as halves of surrogate pairs."""
        refused = {number: error for number, text in texts.items() if (error := self._refusal(number, text))}
        return {number: text for number, text in texts.items() if number not in refused}, {**errors, **refused}

    def _refusal(self, number: int, text: str) -> str | None:
        try:
            self._tokens([text])
        except Exception as error:
            return self._unreadable(number, error)
        return None

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

    def _cut(self, texts: Mapping[int, str], tokens: Mapping[str, Tensor]) -> list[int]:
        """The places of texts of which the tokenizer leaves something out."""
        longest = getattr(self._tokenizer, "model_max_length", None)
        if longest is None or "input_ids" not in tokens or tokens["input_ids"].shape[1] < longest:
            return []
        whole = self._tokenizer(list(texts.values()), padding=False, truncation=False, verbose=False)["input_ids"]
        return [number for number, ids in zip(texts, whole, strict=True) if len(ids) > longest]


def _check_rows(tensors: Mapping[str, Any]) -> None:
    """Refuse what has no row an input, such as one input alone."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} is a {type(tensor).__name__}; give tensors by the names of the model's inputs, as of "
                "processor(..., return_tensors='pt')."
            )
        if tensor.dim() < _FEWEST_AXES.get(name, 1):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; give one row an input: {name}[None] where it is one input."
            )
