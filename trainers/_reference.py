"""What a loss compares with, kept where training would take it away: the base, or the adapter that goes on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def reference_of(given: Mapping[str, Any], parent: Any) -> Iterator[None]:
    """While TRL's DPO is made: the frozen copy `ref` is one of the active adapter, whatever its name.

    TRL copies the adapter `default`. Where there is none, its place is taken by the configuration of the active one,
    whose values are then copied here.

    Raises:
        ValueError: there is another adapter `default`, or reference log-probabilities are computed before the values
            are there.
    """
    model: Any = given.get("model")
    own = "ref_model" in inspect.signature(parent).parameters and given.get("ref_model") is None
    active = str(model.active_adapter) if isinstance(model, PeftModel) and own else "default"
    if active == "default":
        yield
        return
    if "default" in model.peft_config or getattr(given.get("args"), "precompute_ref_log_probs", False):
        raise ValueError(
            f"The adapter {active!r} is trained, and DPOTrainer compares with a copy of the adapter 'default'"
            f"{' that is there too' if 'default' in model.peft_config else ', made before training starts'}. Load the "
            "adapter to train as 'default' (PeftModel.from_pretrained(base, folder, is_trainable=True)), and set "
            "precompute_ref_log_probs=False."
        )
    model.peft_config["default"] = model.peft_config[active]
    try:
        yield
    finally:
        del model.peft_config["default"]
    _copy_adapter(model, active)


def add_reference(model: PeftModel, parent: Any) -> None:
    """Keep a frozen copy of the adapter that training continues, as TRL's DPO does by itself."""
    if "ref_model" in inspect.signature(parent).parameters or REFERENCE_ADAPTER in model.peft_config:
        return
    active = str(model.active_adapter)
    model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(model.peft_config[active]))
    _copy_adapter(model, active)


@torch.no_grad()
def _copy_adapter(model: PeftModel, active: str) -> None:
    for name, parameter in list(model.named_parameters()):
        if f".{active}." in name:
            model.get_parameter(name.replace(f".{active}.", f".{REFERENCE_ADAPTER}.")).copy_(parameter)
