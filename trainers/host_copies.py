"""Host copies of a batch's tensors, so that reading a batch's contents does not wait for the device.

Cache keys, prompt lengths and label positions are computed from the tensors that the collator made. These travel with
the batch, and `on_host` finds them by the tensors on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KEY = "on_host"  # in a collated batch
_copies: Any = WeakTensorKeyDictionary()  # tensor on a device -> the same values on the host


def waits(device: torch.device) -> bool:
    """Whether the host has to wait before it can read a tensor on this device."""
    return device.type != "cpu"


class _HostTensors:
    """A box that accelerate does not look into, so that its tensors stay on the host."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors


class KeepsHost:
    """A collator whose batches also carry host copies of their tensors.

    Args:
        collator: The collator that makes the batches.
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: Any) -> Any:
        """Collate examples."""
        batch = self.collator(examples)
        if isinstance(batch, Mapping):
            batch = {**batch, _KEY: _HostTensors({k: v for k, v in batch.items() if isinstance(v, Tensor)})}
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # a worker process unpickles this object before it has the attribute
            raise AttributeError(name)
        return getattr(self.collator, name)


def unpacked(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without the box of `KeepsHost`; afterwards `on_host` finds the tensors that were in the box."""
    inputs = dict(inputs)
    box = inputs.pop(_KEY, None)
    for name, host in ({} if box is None else box.tensors).items():
        tensor = inputs.get(name)
        if isinstance(tensor, Tensor) and tensor.shape == host.shape:
            _copies[tensor] = host
    return inputs


def on_host(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU: its host copy, or, if it has none, a new copy that the host waits for."""
    host = _copies.get(tensor)
    return tensor.cpu() if host is None else host


def both(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function to tensors on their device, and to their host copies if all of them have one."""
    result = function(*tensors)
    hosts = [_copies.get(tensor) for tensor in tensors]
    if all(host is not None for host in hosts):
        _copies[result] = function(*hosts)
    return result


def sent(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for it to arrive."""
    if device.type == "cpu":
        return host
    tensor = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    _copies[tensor] = host
    return tensor
