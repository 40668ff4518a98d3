"""Texts: labels by index or by name, from every kind of data set."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch

from setar_peft.data.texts import NamedInputs
from tests.backbones import checks

TEXTS = ["where is my card", "block it", "what is the rate", "send money"]
NAMES = ["Card_lost", "exchange rate", "transfer"]
LABELS = [0, 0, 1, 2]


class Pairs(torch.utils.data.Dataset[Any]):
    classes = ("transfer", "card lost", "exchange-rate")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> Any:
        return TEXTS[number], [1, 1, 2, 0][number]


def test_texts_of_no_class_need_none() -> None:
    source = NamedInputs(checks.WordTokenizer(), TEXTS)
    assert (source.labels.tolist(), source.classes, source.matched) == ([-1] * len(TEXTS), None, {})
    with pytest.raises(ValueError, match="labels and no class_names"):
        NamedInputs(checks.WordTokenizer(), TEXTS, LABELS)


def test_every_kind_of_labels_and_data_gives_the_same_inputs() -> None:
    strings = datasets.Dataset.from_dict({"text": TEXTS, "label": [NAMES[label] for label in LABELS]})
    classes = datasets.ClassLabel(names=["transfer", "card lost", "unused", "exchange rate"])
    table = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 1, 3, 0]}).cast_column("label", classes)
    renamed = table.rename_columns({"text": "query", "label": "intent"})
    sources: list[NamedInputs] = [
        NamedInputs(checks.WordTokenizer(), data, labels, class_names=NAMES, batch_size=3, **settings)
        for data, labels, settings in (
            (TEXTS, LABELS, {}),
            (tuple(TEXTS), ["card lost", "card lost", "exchange rate", "transfer"], {}),
            (strings, None, {}),
            (table, None, {}),
            (table.to_iterable_dataset(), None, {}),
            (table, [NAMES[label] for label in LABELS], {}),
            (renamed, None, {"text_column": "query", "label_column": "intent"}),
            (Pairs(), None, {}),
        )
    ]
    expected = [inputs["input_ids"] for inputs, _ in sources[0].batches()]
    for source in sources:
        assert source.labels.tolist() == LABELS
        assert all(torch.equal(a["input_ids"], b) for (a, _), b in zip(source.batches(), expected, strict=True))
    assert sources[3].matched == {"transfer": "transfer", "card lost": "Card_lost", "exchange rate": "exchange rate"}
    with pytest.raises(ValueError, match=r"otherwise than class_names: transfer, card lost, unused, exchange rate"):
        NamedInputs(checks.WordTokenizer(), table, LABELS, class_names=NAMES)


@pytest.mark.parametrize(
    ("data", "labels", "piece"),
    [
        (TEXTS, ["transfer"] * 3 + ["loan"], "'loan' fits none"),
        (TEXTS, [0, 1, None, 2], "1 of 4 inputs have None for a label"),
        ([*TEXTS[:3], None], LABELS, r"Text 3 \(from 0\) is None, which is no text"),
        ("where is my card", LABELS, "The texts are a builtins.str; give a list of them"),
        ({"input_ids": torch.ones(4, 2)}, ["transfer"] * 3 + ["loan"], "'loan' fits none"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})), LABELS, "has the splits 'train'"),
    ],
)
def test_wrong_texts_and_labels_get_a_sentence(data: Any, labels: Any, piece: str) -> None:
    with pytest.raises(ValueError, match=piece):
        list(NamedInputs(checks.WordTokenizer(), data, labels, class_names=NAMES).batches())
