"""Making the method BOTTLENECK known to PEFT.

PEFT's registry takes methods from outside through `register_peft_method`, but checks their name against the closed enum
`PeftType` first. So the member is added to the enum here, the only place that touches PEFT's inside, with a test of its
own (found on peft 0.21.2).
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.utils import register_peft_method

from ..errors import AdapterError

NAME = "BOTTLENECK"
PREFIX = "bottleneck_"


def _add_member() -> Any:
    """Returns ``PeftType.BOTTLENECK``, added to the enum if it is not in there.

    Raises:
        AdapterError: PEFT's enum can no longer be extended this way.
    """
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    try:
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    except (AttributeError, TypeError) as error:
        raise AdapterError(f"This PEFT does not let hf_freeze add its method ({error}). Install peft 0.21.") from error
    return member


PEFT_TYPE = _add_member()


def register(config_class: type, model_class: type) -> None:
    """Registers the method with PEFT, once."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=PREFIX)
