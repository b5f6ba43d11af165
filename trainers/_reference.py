"""What a loss compares with, kept where training would take it away: the base, or the adapter that goes on."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn

from ._at import REFERENCE_ADAPTER

if TYPE_CHECKING:
    from ._mixin import SteeringMixin


def reference_copy(trainer: SteeringMixin) -> nn.Module | None:
    """A copy of the model before full finetuning changes it; None where the parent keeps one.

    Raises:
        ValueError: the model is sharded, which its copy would not be.
    """
    if getattr(trainer, "ref_model", None) is not None:
        return None
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"{type(trainer.loss).__name__} compares with the base model, and full finetuning changes it: the copy "
            "kept for that would not be sharded. Train an adapter, or use SteeringDPOTrainer."
        )
    return copy.deepcopy(trainer.model).eval().requires_grad_(False)


def add_reference(model: PeftModel, parent: Any) -> None:
    """Keep a frozen copy of the adapter that training continues, as TRL's DPO does by itself."""
    if "ref_model" in inspect.signature(parent).parameters or REFERENCE_ADAPTER in model.peft_config:
        return
    active = str(model.active_adapter)
    model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(model.peft_config[active]))
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if f".{active}." in name:
                model.get_parameter(name.replace(f".{active}.", f".{REFERENCE_ADAPTER}.")).copy_(parameter)
