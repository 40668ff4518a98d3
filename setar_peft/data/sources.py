"""Whatever a user has as inputs: one or many, in memory, in files, on the web, or in a stream that fits nowhere."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data
from PIL import Image
from torch import Tensor

from setar_peft.data.files import is_encoded, is_url
from setar_peft.data.images import ImageSource
from setar_peft.data.inputs import Inputs, checked_batch_size
from setar_peft.data.labels import ClassNames
from setar_peft.data.rows import Kind, check_is_one_set, is_of_datasets
from setar_peft.data.streams import is_stream, streamed_rows
from setar_peft.data.text_files import TEXT_SUFFIXES, read_texts
from setar_peft.data.texts import NamedInputs

_LISTS = frozenset({".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"})
_BATCHES_OF_A_STREAM = 4  # that are held at a time
_NEGATIVES_SEEN = 64  # images in which a tensor is looked at for them


def is_single(data: Any, kind: Kind) -> bool:
    """Whether data are one input and not a set of one: a text; a path that is no folder, a URL, a picture, an array."""
    if kind == "text":
        return isinstance(data, str)
    if isinstance(data, (str, Path)):
        return not _is_folder(data)
    if isinstance(data, (np.ndarray, Tensor)):
        return data.ndim in (2, 3) and _is_numeric(data) and not _is_stack(data)
    return isinstance(data, Image.Image) or is_encoded(data)


def source_of(
    data: Any,
    processor: Any,
    kind: Kind,
    *,
    class_names: Sequence[str] | Mapping[Any, str] | ClassNames | None = None,
    labels: Tensor | Sequence[int] | Sequence[str] | None = None,
    batch_size: int = 64,
    input_column: str | None = None,
    label_column: str | None = None,
) -> Inputs:
    """Inputs out of whatever a user has.

    Args:
        data: Of images: a path, a URL (http or https), encoded bytes, a PIL image or an array, or a list of those; a
            folder; a tensor of pixel values (images, channels, height, width) in floating point, or of images as bytes;
            a `datasets.Dataset`, a `torch.utils.data.Dataset`. Of texts: a text, a list of them, a data set; a
            `pathlib.Path` of a .txt file (one a line) or of a .csv file. Of both: a mapping from the model's input
            names to tensors; an `Inputs`, which stays as it is, its batch size included.
        processor: The model's processor, image processor or tokenizer.
        kind: What strings and bytes mean.
        class_names: As for `ImageSource`; None for inputs without labels.
        labels: As for `ImageSource`.
        batch_size: Inputs a batch.
        input_column: Name of the column of images or texts.
        label_column: Name of the column of labels.

    Raises:
        ValueError: If it is nothing of these, may be two things, or labels do not fit. An input that cannot be read is
            an error of its batch.
    """
    _check(data, kind)
    if isinstance(data, Inputs):
        return _as_it_is(data, kind, class_names, labels, input_column, label_column)
    if (input_column or label_column) and not _may_have_columns(data, kind):
        raise ValueError(
            f"input_column or label_column beside data without columns ({type(data).__name__}); take them away."
        )
    named: dict[str, Any] = {"class_names": class_names, "batch_size": batch_size}
    if isinstance(data, Mapping) and not (kind == "image" and is_encoded(data)):
        if isinstance(data.get("pixel_values"), Tensor):
            _warn_if_not_normalised(data["pixel_values"], processor)
        return NamedInputs(processor, data, labels, **named)
    if kind == "text":
        if isinstance(data, Path):
            labelled = class_names is not None and labels is None
            texts, own = read_texts(data, input_column, label_column, labelled=labelled)
            return NamedInputs(processor, texts, own if labels is None else labels, **named)
        data = [data] if isinstance(data, str) else data
        if isinstance(data, (list, tuple)):
            # "/" among others is what somebody wrote; where all are paths, files were meant to be read.
            all_are = all(map(_is_file, data))
            for text in data:
                if all_are or str(text).endswith(TEXT_SUFFIXES):
                    _check_is_no_file(text)
        return NamedInputs(processor, data, labels, text_column=input_column, label_column=label_column, **named)
    # Of what is no folder it is then said that it is none.
    is_to_have_classes = isinstance(data, (str, Path)) and class_names is not None and labels is None
    if is_single(data, kind) and not is_to_have_classes:
        data = [data]
    elif isinstance(data, Tensor) and (_is_stack(data) or (data.ndim == 4 and not data.is_floating_point())):
        data = list(data)
    elif isinstance(data, Tensor):
        _warn_if_not_normalised(data, processor)
    return ImageSource(processor, data, labels, image_column=input_column, label_column=label_column, **named)


def stream_of(
    data: Any, processor: Any, kind: Kind, *, batch_size: int = 64, input_column: str | None = None
) -> Iterator[Inputs]:
    """Unlabelled inputs out of whatever a user has, some batches at a time where they come out of a stream.

    Args:
        data: An iterator or generator of inputs or of rows (mappings with a column of inputs); a
            `torch.utils.data.IterableDataset` of inputs, of tuples (input, ...) or of rows; a
            `datasets.IterableDataset`; or what `source_of` takes, which is one `Inputs`.
        processor: As for `source_of`.
        kind: As for `source_of`.
        batch_size: Inputs a batch.
        input_column: Name of the column of images or texts.

    Yields:
        Inputs in order, which go on counting: `name` of one without a path is its number in the stream.

    Raises:
        ValueError: If there are none, or the stream ends with an error, after all that came before it.
    """
    if not is_stream(data):
        yield source_of(data, processor, kind, batch_size=batch_size, input_column=input_column)
        return
    first = 0
    make: Any = ImageSource if kind == "image" else NamedInputs
    for rows in streamed_rows(data, kind, input_column, checked_batch_size(batch_size) * _BATCHES_OF_A_STREAM):
        yield make(processor, rows, batch_size=batch_size).numbered_from(first)
        first += rows.count
    if not first:
        raise ValueError(f"The stream holds no {kind}s; give at least one.")


def _check(data: Any, kind: Kind) -> None:
    """Refuse what is certain to be a mistake, with what to give instead."""
    check_is_one_set(data)
    if isinstance(data, io.IOBase) and not (kind == "image" and is_encoded(data)):
        raise ValueError(f"The {kind}s are an open file; give its path as a pathlib.Path.")
    if is_stream(data) and isinstance(data, Iterator):
        raise ValueError(
            f"The {kind}s are a {type(data).__name__}, which can be read once and has no length; give a list of it, or "
            "stream it."
        )
    if isinstance(data, AbstractSet):
        raise ValueError(f"The {kind}s are a {type(data).__name__}, which has no order; give a list.")
    if isinstance(data, (str, Path)) and not str(data).strip():
        raise ValueError(f"The {kind} is an empty string; give {'a path' if kind == 'image' else 'a text'}.")
    if isinstance(data, Mapping) and not is_encoded(data) and not all(isinstance(v, Tensor) for v in data.values()):
        keys = ", ".join(map(repr, list(data)[:4]))
        raise ValueError(
            f"The {kind}s are a mapping with the keys {keys}; give the {kind}s themselves, data[...], or tensors by "
            "the names of the model's inputs."
        )
    if kind == "text":
        if isinstance(data, (bytes, bytearray, memoryview)):
            raise ValueError("The text is bytes; decode it: data.decode('utf-8').")
        _check_is_no_file(data)
        return
    if isinstance(data, (str, Path)) and not is_url(str(data)) and Path(data).suffix.lower() in _LISTS:
        raise ValueError(f"{data} is no image; give a folder of images, a path or URL of one, or a list of them.")
    # A tensor has its channels first, as torch has them.
    if isinstance(data, np.ndarray) and _is_numeric(data) and data.ndim == 3:
        first, last = (data.shape[axis] in (1, 3, 4) for axis in (0, 2))
        if first and not last:
            raise ValueError(
                f"An array of shape {tuple(data.shape)} may be one image, channels first, or {data.shape[0]} grey; "
                "give [array] or list(array)."
            )


def _is_file(text: Any) -> bool:
    if not isinstance(text, str) or len(text) >= 1024 or not (text.endswith(TEXT_SUFFIXES) or "/" in text):
        return False
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _check_is_no_file(text: Any) -> None:
    if _is_file(text):
        raise ValueError(
            f"The text {text!r} is the path of a file or folder; give pathlib.Path({text!r}) for the texts in a file."
        )


def _as_it_is(
    inputs: Inputs, kind: Kind, class_names: Any, labels: Any, input_column: str | None, label_column: str | None
) -> Inputs:
    if inputs.kind not in (kind, "input"):
        raise ValueError(f"The data are {inputs.kind}s ({type(inputs).__name__}); the model takes {kind}s.")
    if labels is not None or input_column is not None or label_column is not None:
        raise ValueError(
            f"There are labels or columns beside inputs that have their own; give them to {type(inputs).__name__}."
        )
    if class_names is not None:
        names = ClassNames.of(class_names)
        if inputs.classes is None or not inputs.classes.is_in_order_of(names):
            raise ValueError(
                "There are class_names beside inputs that have "
                f"{'none' if inputs.classes is None else 'others, or in another order'}; give them to "
                f"{type(inputs).__name__}."
            )
    return inputs


def _may_have_columns(data: Any, kind: Kind) -> bool:
    of_datasets = is_of_datasets(data, "Dataset", "IterableDataset")
    return of_datasets or isinstance(data, torch.utils.data.Dataset) or (isinstance(data, Path) and kind == "text")


def _is_folder(path: str | Path) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def _is_numeric(array: Any) -> bool:
    return isinstance(array, Tensor) or array.dtype.kind in "biuf"


def _is_stack(array: Any) -> bool:
    """Whether an array of three axes can only be several grey images, (images, height, width)."""
    return array.ndim == 3 and not any(array.shape[axis] in (1, 3, 4) for axis in (0, 2))


def _warn_if_not_normalised(pixel_values: Tensor, processor: Any) -> None:
    """Say so of pixel values that the processor cannot have made: it would have made some negative."""
    image_processor = getattr(processor, "image_processor", processor)
    mean = getattr(image_processor, "image_mean", None)
    if not getattr(image_processor, "do_normalize", False) or mean is None or not np.min(mean) > 0:
        return
    if not pixel_values.numel():
        return
    low, high = pixel_values[:_NEGATIVES_SEEN].aminmax()
    # A tensor of one value says nothing of where it comes from.
    if 0 <= low < high:
        warnings.warn(
            f"The tensor of pixel values lies between {float(low):g} and {float(high):g} and has no negative one, so "
            f"that it seems not to be normalised as the processor does it (image_mean {list(mean)}); give the images "
            "themselves, or processor(images).",
            UserWarning,
            stacklevel=3,
        )
