"""Register the method with PEFT.

PEFT has no plug-in discovery: `register_peft_method` accepts only members of the `PeftType` enum, so this module adds
the member first, and then calls PEFT's own function. A process that has not imported `steertune.adapters` cannot load
its adapters (`KeyError: 'STEERING_VECTOR'`).
"""

from __future__ import annotations

from peft import PeftType
from peft.utils import register_peft_method

NAME = "steering_vector"
AUTO = "AUTO"
"""The `task_type` of a configuration without one, until its model is known (see `tasks`)."""


def _ensure_peft_type(value: str) -> PeftType:
    """`PeftType(value)`; the member is added if PEFT does not have it."""
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_ = member._value_ = value
        member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
        member._sort_order_ = len(PeftType)  # pyright: ignore[reportAttributeAccessIssue]
        type.__setattr__(PeftType, value, member)
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
    return PeftType(value)


PEFT_TYPE = _ensure_peft_type(NAME.upper())


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT (once per process)."""
    register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=False)
