"""Caches of rows that come and go: what was read of new rows is put beside that of running ones.

Rows end at the same column, and shorter ones are padded on the left; the mask says where. Keys and values of a padded
column are never attended to, so padding may be added and removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from steertune.adapters.caches import cache_in

_ATTENTION = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
_RECURRENT = (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)


def new_cache(model: nn.Module) -> DynamicCache | None:
    """An empty cache whose rows can be joined; None if the model keeps states that cannot be: then its rows run one at
    a time, in the cache that it makes itself."""
    config: Any = model.config
    try:
        cache = DynamicCache(config=config)
    except (KeyError, AttributeError, TypeError):  # layers of a kind of the model's own
        return None
    kinds = {type(layer) for layer in cache.layers}
    if kinds <= {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}:
        return DynamicCache()  # whole rows instead of windows, whose columns would differ from layer to layer
    joinable = kinds <= {*_ATTENTION, *_RECURRENT, DummyLayer} and kinds & {*_ATTENTION}
    return cache if joinable else None


class States:
    """What the model has read of some rows.

    Attributes:
        cache: The model's own cache.
        name: Argument under which the model takes it.
        mask_BT: 1 on the columns of each row that hold a token.
    """

    def __init__(self, cache: Any, name: str, mask_BT: Tensor) -> None:
        self.cache, self.name, self.mask_BT = cache, name, mask_BT

    @classmethod
    def of(cls, output: Any, mask_BT: Tensor) -> States:
        """The states in the output of a forward pass."""
        cache = cache_in(output)
        return cls(cache, next(name for name, value in output.items() if value is cache), mask_BT)

    @property
    def columns(self) -> int:
        """Columns read so far."""
        return self.mask_BT.shape[1]

    def join(self, other: States) -> None:
        """Put the rows of `other` behind these."""
        width = max(self.columns, other.columns)
        self._widen(width)
        other._widen(width)
        self.mask_BT = torch.cat([self.mask_BT, other.mask_BT])
        for layer, added in zip(self.cache.layers, other.cache.layers, strict=True):
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                layer.keys = torch.cat([layer.keys, added.keys])
                layer.values = torch.cat([layer.values, added.values])
            for states, added_states in zip(_recurrent(layer), _recurrent(added), strict=True):
                for i, value in states.items():
                    states[i] = None if value is None else torch.cat([value, added_states[i]])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the columns that only they filled."""
        index = torch.tensor(list(rows), device=self.mask_BT.device)
        self.mask_BT = self.mask_BT[index]
        empty = int((self.mask_BT.sum(dim=0) == 0).int().cumprod(0).sum())  # leading columns of padding
        self.mask_BT = self.mask_BT[:, empty:]
        for layer in self.cache.layers:
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                layer.keys = layer.keys[index][..., empty:, :]
                layer.values = layer.values[index][..., empty:, :]
            for states in _recurrent(layer):
                for i, value in states.items():
                    states[i] = None if value is None else value[index]

    def _widen(self, width: int) -> None:
        """Add columns of padding in front."""
        added = width - self.columns
        if not added:
            return
        self.mask_BT = nn.functional.pad(self.mask_BT, (added, 0))
        for layer in self.cache.layers:
            if isinstance(layer, DynamicLayer) and layer.is_initialized:
                layer.keys = nn.functional.pad(layer.keys, (0, 0, added, 0))
                layer.values = nn.functional.pad(layer.values, (0, 0, added, 0))


def _recurrent(layer: Any) -> list[dict[int, Tensor | None]]:
    """States of a layer that have one row each and no columns."""
    return [layer.conv_states, layer.recurrent_states] if isinstance(layer, _RECURRENT) else []
