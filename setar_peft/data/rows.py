"""Inputs and labels out of whatever users have: data sets of several libraries, sequences, arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.data

# What strings and bytes mean: paths of images, or texts.
Kind = Literal["image", "text"]

_USUAL = {"image": ("image", "img"), "text": ("text",), "label": ("label", "labels")}


@dataclass
class Rows:
    """Inputs in a fixed order, with what the data say of their classes.

    Attributes:
        count: Number of inputs.
        input: `number -> input`; images may be undecoded.
        labels: One label an input; None where there are none or they are not asked for.
        label_names: What the data call the classes that their integer labels stand for, also where those are not asked
            for; None where they have no names.
    """

    count: int
    input: Callable[[int], Any]
    labels: Any = None
    label_names: list[str] | None = None


def rows_of(
    data: Any,
    kind: Kind,
    input_column: str | None = None,
    label_column: str | None = None,
    *,
    labelled: bool,
) -> Rows:
    """The inputs, and the labels if they are asked for, of a data set or sequence.

    Args:
        data: A `datasets.Dataset`; a `datasets.IterableDataset`, which is read once, to its end, and kept as it is
            encoded; a `torch.utils.data.Dataset` of tuples (input, label, ...) or mappings, of which every item is
            read once where labels are asked for (one that can only be iterated is kept); or a sequence or array.
        kind: What the inputs are.
        input_column: Name of their column.
        label_column: Name of the labels' column.
        labelled: Whether labels are asked for.

    Raises:
        ValueError: If it is something else, or has no column of this name.
    """
    check_is_one_set(data)
    if isinstance(data, Rows):
        return data
    if is_of_datasets(data, "Dataset", "IterableDataset"):
        return _of_datasets(data, kind, input_column, label_column, labelled)
    if isinstance(data, torch.utils.data.Dataset):
        return _of_torch(data, kind, input_column, label_column, labelled)
    if isinstance(data, (Sequence, np.ndarray)) and not isinstance(data, (str, bytes, bytearray)):
        return Rows(len(data), data.__getitem__)
    raise ValueError(
        f"The {kind}s are a {type(data).__module__}.{type(data).__qualname__}; give a list of them, a datasets.Dataset "
        "or a torch.utils.data.Dataset."
    )


def check_is_one_set(data: Any) -> None:
    """Refuse several splits, and batches.

    Raises:
        ValueError: With what to give instead.
    """
    if is_of_datasets(data, "DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, data))
        raise ValueError(
            f"The data set has the splits {splits}; give one of them, such as dataset[{next(iter(data))!r}]."
        )
    if isinstance(data, torch.utils.data.DataLoader):
        raise ValueError("The data are a DataLoader; give its data set, loader.dataset: batches are made here.")


def is_of_datasets(data: Any, *names: str) -> bool:
    """Whether it is of a class of `datasets`, which is imported already if it is."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, tuple(getattr(module, name) for name in names))


def _of_datasets(data: Any, kind: str, input_column: str | None, label_column: str | None, labelled: bool) -> Rows:
    import datasets

    data, chosen, typed = undecoded(data, kind, input_column, label_column, labelled)
    features = data.features or {}
    feature = features.get(chosen[kind])
    if isinstance(data, datasets.IterableDataset):
        kept = [{name: row[name] for name in chosen.values()} for row in data]
        labels = [row[chosen["label"]] for row in kept] if labelled else None
        rows = Rows(len(kept), lambda number: local_image(kept[number][chosen[kind]], feature), labels)
    else:
        inputs = data.select_columns([chosen[kind]])
        labels = list(data[chosen["label"]]) if labelled else None
        rows = Rows(len(inputs), lambda number: local_image(inputs[number][chosen[kind]], feature), labels)
    # Also where other labels are given: theirs may be numbered otherwise.
    own = chosen.get("label") or label_column or (typed["label"][0] if len(typed["label"]) == 1 else None)
    named = features.get(own)
    if isinstance(named, datasets.ClassLabel):
        rows.label_names = list(named.names)
    return rows


def undecoded(
    data: Any, kind: str, input_column: str | None, label_column: str | None, labelled: bool
) -> tuple[Any, dict[str, str], dict[str, list[str]]]:
    """A data set of `datasets` with its images undecoded, the columns that are asked for, and those of each type."""
    import datasets

    formatting = getattr(data, "format", None)
    if formatting is not None and formatting["type"] == "custom":
        raise ValueError(
            f"The data set has a transform (set_transform), whose output is not known; give the {kind}s themselves: "
            "dataset.with_format(None)."
        )
    data = data.with_format(None)
    features = data.features or {}
    streamed = isinstance(data, datasets.IterableDataset)
    first = None if features or not streamed else next(iter(data), None)
    typed = {
        wanted: [name for name, feature in features.items() if isinstance(feature, type_)]
        for wanted, type_ in (("image", datasets.Image), ("label", datasets.ClassLabel))
    }
    given = {kind: input_column, **({"label": label_column} if labelled else {})}
    chosen = usual_columns(list(features or first or {}), given, typed)
    # So that an error can name the file, and threads decode.
    if isinstance(features.get(chosen[kind]), datasets.Image):
        data = data.cast_column(chosen[kind], datasets.Image(decode=False))
    return data, chosen, typed


def local_image(value: Any, feature: Any) -> Any:
    """An undecoded image that can be read here: one that lies elsewhere is fetched by `datasets`."""
    if isinstance(value, dict) and value.get("bytes") is None and not Path(str(value.get("path"))).exists():
        path = str(value.get("path"))
        return feature.decode_example(value) if "://" in path else path
    return value


def _of_torch(data: Any, kind: str, input_column: str | None, label_column: str | None, labelled: bool) -> Rows:
    items: Any = data if hasattr(data, "__getitem__") and hasattr(data, "__len__") else list(data)
    if not len(items):
        return Rows(0, items.__getitem__)
    first = items[0]
    if isinstance(first, Mapping):
        given = {kind: input_column, **({"label": label_column} if labelled else {})}
        chosen: dict[str, Any] = usual_columns(list(first), given, {})
    elif input_column is not None or label_column is not None:
        raise ValueError(f"The data set's items are {type(first).__name__}s, which have no columns by name.")
    elif isinstance(first, (tuple, list)):
        chosen = {kind: 0, "label": 1}
    else:
        if labelled:
            raise ValueError(
                f"The data set's items are {type(first).__name__}s without labels; give labels, or items "
                "(input, label)."
            )
        return Rows(len(items), items.__getitem__, label_names=_torch_names(data, labelled))
    labels = [_label(items, number, chosen["label"]) for number in range(len(items))] if labelled else None
    return Rows(len(items), lambda number: items[number][chosen[kind]], labels, _torch_names(data, labelled))


def _label(items: Any, number: int, column: Any) -> Any:
    try:
        label = items[number][column]
    except Exception as error:
        raise ValueError(
            f"Item {number} (from 0) of {len(items)} in the data set cannot be read: {str(error) or repr(error)}. "
            "Replace it, or take it away."
        ) from error
    return label.item() if isinstance(label, (torch.Tensor, np.generic)) else label


def _torch_names(data: Any, labelled: bool) -> list[str] | None:
    """The class names of a torch data set by torchvision's convention, `classes`, also below subsets."""
    if isinstance(data, torch.utils.data.Subset):
        return _torch_names(data.dataset, labelled)
    if isinstance(data, torch.utils.data.ConcatDataset):
        found = [_torch_names(part, labelled) for part in data.datasets]
        if any(names != found[0] for names in found):
            if not labelled:
                return None
            raise ValueError("The concatenated data sets name their classes differently; give labels.")
        return found[0]
    names = getattr(data, "classes", None)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    if getattr(data, "target_transform", None) is not None:
        if not labelled:
            return None
        raise ValueError(
            "The data set has a target_transform, so that its labels are not the numbers of its classes; take it away, "
            "or give labels."
        )
    return list(names)


def usual_columns(
    columns: Sequence[str],
    given: Mapping[str, str | None],
    typed: Mapping[str, Sequence[str]],
    where: str = "The data set",
) -> dict[str, str]:
    """The column of each kind: the given one, the only one of its type, or one that is called as usual."""
    chosen: dict[str, str] = {}
    missing: list[str] = []
    for kind, name in given.items():
        of_type = typed.get(kind, [])
        usual = of_type if len(of_type) == 1 else _USUAL[kind]
        candidates = [column for column in ([name] if name else usual) if column in columns]
        if candidates:
            chosen[kind] = candidates[0]
        else:
            missing.append(name or usual[0])
    if missing:
        says = " and ".join(f"{kind}_column" for kind in given)
        holds = " and ".join(f"the {kind}s" for kind in given)
        raise ValueError(
            f"{where} has the columns {', '.join(columns)}, but no {', '.join(missing)}; say with {says} which "
            f"hold{'s' if len(given) == 1 else ''} {holds}."
        )
    return chosen
