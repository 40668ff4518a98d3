"""Where labels meet class names: by name, in this one place, and never by position because names did not fit."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SHOWN = 12
# What transformers calls the classes of a model that was made with a number of labels and no names.
_UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class ClassNames:
    """Names of the classes in the labels' order, and what the data call the classes where that is something else.

    Attributes:
        names: Name of each class; two classes may have one name where labels are integers (ImageNet has two pairs).
        keys: What the data call each class, such as the folder "n01440764"; None for a class that they do not have.
            None alone where the data use the names.
    """

    names: tuple[str, ...]
    keys: tuple[str | None, ...] | None = None

    @classmethod
    def of(cls, given: Any, fewest: int = 2) -> ClassNames:
        """Class names as a user gives them.

        Args:
            given: A sequence of names in the labels' order; a classifier's `config.id2label`, index -> name; or a
                mapping from what the data call a class to its name, which numbers the classes in its own order (by
                number where the keys are numbers).

            fewest: How many there have to be.

        Raises:
            ValueError: If they are no names of at least `fewest` classes, have no order, or an index is missing.
        """
        if isinstance(given, ClassNames):
            return given
        if isinstance(given, (set, frozenset)):
            raise ValueError(f"class_names is a {type(given).__name__}, which has no order; give a list.")
        keys: list[Any] | None = None
        if isinstance(given, Mapping):
            keys = list(given)
            if keys and all(_is_number(key) for key in keys):
                keys.sort(key=int)
            names = [given[key] for key in keys]
        else:
            names = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        if len(names) < fewest or not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"class_names is {names!r}; give the names of at least two in-distribution classes, in the labels' "
                "order."
            )
        if keys is None:
            return cls(tuple(names))
        if all(isinstance(key, int) for key in keys):
            if keys != list(range(len(keys))):
                raise ValueError(
                    f"class_names has the indices {_listed(map(str, keys))}; give a name for each of 0 to "
                    f"{len(keys) - 1}."
                )
            return cls(tuple(names))
        if not all(isinstance(key, str) for key in keys):
            raise ValueError(f"class_names has the keys {keys!r}; give indices, or what the data call the classes.")
        return cls(tuple(names), tuple(keys))

    @classmethod
    def of_model(cls, id2label: Mapping[Any, str] | None) -> ClassNames | None:
        """The classes of a classifier by its `config.id2label`; None where they have no names (LABEL_0, ...)."""
        if not id2label or all(_UNNAMED.fullmatch(str(name)) for name in id2label.values()):
            return None
        return cls(cls.of(id2label).names)

    def __len__(self) -> int:
        return len(self.names)

    def match(self, found: Collection[str], where: str) -> dict[str, int]:
        """Which class each of some names is: by equal names, else by names that differ in case and separators alone.

        Args:
            found: The names that the data use, each once.
            where: What has these names, for the error.

        Returns:
            Name -> class index.

        Raises:
            ValueError: If a name fits no class or several, or two names fit one class.
        """
        matched = _matched(found, self)
        if isinstance(matched, dict):
            return matched
        shown = ", which the data are to call " + _listed(key or "-" for key in self.keys) if self.keys else ""
        raise ValueError(
            f"{where} do not match the class names: {matched}. {where}: {_listed(found)}. Class names: "
            f"{_listed(self.names)}{shown}. Nothing is matched by position: use the class names, or say which is which "
            'by class_names (a file for --classes) such as {"n01440764": "tench", ...}, from what the data call a '
            "class to its name."
        )

    def in_order_of(self, model: ClassNames) -> ClassNames:
        """The same classes, numbered as a model numbers them.

        Raises:
            ValueError: If they do not match the model's by name, or a list leaves out classes of the model.
        """
        if self.names == model.names:
            return self
        if self.keys is None and len(self) != len(model):
            raise ValueError(_other_classes(self, model, "the model"))
        if len(set(self.names)) < len(self):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(
                f"class_names is not in the model's order and has {twice!r} twice, so that names do not say which "
                "class is which; give class_names in the order of the model's id2label."
            )
        index = model.match(self.names, "The given class names")
        if self.keys is None:
            return model
        called = {index[name]: key for name, key in zip(self.names, self.keys, strict=True)}
        return ClassNames(model.names, tuple(called.get(number) for number in range(len(model))))

    def is_in_order_of(self, other: ClassNames) -> bool:
        """Whether these are the same classes as others, numbered alike."""
        return list(map(_folded, self.names)) == list(map(_folded, other.names))

    def check_order_of(self, other: ClassNames, owner: str) -> None:
        """Refuse classes that are not another's, in the same order.

        Args:
            other: The classes that they have to be.
            owner: Whose these are, for the error.

        Raises:
            ValueError: With both lists.
        """
        if not self.is_in_order_of(other):
            raise ValueError(_other_classes(self, other, owner))

    def check_numbers(self, label_names: Sequence[str]) -> None:
        """Refuse class indices beside data that name their classes and number them otherwise.

        Args:
            label_names: What the data call their classes, in their own order.

        Raises:
            ValueError: With both lists.
        """
        alike = self.is_in_order_of(ClassNames(tuple(label_names)))
        if not alike and _matched(label_names, self) != {name: place for place, name in enumerate(label_names)}:
            raise ValueError(
                "labels holds integers, and the data set numbers its classes otherwise than class_names: "
                f"{_listed(label_names)}. Class names: {_listed(self.names)}. Leave labels out for the data set's own, "
                "or give labels as class names."
            )


def class_indices(
    labels: Any,
    label_names: Sequence[str] | None,
    count: int,
    classes: ClassNames | None,
    where: str = "The labels",
    *,
    beside: bool = False,
) -> tuple[Tensor, dict[str, str]]:
    """Labels as class indices.

    Args:
        labels: One class index or class name an input.
        label_names: What the data call the classes that integer labels stand for, as a `ClassLabel` does; None where
            integers are class indices.
        count: Number of inputs.
        classes: The classes; None for inputs without labels.
        where: What has the names, for the error.
        beside: Whether the labels were given beside the data, whose own labels `label_names` are for.

    Returns:
        Class indices, (inputs,), or -1 for each where there are no classes; and what the data call each class ->
        its class name, where the data have names.

    Raises:
        ValueError: If labels are missing, wrong in number, outside the classes, do not match them by name, or are
            indices beside data that number their classes otherwise.
    """
    if classes is None:
        return torch.full((count,), -1), {}
    if labels is None:
        raise ValueError("The inputs have no labels; give labels, one class index or class name an input.")
    values = labels if isinstance(labels, (Tensor, np.ndarray)) and labels.dtype != object else list(labels)
    if isinstance(values, np.ndarray) and values.dtype.kind in "UT":
        values = values.tolist()
    if isinstance(values, list):
        unlabelled = [number for number, label in enumerate(values) if label is None]
        if unlabelled:
            raise ValueError(
                f"{len(unlabelled)} of {count} inputs have None for a label (the first is number {unlabelled[0]}, "
                "from 0); label them or leave them out."
            )
        named = [isinstance(label, str) for label in values]
        if any(named) and not all(named):
            raise ValueError("labels holds names and numbers; give one class index or one class name an input.")
        if len(values) != count:
            raise ValueError(f"There are {len(values)} labels for {count} inputs; give one for each.")
        if named and all(named):
            index = classes.match(_distinct(values), where)
            return torch.tensor([index[label] for label in values]), _said(index, classes)
    tensor = _as_integers(values, count)
    if beside and label_names is not None:
        classes.check_numbers(label_names)
    if beside or label_names is None:
        numbers = [key for key in classes.keys or () if key is not None]
        if numbers and all(map(_is_number, numbers)) and [int(n) for n in numbers] != list(range(len(classes))):
            raise ValueError(
                f"labels holds integers, and class_names has the keys {_listed(numbers)}; give a name for each of 0 to "
                f"{len(classes) - 1}, or a list of names in the labels' order."
            )
        _check_range(tensor, len(classes))
        return tensor, {}
    _check_range(tensor, len(label_names))
    index = classes.match(list(dict.fromkeys(label_names[label] for label in sorted(set(tensor.tolist())))), where)
    table = torch.tensor([index.get(name, -1) for name in label_names])
    return table[tensor], _said(index, classes)


def check_has_classes(labels: Any, classes: ClassNames | None) -> None:
    """Refuse labels of which nobody says what they mean.

    Raises:
        ValueError: If there are labels and no classes.
    """
    if labels is not None and classes is None:
        raise ValueError("There are labels and no class_names; say which classes they are, or leave the labels out.")


def matching_sentence(matched: Mapping[str, str]) -> str | None:
    """What was matched with what, in a line; None where everything has one name."""
    other = [f"{found} -> {name}" for found, name in matched.items() if found != name]
    return f"Matched by name: {_listed(other)}." if other else None


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted with the numbers in them as numbers: "2" comes before "10"."""

    def parts(name: str) -> tuple[list[tuple[str, int]], str]:
        return [(text, int(number or -1)) for text, number in re.findall(r"([^0-9]*)([0-9]*)", name)], name

    return sorted(names, key=parts)


def _as_integers(values: Any, count: int) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels are no integers ({error}); give one class index or class name an input.") from error
    if tensor.shape != (count,) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(
            f"labels has shape {tuple(tensor.shape)} and dtype {tensor.dtype} for {count} inputs; give one class index "
            "or class name an input."
        )
    return tensor.long()


def _check_range(labels: Tensor, classes: int) -> None:
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(
            f"labels holds {int(outside[0])}, but there are {classes} classes (0 to {classes - 1}). Give a name for "
            "every class, or drop the inputs of other classes."
        )


def _matched(found: Collection[str], classes: ClassNames) -> dict[str, int] | str:
    """Name -> class index, or what is wrong."""
    by_key, by_name = _lookup(classes.keys or ()), _lookup(classes.names)
    index: dict[str, int] = {}
    taken: dict[int, str] = {}
    for name in found:
        keyed, named = by_key(name), by_name(name)
        places = keyed or named
        if not places:
            return f"{name!r} fits none"
        if len(places) > 1:
            return f"{name!r} fits {len(places)} classes, numbers {', '.join(map(str, places))}"
        if named and places[0] not in named:
            return f"{name!r} is a key of one class and the name of another"
        if places[0] in taken:
            return f"{taken[places[0]]!r} and {name!r} both fit {classes.names[places[0]]!r}"
        index[name], taken[places[0]] = places[0], name
    return index


def _lookup(table: Sequence[str | None]) -> Callable[[str], list[int]]:
    """From a name to its places in a table: those that equal it, or else those that differ in case and separators."""
    exact, folded = _places(table, _composed), _places(table, _folded)
    return lambda name: exact.get(_composed(name)) or folded.get(_folded(name)) or []


def _places(table: Sequence[str | None], form: Callable[[str], str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(table):
        if name is not None:
            places.setdefault(form(name), []).append(place)
    return places


def _composed(name: str) -> str:
    """Accents as part of their letters: some file systems keep them apart."""
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", _composed(name)).strip().casefold()


def _is_number(key: Any) -> bool:
    return (isinstance(key, int) and not isinstance(key, bool)) or (
        isinstance(key, str) and re.fullmatch(r"[0-9]+", key) is not None
    )


def _distinct(labels: Iterable[str]) -> list[str]:
    return in_natural_order(set(labels))


def _said(index: Mapping[str, int], classes: ClassNames) -> dict[str, str]:
    return {found: classes.names[place] for found, place in index.items()}


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _other_classes(given: ClassNames, other: ClassNames, owner: str) -> str:
    source = "model.config.id2label" if owner == "the model" else "objective.class_names"
    return (
        f"class_names are not {owner}'s {len(other)} classes in its order. class_names: {_listed(given.names)}. Those "
        f"of {owner}: {_listed(other.names)}. Give class_names={source}; names that the data have are then matched "
        "with it."
    )
