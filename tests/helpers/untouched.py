"""What of a model and of the process an observer may not change."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from steertune.adapters import SteeringVectorLayer


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that decides what a model computes and what is trained of it, and all random numbers to come."""
    modules = dict(model.named_modules())
    wholes = {n: m for n, m in modules.items() if isinstance(m, PeftModel | BaseTuner)}
    layers = {n: m for n, m in modules.items() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}
    steering = {n: m for n, m in modules.items() if isinstance(m, SteeringVectorLayer)}
    return {
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "identities": {name: id(p) for name, p in model.named_parameters()},
        "gradients": {name: p.grad is None for name, p in model.named_parameters()},
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
        "modes": {name: m.training for name, m in modules.items()},
        "active": {name: [*m.active_adapters] for name, m in layers.items()},
        "active of all": {name: str(m.active_adapter) for name, m in wholes.items()},
        "disabled": {name: m.disable_adapters for name, m in layers.items()},
        "scaling": {name: dict(m.scaling) for name, m in layers.items() if hasattr(m, "scaling")},
        "strength": {name: dict(m.strength) for name, m in steering.items()},
        "boundary": {name: m.boundary.declared for name, m in steering.items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "forwards": {name: "forward" in vars(m) for name, m in modules.items()},
        "checkpointing": {name: getattr(m, "gradient_checkpointing", None) for name, m in modules.items()},
        "adapters": sorted(getattr(model, "peft_config", {})),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    found = []
    for kind, old in before.items():
        new = after[kind]
        if isinstance(old, dict):
            found += [
                f"{kind} of {name}" for name in old.keys() | new.keys() if not _same(old.get(name), new.get(name))
            ]
        elif not _same(old, new):
            found.append(kind)
    return sorted(found)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return torch.equal(torch.nan_to_num(old), torch.nan_to_num(new)) and old.dtype == new.dtype
    return old == new
