"""The PEFT plugin. Importing it registers the method SETAR with PEFT."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.hub import push_adapter_card
from setar_peft.tuner.layer import SeTARLayer
from setar_peft.tuner.linear import SeTARLinear
from setar_peft.tuner.model import SeTARModel
from setar_peft.tuner.peft_type import SETAR

__all__ = ["SeTARConfig", "SeTARLayer", "SeTARLinear", "SeTARModel"]

if SETAR not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="setar", config_cls=SeTARConfig, model_cls=SeTARModel)
push_adapter_card()
