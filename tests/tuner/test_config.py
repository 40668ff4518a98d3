"""The configuration: what it refuses, what it writes, what it never writes."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftConfig, get_peft_model
from peft.utils.warning import PeftWarning
from torch import nn

from setar_peft import SeTARConfig
from tests.tuner.models import MLP


class Unserialisable:
    """An objective that can be neither copied nor pickled."""

    def __call__(self, model: nn.Module) -> float:
        return 0.0

    def __deepcopy__(self, memo: object) -> object:
        raise AssertionError("the objective was copied")

    def __reduce__(self) -> str:
        raise AssertionError("the objective was pickled")


def test_defaults_are_the_papers() -> None:
    config = SeTARConfig()
    assert config.target_modules is None
    assert config.rank_ratios is None
    assert config.finetune is False
    assert config.prune == "minor"
    assert config.order == "vision_text"
    assert config.candidate_ratios == (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)


@pytest.mark.parametrize(
    ("field", "value", "fragments"),
    [
        ("rank_ratios", 1.2, ["rank_ratios", "1.2", "[0, 1)"]),
        ("rank_ratios", -0.1, ["rank_ratios", "-0.1"]),
        ("rank_ratios", "0.2", ["rank_ratios", "'0.2'"]),
        ("rank_ratios", True, ["rank_ratios", "True"]),
        ("rank_ratios", {"fc1": 1.2}, ["rank_ratios['fc1']", "1.2"]),
        ("rank_ratios", {"fc1": float("nan")}, ["rank_ratios['fc1']", "nan"]),
        ("rank_ratios", {3: 0.2}, ["key 3"]),
        ("rank_ratios", {}, ["empty mapping"]),
        ("known_splits", {"fc1": 1}, ["known_splits", "leave it out"]),
        ("saved_shapes", [], ["saved_shapes", "leave it out"]),
        ("factors_saved", 1, ["factors_saved", "True or False"]),
        ("prune", "small", ["prune", "'small'", "'minor'"]),
        ("seed", -1, ["seed", "-1"]),
        ("seed", 0.5, ["seed", "0.5"]),
        ("finetune", "yes", ["finetune", "'yes'", "True or False"]),
        ("strict_base", 1, ["strict_base", "1"]),
        ("candidate_ratios", [0.1, 1.0], ["candidate_ratios", "1.0"]),
        ("candidate_ratios", [0.0], ["no ratio above 0"]),
        ("candidate_ratios", [0.1, 0.1], ["each ratio once"]),
        ("candidate_ratios", 0.1, ["candidate_ratios", "list"]),
        ("order", "up", ["order", "'up'", "'vision_text'"]),
        ("order", [], ["order", "list of module names"]),
        ("passes", 0, ["passes", "0"]),
        ("recording_memory", -1, ["recording_memory", "-1"]),
        ("layers_pattern", "layers", ["layers_pattern", "layers_to_transform"]),
        ("target_modules", 3, ["target_modules", "3"]),
        ("target_modules", "(fc", ["target_modules", "regular expression"]),
        ("modules_to_save", "head", ["modules_to_save", "'head'", "list"]),
        ("layers_to_transform", "1", ["layers_to_transform", "'1'"]),
    ],
)
def test_a_wrong_value_is_named(field: str, value: Any, fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\w+") as error:
        SeTARConfig(**{field: value})
    assert all(fragment in str(error.value) for fragment in fragments), error.value


def test_random_factors_without_fine_tuning_change_nothing_and_it_is_said() -> None:
    with pytest.warns(PeftWarning, match="init_weights=False changes nothing without finetune=True"):
        SeTARConfig(rank_ratios=0.2, init_weights=False)


def test_ratios_that_are_known_are_not_searched_for() -> None:
    with pytest.raises(ValueError, match="rank_ratios and objective are both given") as error:
        SeTARConfig(rank_ratios=0.2, objective=Unserialisable())
    assert "CardFacts(objective=...)" in str(error.value)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), Fraction(1, 4), 0])
def test_ratios_are_any_real_number(number: Any) -> None:
    config = SeTARConfig(rank_ratios={"fc1": number}, candidate_ratios=[number, 0.5])
    values = [config.rank_ratios["fc1"], *config.candidate_ratios]
    assert values == [float(number), float(number), 0.5]
    assert all(type(value) is float for value in values)


def test_block_numbers_and_a_regular_expression_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="cannot be combined with a regular expression"):
        SeTARConfig(target_modules=r".*fc", layers_to_transform=[0])


def test_the_objective_is_never_serialised_copied_or_compared(tmp_path: Path) -> None:
    config = SeTARConfig(target_modules=["fc1"], objective=Unserialisable(), strict_base=True)
    assert "objective" not in config.to_dict()
    assert "strict_base" not in config.to_dict()
    assert "Unserialisable" not in repr(config)
    assert config == SeTARConfig(target_modules=["fc1"])
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.objective is None
        assert twin == config
    config.save_pretrained(tmp_path)
    assert SeTARConfig.from_pretrained(tmp_path) == config
    assert config.objective is not None


def test_the_file_has_every_field_and_is_the_same_each_time(tmp_path: Path) -> None:
    names = [f"fc{index}" for index in range(20)]
    config = SeTARConfig(target_modules=names, rank_ratios=0.2)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    fields = {field.name for field in dataclasses.fields(config)} - {
        *("objective", "strict_base", "card", "known_splits", "saved_shapes")
    }
    assert fields <= set(values)
    assert values["target_modules"] == sorted(names)
    assert values["peft_type"] == "SETAR"


def test_roundtrip_through_the_generic_class(tmp_path: Path) -> None:
    config = SeTARConfig(
        rank_ratios={"fc1": 0.2, "fc2": 0.0}, prune="random", seed=4, finetune=True, order=["fc2", "fc1"], passes=2
    )
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), SeTARConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SeTARConfig
        assert loaded == config
        assert not loaded.factors_saved


def test_a_saved_adapters_config_says_that_factors_come_with_it(tmp_path: Path) -> None:
    config = SeTARConfig(rank_ratios=0.25, target_modules=["fc1", "fc2"])
    model = get_peft_model(MLP(), config)
    assert config.rank_ratios == 0.25
    model.save_pretrained(tmp_path)
    loaded = SeTARConfig.from_pretrained(tmp_path)
    assert loaded.factors_saved
    assert loaded.rank_ratios == model.peft_config["default"].rank_ratios == {"fc1": 0.25, "fc2": 0.25}


def test_a_replaced_config_is_still_that_of_a_saved_adapter(tmp_path: Path) -> None:
    get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.25})).save_pretrained(tmp_path)
    loaded = SeTARConfig.from_pretrained(tmp_path)
    for twin in (
        dataclasses.replace(loaded, strict_base=True),
        copy.copy(loaded),
        copy.deepcopy(loaded),
        pickle.loads(pickle.dumps(loaded)),
    ):
        assert twin.factors_saved
        assert twin.weights_sha256 is not None
        assert twin.weights_sha256 == loaded.weights_sha256
        assert twin.saved_shapes == loaded.saved_shapes
        assert twin.saved_shapes.weights == {"fc1": (16, 12)}


def test_saving_changes_nothing_in_the_config(tmp_path: Path) -> None:
    config = SeTARConfig(rank_ratios={"fc1": 0.25})
    model = get_peft_model(MLP(), config)
    own = model.peft_config["default"]
    model.save_pretrained(tmp_path)
    assert own.weights_sha256 is None
    assert config.rank_ratios == {"fc1": 0.25}
    assert not config.factors_saved
    assert json.loads((tmp_path / "adapter_config.json").read_text())["weights_sha256"]


def test_an_adapters_config_without_ratios_is_refused(tmp_path: Path) -> None:
    get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.25})).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    for ratios in (None, 0.25):
        path.write_text(json.dumps({**values, "rank_ratios": ratios}))
        with pytest.raises(ValueError, match="no rank_ratios by module name"):
            SeTARConfig.from_pretrained(tmp_path)


def test_a_field_of_a_later_version_is_left_out_with_a_warning(tmp_path: Path) -> None:
    SeTARConfig(rank_ratios=0.2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    with pytest.warns(UserWarning, match="later"):
        assert SeTARConfig.from_pretrained(tmp_path) == SeTARConfig(rank_ratios=0.2)
