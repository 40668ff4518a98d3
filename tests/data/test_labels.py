"""Where labels meet class names: by name or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from setar_peft.data.labels import ClassNames, class_indices, in_natural_order, matching_sentence

NAMES = ["Cat", "Fish", "Dog"]


def test_names_are_matched_exactly_and_then_folded() -> None:
    assert ClassNames.of(NAMES).match(["cat", "dog", "fish"], "They") == {"cat": 0, "dog": 2, "fish": 1}
    vehicles = ClassNames.of(["red car", "Red-Car ", "tree frog"])
    # Two classes that fold to one name are told apart exactly, or not at all.
    assert vehicles.match(["red car", "Tree_Frog"], "They") == {"red car": 0, "Tree_Frog": 2}
    # Accents that a file system has taken apart.
    assert ClassNames.of(["Ju\u0308rgen", "b"]).match(["J\u00fcrgen"], "They") == {"J\u00fcrgen": 0}


@pytest.mark.parametrize(
    ("names", "found", "pieces"),
    [
        (NAMES, ["cat", "bird"], ["'bird' fits none", "They: cat, bird.", "Class names: Cat, Fish, Dog"]),
        (["red car", "red_car"], ["Red Car"], ["'Red Car' fits 2 classes, numbers 0, 1"]),
        (["red car", "frog"], ["red_car", "red car"], ["'red_car' and 'red car' both fit 'red car'"]),
        (["crane", "crane"], ["crane"], ["'crane' fits 2 classes"]),
        ([str(n) for n in range(30)], ["x"], ["Class names: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 18 more"]),
        (NAMES, ["n01440764"], ["Nothing is matched by position", '{"n01440764": "tench", ...}', "--classes"]),
        ({"a": "b", "b": "a"}, ["a", "b"], ["'a' is a key of one class and the name of another"]),
    ],
)
def test_what_does_not_fit_is_refused_with_both_lists(names: Any, found: list[str], pieces: list[str]) -> None:
    with pytest.raises(ValueError, match="They do not match the class names") as error:
        ClassNames.of(names).match(found, "They")
    for piece in pieces:
        assert piece in str(error.value)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({1: "dog", 0: "cat"}, ("cat", "dog")),
        ({str(n): f"c{n}" for n in reversed(range(12))}, tuple(f"c{n}" for n in range(12))),
        ({"n2": "tench", "n1": "shark"}, ("tench", "shark")),
        (np.array(["cat", "dog"]), ("cat", "dog")),
    ],
)
def test_class_names_as_users_have_them(given: Any, names: tuple[str, ...]) -> None:
    assert ClassNames.of(given).names == names


@pytest.mark.parametrize(
    ("given", "piece"),
    [
        ({"cat", "dog"}, "class_names is a set, which has no order; give a list"),
        (frozenset({"cat", "dog"}), "class_names is a frozenset"),
        ({0: "cat", 2: "dog"}, "indices 0, 2; give a name for each of 0 to 1"),
        ({1: "cat", 2: "dog"}, "indices 1, 2"),
        ({0: "cat", "dog": "dog"}, r"keys \[0, 'dog'\]"),
        ({True: "cat", False: "dog"}, "indices True, False"),
        ({}, "at least two"),
        (None, "at least two"),
        ("cat", "at least two"),
        (["cat", 3], "at least two"),
    ],
)
def test_class_names_that_are_none_get_a_sentence(given: Any, piece: str) -> None:
    with pytest.raises(ValueError, match=piece):
        ClassNames.of(given)


def test_labels_of_every_kind_become_indices() -> None:
    classes = ClassNames.of(NAMES)
    for labels in ([0, 2, 1], torch.tensor([0, 2, 1]), np.array([0, 2, 1]), range(3), iter([0, 2, 1])):
        count = 3
        found, matched = class_indices(labels, None, count, classes)
        assert found.tolist() == ([0, 1, 2] if isinstance(labels, range) else [0, 2, 1])
        assert matched == {}
    for labels in (["cat", "dog", "dog"], np.array(["cat", "dog", "dog"]), np.array(["cat", "dog", "dog"], object)):
        found, matched = class_indices(labels, None, 3, classes)
        assert found.tolist() == [0, 2, 2]
        assert matched == {"cat": "Cat", "dog": "Dog"}
    # Integers that stand for names, as in a ClassLabel, in another order; names that do not occur need not fit.
    found, matched = class_indices([1, 3, 0], ["fish", "dog", "bird", "cat"], 3, classes)
    assert found.tolist() == [2, 0, 1]
    assert matched == {"fish": "Fish", "dog": "Dog", "cat": "Cat"}
    assert class_indices(None, None, 2, None)[0].tolist() == [-1, -1]


def test_duplicate_names_are_allowed_where_labels_are_integers() -> None:
    crane = ClassNames.of(["crane", "tench", "crane"])
    assert class_indices([0, 2], None, 2, crane)[0].tolist() == [0, 2]
    with pytest.raises(ValueError, match="'crane' fits 2 classes, numbers 0, 2"):
        class_indices(["crane", "tench"], None, 2, crane)
    # What the data call them tells them apart.
    keyed = ClassNames.of({"n02012849": "crane", "n01440764": "tench", "n03126707": "crane"})
    assert class_indices(["n03126707", "n02012849"], None, 2, keyed)[0].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("labels", "label_names", "piece"),
    [
        (None, None, "no labels; give labels"),
        ([0, None, None], None, r"2 of 3 inputs have None for a label \(the first is number 1"),
        ([0, "Cat", 1], None, "labels holds names and numbers"),
        ([0, 1], None, "There are 2 labels for 3 inputs"),
        (torch.tensor([0, 1]), None, r"labels has shape \(2,\)"),
        (["Cat", "Dog"], None, "There are 2 labels for 3 inputs; give one for each"),
        ([True, False, True], None, "dtype torch.bool"),
        ([0.0, 1.0, 2.0], None, "dtype torch.float32"),
        ([0, 1, 3], None, r"labels holds 3, but there are 3 classes \(0 to 2\)"),
        ([0, 1, -1], ["cat", "dog"], r"labels holds -1, but there are 2 classes"),
        ([0, 1, 1], ["cat", "bird"], "'bird' fits none"),
        ([[0], [1], [2]], None, r"labels has shape \(3, 1\)"),
        ([object()] * 3, None, "labels are no integers"),
    ],
)
def test_wrong_labels_get_a_sentence(labels: Any, label_names: list[str] | None, piece: str) -> None:
    with pytest.raises(ValueError, match=piece):
        class_indices(labels, label_names, 3, ClassNames.of(NAMES))


def test_folders_by_number_are_no_indices() -> None:
    """Keys 1 ... 3 name folders; whether 1 is then the first or the second class is not for a guess."""
    flowers = ClassNames.of({"1": "rose", "3": "aster", "2": "lily"})
    assert class_indices(["3", "1"], None, 2, flowers)[0].tolist() == [2, 0]
    with pytest.raises(ValueError, match="integers, and class_names has the keys 1, 2, 3; give a name for each of 0"):
        class_indices([1, 2], None, 2, flowers)
    by_index = ClassNames.of({str(n): f"c{n}" for n in range(12)})
    assert class_indices([10, 2], None, 2, by_index)[0].tolist() == [10, 2]
    assert class_indices(["10", "2"], None, 2, by_index)[0].tolist() == [10, 2]


def test_names_in_a_models_order() -> None:
    model = ClassNames.of_model({"0": "Trouser", "1": "Ankle boot", "2": "Bag"})
    assert model is not None
    assert ClassNames.of(["bag", "ankle_boot", "Trouser"]).in_order_of(model).names == model.names
    keyed = ClassNames.of({"x": "Bag", "y": "Trouser"}).in_order_of(model)
    assert (keyed.names, keyed.keys) == (model.names, ("y", None, "x"))
    assert keyed.match(["x"], "They") == {"x": 2}
    # A mapping may be of what does not match by itself alone, such as a name that no folder can have.
    assert keyed.match(["x", "ankle boot"], "They") == {"x": 2, "ankle boot": 1}
    with pytest.raises(ValueError, match=r"not the model's 3 classes.*Bag, Trouser\..*Trouser, Ankle boot, Bag"):
        ClassNames.of(["Bag", "Trouser"]).in_order_of(model)
    with pytest.raises(ValueError, match="'Hat' fits none"):
        ClassNames.of(["Bag", "Trouser", "Hat"]).in_order_of(model)
    ClassNames.of(["trouser", "ankle-boot", "bag"]).check_order_of(model, "the model")
    with pytest.raises(ValueError, match=r"in its order.*class_names=model.config.id2label"):
        ClassNames.of(["Bag", "Ankle boot", "Trouser"]).check_order_of(model, "the model")
    twins = ClassNames.of_model({0: "crane", 1: "tench", 2: "crane"})
    assert twins is not None
    assert ClassNames.of({"a": "crane", "b": "tench", "c": "crane"}).in_order_of(twins).keys == ("a", "b", "c")
    with pytest.raises(ValueError, match="has 'crane' twice"):
        ClassNames.of({"a": "crane", "c": "crane", "b": "tench"}).in_order_of(twins)
    assert ClassNames.of_model({0: "LABEL_0", 1: "LABEL_1"}) is None


def test_what_was_matched_is_said_where_names_differ() -> None:
    assert matching_sentence({"cat": "cat"}) is None
    assert matching_sentence({"cat": "Cat", "dog": "dog"}) == "Matched by name: cat -> Cat."


def test_numbers_in_names_are_sorted_as_numbers() -> None:
    names = [str(number) for number in range(12)]
    assert in_natural_order(sorted(names)) == names
    assert in_natural_order(["b", "a10", "a9", "a"]) == ["a", "a9", "a10", "b"]
