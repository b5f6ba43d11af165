"""Count the tokens in a cache, of keys and values or of recurrent states.

A cache of keys and values knows its length. A cache of recurrent states (Mamba, xLSTM, RWKV, MiniMax) has no column
per token, so its columns are counted here while the model runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")
"""Argument names of the cache of keys and values: since transformers 5.24, and before."""
RECURRENT_CACHE_NAMES = ("cache_params", "state")
"""Argument names of the cache of recurrent states: in Mamba and xLSTM, and in RWKV."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments or outputs of a model, or None."""
    names = (*CACHE_NAMES, *RECURRENT_CACHE_NAMES)
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def counts_itself(cache: Any) -> bool:
    """Whether a cache reports a non-zero length of its own."""
    return bool(cache is not None and _own_length(cache))


class CacheLengths:
    """The number of columns in each cache. References are weak, so that no cache is kept alive."""

    def __init__(self) -> None:
        self._columns: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_columns": {}}  # copies and unpickled models have other caches

    def of(self, cache: Any) -> int | None:
        """The number of columns in a cache; None if it may hold states of tokens that were not counted."""
        if cache is None:
            return 0
        length = _own_length(cache)
        if length or _is_empty(cache):
            return length or 0
        reference, columns = self._columns.get(id(_referable(cache)), (None, length))
        return columns if reference is None or reference() is _referable(cache) else length

    def count(self, cache: Any, columns: int) -> None:
        """Record that `cache` now holds this many columns, unless it counts them itself."""
        if cache is None or counts_itself(cache):
            return
        anchor = _referable(cache)
        key, numbers = id(anchor), self._columns
        numbers[key] = (weakref.ref(anchor, lambda _: numbers.pop(key, None)), columns)


def _referable(cache: Any) -> Any:
    """The cache, or the first of a list of states, because lists do not support weak references."""
    return cache[0] if isinstance(cache, list | tuple) else cache


def _own_length(cache: Any) -> int | None:
    """The length that the cache reports, or None. MiniMax's cache always reports 0."""
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        return None
    try:
        return int(length())
    except ValueError:  # transformers: no layer of it has keys and values
        return None


def _is_empty(cache: Any) -> bool:
    """Whether a cache reports that it holds no recurrent states."""
    has_states = getattr(cache, "has_previous_state", None)
    if has_states is None:
        return False
    try:
        return not has_states()
    except ValueError:  # transformers: no layer of it has recurrent states
        return False
