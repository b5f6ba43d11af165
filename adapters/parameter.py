"""The parameter that holds vectors: fp32 whatever the model's precision, in units of the stream for optimisers."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn

from . import units
from .saved import check_tensor


class Vector(nn.Module):
    """One fp32 parameter. It is a module because FSDP, TRL and PEFT handle `<name>.<adapter>.weight` well, and entries
    of a `ParameterDict` badly."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float32, device=device))
        self.unit: float | None = None
        """The number that optimisers divide it by (see `units`); None if its learning rate is absolute."""
        self.exact: Tensor | None = None
        """The last value set or loaded, to undo a later cast to half precision without loss."""
        self.register_load_state_dict_pre_hook(_check_loaded)
        units.track(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # copied, or unpickled
        units.track(self)

    @torch.no_grad()
    def restore_fp32(self) -> None:
        """Undo a cast to half precision. The `Parameter` object stays the same, so optimisers keep it.

        Raises:
            RuntimeError: several processes train, so DistributedDataParallel already has buckets for the cast
                parameter.
        """
        weight = self.weight
        if weight.dtype not in (torch.bfloat16, torch.float16) or not weight.requires_grad:
            return
        if hasattr(weight, "device_mesh") or weight.numel() == 0 or _deepspeed_trains():
            return  # sharded, or DeepSpeed's optimiser holds an fp32 copy
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError(
                f"A steering vector was cast to {weight.dtype} before training in several processes: half precision "
                "cannot take its steps, and DistributedDataParallel cannot change to fp32 any more. Train with a "
                "steertune trainer, or cast it back (parameter.data = parameter.data.float()) before train()."
            )
        exact = weight.float() if self.exact is None else self.exact.to(weight.device)
        rounded_only = torch.equal(exact.to(weight.dtype), weight)
        weight.data = exact.clone() if rounded_only else weight.data.float()


class Frozen(Vector):
    """Vectors that are saved with the adapter and never trained: a buffer, because PEFT trains every parameter."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__(shape, device)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


def _deepspeed_trains() -> bool:
    return is_initialized() and AcceleratorState().distributed_type == DistributedType.DEEPSPEED


def _check_loaded(module: Vector, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    loaded = state_dict.get(f"{prefix}weight")
    if loaded is not None and not loaded.is_meta:
        check_tensor(f"{prefix}weight", loaded)
        state_dict[f"{prefix}weight"] = loaded.float()
        module.exact = loaded.detach().float().clone()
