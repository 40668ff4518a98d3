"""The member SETAR of PEFT's enum."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys

from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import setar_peft.tuner
from setar_peft import SeTARConfig, SeTARModel
from setar_peft.tuner.peft_type import SETAR
from tests.tuner.models import MLP


def test_is_a_member_like_the_others() -> None:
    assert isinstance(SETAR, PeftType)
    assert SETAR == "SETAR"
    assert (SETAR.name, SETAR.value) == ("SETAR", "SETAR")
    assert PeftType("SETAR") is PeftType["SETAR"] is PeftType.SETAR is SETAR  # type: ignore[attr-defined]
    assert list(PeftType)[-1] is SETAR
    assert SETAR in PeftType
    assert str(SETAR.value).lower() == "setar"


def test_survives_copy_and_pickle() -> None:
    assert copy.deepcopy(SETAR) is SETAR
    assert pickle.loads(pickle.dumps(SETAR)) is SETAR


def test_is_registered_with_peft() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[SETAR] is SeTARConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[SETAR] is SeTARModel
    # transformers knows adapter tensors by it.
    assert PEFT_TYPE_TO_PREFIX_MAPPING[SETAR] == "setar_"


def test_importing_twice_is_fine() -> None:
    count = len(PeftType)
    importlib.reload(setar_peft.tuner.peft_type)
    importlib.reload(setar_peft.tuner)
    assert len(PeftType) == count
    assert PeftType["SETAR"] is SETAR


def test_import_order_does_not_matter() -> None:
    code = (
        "import sys\n"
        "for name in sys.argv[1:]: __import__(name)\n"
        "import setar_peft; from peft import PeftType; assert PeftType('SETAR').value == 'SETAR'"
    )
    for order in (["peft", "setar_peft"], ["setar_peft", "peft"]):
        subprocess.run([sys.executable, "-c", code, *order], check=True)


def test_config_of_the_generic_class_dispatches(tmp_path: object) -> None:
    model = get_peft_model(MLP(), SeTARConfig(rank_ratios={"fc1": 0.25}))
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is SeTARConfig
    assert config.peft_type is SETAR
    assert config.rank_ratios == {"fc1": 0.25}
