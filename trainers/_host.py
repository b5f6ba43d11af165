"""What a batch holds, known without waiting for the device it was sent to.

Keys of memos, lengths of prompts and places of labels are computed from the collator's own tensors. They travel with
the batch, and `on_host` finds them beside the tensors that were sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_NAME = "on_host"  # in a collated batch
_kept: Any = WeakTensorKeyDictionary()


def waits(device: torch.device) -> bool:
    """Whether the host has to wait to see what a tensor on this device holds."""
    return device.type != "cpu"


class _Kept:
    """Tensors that accelerate does not send to the device: neither a tensor nor a collection of them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors


class KeepsHost:
    """A collator whose batches carry their tensors as they are on the host.

    Args:
        collator: Makes the batches.
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: Any) -> Any:
        """The collator's batch."""
        batch = self.collator(examples)
        if isinstance(batch, Mapping):
            batch = {**batch, _NAME: _Kept({k: v for k, v in batch.items() if isinstance(v, Tensor)})}
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.collator, name)


def unpacked(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the collator made it; what `KeepsHost` put into it is found by `on_host` from now on."""
    inputs = dict(inputs)
    kept = inputs.pop(_NAME, None)
    for name, host in ({} if kept is None else kept.tensors).items():
        sent = inputs.get(name)
        if isinstance(sent, Tensor) and sent.shape == host.shape:
            _kept[sent] = host
    return inputs


def on_host(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU. Of a tensor that nothing was kept of they are copied, for which the host waits."""
    host = _kept.get(tensor)
    return tensor.cpu() if host is None else host


def both(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, on the host as well if all of them are known there."""
    found = function(*tensors)
    hosts = [_kept.get(tensor) for tensor in tensors]
    if all(host is not None for host in hosts):
        _kept[found] = function(*hosts)
    return found


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; nobody waits for it to arrive."""
    if device.type == "cpu":
        return host
    there = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    _kept[there] = host
    return there
