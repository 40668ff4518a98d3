"""The member SETAR of PEFT's enum of methods.

PEFT registers a method under a member of `PeftType`, and both PEFT and transformers read the member's `.value`, so
that a plain string does not do. `PeftType` has no door for a third party: the member is added by hand, the way the
enum machinery would.
"""

from __future__ import annotations

from peft.utils.peft_types import PeftType

_NAME = "SETAR"


def _peft_type() -> PeftType:
    if _NAME in PeftType.__members__:
        return PeftType[_NAME]
    member = str.__new__(PeftType, _NAME)
    member._name_ = _NAME
    member._value_ = _NAME
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    type.__setattr__(PeftType, _NAME, member)
    return member


SETAR = _peft_type()
