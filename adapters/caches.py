"""How many tokens a cache holds, for caches of keys and values and for those of recurrent states.

A cache of keys and values says it itself. One of recurrent states (Mamba, xLSTM, RWKV, MiniMax) has no column per
token, so the columns are counted here while the model runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")
"""What the cache of keys and values is called: from transformers 5.24, and before."""
RECURRENT_CACHE_NAMES = ("cache_params", "state")
"""What the cache of recurrent states is called: in Mamba and xLSTM, and in RWKV."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among a model's arguments or outputs; None without one."""
    names = (*CACHE_NAMES, *RECURRENT_CACHE_NAMES)
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def counts_itself(cache: Any) -> bool:
    """Whether a cache says how many columns it holds, as far as that is known already."""
    return bool(cache is not None and _own_length(cache))


class CacheLengths:
    """Columns that each cache holds. Caches are referred to weakly, so that none is kept alive."""

    def __init__(self) -> None:
        self._columns: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_columns": {}}  # a copy of the model, or a model read from a file, meets other caches

    def of(self, cache: Any) -> int | None:
        """Columns in a cache; None if it may hold states of tokens that were not counted."""
        if cache is None:
            return 0
        length = _own_length(cache)
        if length or _is_empty(cache):
            return length or 0
        reference, columns = self._columns.get(id(_referable(cache)), (None, length))
        return columns if reference is None or reference() is _referable(cache) else length

    def count(self, cache: Any, columns: int) -> None:
        """Note that `cache` now holds this many columns, unless it counts them itself."""
        if cache is None or counts_itself(cache):
            return
        anchor = _referable(cache)
        key, numbers = id(anchor), self._columns
        numbers[key] = (weakref.ref(anchor, lambda _: numbers.pop(key, None)), columns)


def _referable(cache: Any) -> Any:
    """The cache, or the first of a list of states: lists take no weak references."""
    return cache[0] if isinstance(cache, list | tuple) else cache


def _own_length(cache: Any) -> int | None:
    """What the cache says; None if it says nothing. MiniMax's says 0, whatever it holds."""
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        return None
    try:
        return int(length())
    except ValueError:  # transformers: no layer of it has keys and values
        return None


def _is_empty(cache: Any) -> bool:
    """Whether a cache says that it holds no recurrent states."""
    has_states = getattr(cache, "has_previous_state", None)
    if has_states is None:
        return False
    try:
        return not has_states()
    except ValueError:  # transformers: no layer of it has recurrent states
        return False
