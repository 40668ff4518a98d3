"""Streams of inputs that are not held in memory: some at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.utils.data

from setar_peft.data.files import is_encoded
from setar_peft.data.rows import Kind, Rows, is_of_datasets, local_image, undecoded, usual_columns


def is_stream(data: Any) -> bool:
    """Whether data can only be gone through, once or many times, and are not to be held in memory."""
    if isinstance(data, io.IOBase):
        return False
    return isinstance(data, (Iterator, torch.utils.data.IterableDataset)) or is_of_datasets(data, "IterableDataset")


def streamed_rows(data: Any, kind: Kind, input_column: str | None, count: int) -> Iterator[Rows]:
    """The inputs of a stream, without labels.

    Args:
        data: An iterator of inputs or of mappings with a column of them, a `torch.utils.data.IterableDataset` of those
            or of tuples (input, ...), or a `datasets.IterableDataset`.
        kind: What the inputs are.
        input_column: Name of their column.
        count: Inputs at a time.

    Raises:
        ValueError: If there is no such column, or the stream ends with an error; what came before it is given first.
    """
    feature = None
    if is_of_datasets(data, "IterableDataset"):
        data, chosen, _ = undecoded(data, kind, input_column, None, labelled=False)
        input_column, feature = chosen[kind], (data.features or {}).get(chosen[kind])
    in_tuples = isinstance(data, torch.utils.data.IterableDataset)
    iterator: Iterator[Any] = iter(data)
    read = 0
    pick: Callable[[Any], Any] | None = None
    while True:
        held, failure = _taken(iterator, count)
        if held:
            pick = pick or _picker(held[0], kind, input_column, in_tuples)
            yield Rows(len(held), _Held(held, pick, feature))
        read += len(held)
        if failure is not None:
            raise ValueError(
                f"The stream ended with an error after {read} {kind}s: {str(failure) or repr(failure)}."
            ) from failure
        if len(held) < count:
            return


class _Held:
    """From a number to an input of what is held, whose reading may fail as that of any other."""

    def __init__(self, items: list[Any], pick: Callable[[Any], Any], feature: Any) -> None:
        self.items, self.pick, self.feature = items, pick, feature

    def __call__(self, number: int) -> Any:
        value = self.pick(self.items[number])
        return value if self.feature is None else local_image(value, self.feature)


def _taken(iterator: Iterator[Any], count: int) -> tuple[list[Any], Exception | None]:
    """The next items, fewer where the stream ends, and the error that it ends with."""
    items: list[Any] = []
    try:
        while len(items) < count:
            items.append(next(iterator))
    except StopIteration:
        pass
    except Exception as error:
        return items, error
    return items, None


def _picker(first: Any, kind: Kind, column: str | None, in_tuples: bool) -> Callable[[Any], Any]:
    """From an item to the input in it, by what the first item is."""
    if isinstance(first, Mapping) and not (kind == "image" and is_encoded(first) and column is None):
        name = usual_columns(list(first), {kind: column}, {}, "The stream")[kind]
        return lambda item: item[name]
    if column is not None:
        raise ValueError(f"The stream's items are of type {type(first).__name__}, which has no columns by name.")
    if in_tuples and isinstance(first, (tuple, list)):
        return lambda item: item[0]
    return lambda item: item
