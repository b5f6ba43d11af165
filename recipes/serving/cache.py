"""Caches of rows that join and leave the batch: the cache of new rows is appended to that of the running ones.

Rows end at the same column, and shorter ones are padded on the left, as the mask records. Keys and values of a padded
column are never attended to, so padding can be added and removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from steertune.adapters.caches import CACHE_NAMES, RECURRENT_CACHE_NAMES, cache_in
from steertune.recipes.lab.files import ArmError

# the class for layers without their own cache; newer than transformers 5.17
_EMPTY = {cache_utils.DummyLayer} if hasattr(cache_utils, "DummyLayer") else set()
_ATTENTION = {DynamicLayer, DynamicSlidingWindowLayer, *_EMPTY}
_HYBRID = {DynamicLayer, *_EMPTY, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer}


@torch.no_grad()
def can_join(model: Any) -> bool:
    """Whether rows can join a running batch. If a model's states are not in transformers' dynamic cache, its rows run
    one at a time.

    Raises:
        ArmError: the model returns no cache, so every token would need the whole answer to be read again.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    cache = cache_in(model(input_ids=token, use_cache=True))
    if cache is None:
        raise ArmError(
            f"{type(model).__name__} returns no cache (past_key_values or cache_params), so it cannot be served."
        )
    if type(cache) is not DynamicCache:
        return False
    kinds = {type(layer) for layer in cache.layers}
    has_columns = any(issubclass(kind, DynamicLayer) for kind in kinds)
    return has_columns and (kinds <= _ATTENTION or kinds <= _HYBRID)


def new_cache(model: Any) -> DynamicCache:
    """An empty cache for a model whose rows can be joined."""
    cache = DynamicCache(config=model.config)
    if {type(layer) for layer in cache.layers} <= _ATTENTION:
        return DynamicCache()  # full attention caches, since sliding windows would give each layer different columns
    return cache


class States:
    """The cached states of the tokens that the model has read of some rows.

    Attributes:
        cache: The model's cache.
        name: The model's argument for it.
        mask_BT: 1 on the columns of each row that hold a token.
    """

    def __init__(self, cache: Any, name: str, mask_BT: Tensor) -> None:
        self.cache, self.name, self.mask_BT = cache, name, mask_BT

    @classmethod
    def of(cls, output: Any, mask_BT: Tensor) -> States:
        """The states in the output of a forward pass."""
        cache = cache_in(output)
        names = (*CACHE_NAMES, *RECURRENT_CACHE_NAMES)
        return cls(cache, next(name for name in names if output.get(name) is cache), mask_BT)

    @property
    def columns(self) -> int:
        """Columns read so far."""
        return self.mask_BT.shape[1]

    def join(self, other: States) -> None:
        """Append the rows of `other`."""
        width = max(self.columns, other.columns)
        self._widen(width)
        other._widen(width)
        self.mask_BT = torch.cat([self.mask_BT, other.mask_BT])
        for layer, added in zip(self.cache.layers, other.cache.layers, strict=True):
            if _has_columns(layer):
                layer.keys = torch.cat([layer.keys, added.keys])
                layer.values = torch.cat([layer.values, added.values])
            for states, added_states in zip(_recurrent(layer), _recurrent(added), strict=True):
                for i, value in states.items():
                    states[i] = None if value is None else torch.cat([value, added_states[i]])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, and drop columns that are padding in all of them."""
        index = torch.tensor(list(rows), device=self.mask_BT.device)
        self.mask_BT = self.mask_BT[index]
        empty = int((self.mask_BT.sum(dim=0) == 0).int().cumprod(0).sum())  # leading columns of padding
        self.mask_BT = self.mask_BT[:, empty:]
        for layer in self.cache.layers:
            if _has_columns(layer):
                layer.keys = layer.keys[index.to(layer.keys.device)][..., empty:, :]
                layer.values = layer.values[index.to(layer.values.device)][..., empty:, :]
            for states in _recurrent(layer):
                for i, value in states.items():
                    states[i] = None if value is None else value[index.to(value.device)]

    def _widen(self, width: int) -> None:
        """Add columns of padding in front."""
        added = width - self.columns
        if not added:
            return
        self.mask_BT = nn.functional.pad(self.mask_BT, (added, 0))
        for layer in self.cache.layers:
            if _has_columns(layer):
                layer.keys = nn.functional.pad(layer.keys, (0, 0, added, 0))
                layer.values = nn.functional.pad(layer.values, (0, 0, added, 0))


def _has_columns(layer: Any) -> bool:
    """Whether a layer holds keys and values; layers that reuse another layer's never do."""
    return isinstance(layer, DynamicLayer) and layer.is_initialized


def _recurrent(layer: Any) -> list[dict[int, Any]]:
    """The recurrent states of a layer, which have rows but no columns."""
    return [layer.conv_states, layer.recurrent_states] if isinstance(layer, LinearAttentionLayer) else []
