"""Copy the reference of a loss if training would change it: the base model, or the adapter that training continues."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from trl import DPOConfig, DPOTrainer

from .model_at import REFERENCE_ADAPTER
from .types import SteeringRun


def reference_model(trainer: Any) -> Any:
    """The separate reference that TRL's DPO keeps for full finetuning; None if it keeps none."""
    return trainer.ref_model if isinstance(trainer, DPOTrainer) else None


def reference_copy(trainer: SteeringRun) -> nn.Module | None:
    """Copy the model before full finetuning changes it; None if the parent keeps a reference.

    Raises:
        ValueError: the model is sharded, which its copy would not be.
    """
    if reference_model(trainer) is not None:
        return None
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"{type(trainer.loss).__name__} compares with the base model, but full finetuning changes it, and a copy "
            "of it would not be sharded. Train an adapter, or use SteeringDPOTrainer."
        )
    return copy.deepcopy(trainer.model).eval().requires_grad_(False)


@contextmanager
def reference_of(given: Mapping[str, Any], parent: Any) -> Iterator[None]:
    """Context for constructing TRL's DPO, in which it copies the active adapter to `ref`, whatever its name.

    TRL copies the adapter `default`. Without one, the configuration of the active adapter takes its place, and its
    values are copied afterwards.

    Args:
        given: Arguments of the trainer's constructor.
        parent: The parent's constructor.

    Raises:
        ValueError: there is another adapter `default`, or reference log-probabilities are computed before the values
            are copied.
    """
    model: Any = given.get("model")
    makes_reference = "ref_model" in inspect.signature(parent).parameters and given.get("ref_model") is None
    active = str(model.active_adapter) if isinstance(model, PeftModel) and makes_reference else "default"
    if active == "default":
        yield
        return
    args = given.get("args")
    if "default" in model.peft_config or (isinstance(args, DPOConfig) and args.precompute_ref_log_probs):
        raise ValueError(
            f"The adapter {active!r} is trained, but DPOTrainer compares with a copy of the adapter 'default'"
            f"{' that the model also has' if 'default' in model.peft_config else ', made before training starts'}. "
            "Load the adapter to train as 'default' (PeftModel.from_pretrained(base, folder, is_trainable=True)), and "
            "set precompute_ref_log_probs=False."
        )
    model.peft_config["default"] = model.peft_config[active]
    try:
        yield
    finally:
        del model.peft_config["default"]
    _copy_adapter(model, active)


def add_reference(model: PeftModel, parent: Any) -> None:
    """Add a frozen copy of the adapter that training continues, unless the parent does this, as TRL's DPO does."""
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
