"""Run the prompts of a generation without padding; a prefix that they share, such as a system prompt, runs once.

`generate` pads prompts on the left and lets the model fill a cache with them. Here they run packed into one line
(`packing.py`), and the cache is filled with the keys and values that attention gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..host_copies import on_host
from .decoder import Decoder
from .exactness import NoPrefix, difference
from .packing import KeysAndValues, Layout, common_layout
from .proofs import Proofs, kind_of_rows, shortest_and_longest

_READ = ("input_ids", "attention_mask", "position_ids")


class Generation:
    """Fills the cache of a generation.

    Args:
        decoder: The stack of blocks.
        proofs: Comparisons with the plain path.
        run: Runs a call from given states (None: from its tokens) in a layout, and collects keys and values.
    """

    def __init__(
        self, decoder: Decoder, proofs: Proofs, run: Callable[[Mapping[str, Any], None, Layout, KeysAndValues], Any]
    ) -> None:
        self._decoder, self._proofs, self._run = decoder, proofs, run

    def output(self, call: Mapping[str, Any]) -> Any | None:
        """The decoder's output on the prompts of a generation, padded on the left, with their cache filled; None if
        the plain path has to run.

        Raises:
            NoPrefix: it would differ from the plain path.
        """
        name = self._decoder.cache
        prompts = prompts_of_generation(call, name)
        layout = None if prompts is None else common_layout(prompts.call, prompts.lengths, None)
        if prompts is None or layout is None:
            return None
        what = f"a generation from prompts without padding{kind_of_rows(prompts.lengths, prompts.call)}"
        if self._proofs.missing(what, prompts.call):
            sample = torch.tensor(shortest_and_longest(prompts.lengths.tolist()))
            self._proofs.make(prompts.call, what, sample, self._compared)
        states: KeysAndValues = []
        output = self._run(prompts.call, None, layout, states)
        left_RC = prompts.on_left(layout.place_RC)
        for layer, pair in enumerate(states):
            call[name].update(*(_rows(state_1HTS, left_RC) for state_1HTS in pair), layer)
        output.last_hidden_state = prompts.on_left(output[0])
        setattr(output, name, call[name])
        return output

    def _compared(self, few: dict[str, Any]) -> Any:
        """The decoder's output on some prompts, padded on the right, computed on packed rows.

        Raises:
            NoPrefix: keys and values differ from those that the plain path caches.
        """
        mask_RC, cache = few["attention_mask"].bool(), DynamicCache()
        self._decoder.run({**few, self._decoder.cache: cache, "use_cache": True}, None)
        layout = common_layout(few, on_host(mask_RC).sum(dim=1), None, at_least=0.0)
        assert layout is not None
        states: KeysAndValues = []
        output = self._run(few, None, layout, states)
        if len(states) != len(cache.layers):
            raise NoPrefix(f"prompts keep their padding: attention ran in {len(states)} of {len(cache.layers)} layers")
        layers: list[Any] = cache.layers
        for layer, pair in zip(layers, states, strict=True):
            for plain_RHCS, state_1HTS in zip((layer.keys, layer.values), pair, strict=True):
                ours_RHCS = _rows(state_1HTS, layout.place_RC)
                apart = difference(plain_RHCS.transpose(1, 2), ours_RHCS.transpose(1, 2), mask_RC)
                if apart is not None:
                    raise NoPrefix(f"prompts keep their padding: keys or values differ by {apart:.1e} without it")
        return output


def _rows(state_1HTS: Tensor, place_RC: Tensor) -> Tensor:
    """Unpack keys or values into rows, `(R, heads, C, size)`."""
    return state_1HTS[0].index_select(1, place_RC.flatten()).unflatten(1, place_RC.shape).transpose(0, 1)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a generation.

    Attributes:
        call: Arguments of the decoder, with the padding on the right and without a cache.
        lengths: Tokens of every prompt, `(rows,)`, on the host.
    """

    call: dict[str, Any]
    lengths: Tensor

    def on_left(self, values_RC: Tensor) -> Tensor:
        """Move the padding of `(rows, columns, ...)` from the right to the left. Padding gets the first value of its
        row."""
        width = values_RC.shape[1]
        column_RC = (torch.arange(width) - (width - self.lengths)[:, None]).clamp_min(0)
        return values_RC[torch.arange(len(values_RC))[:, None], column_RC.to(values_RC.device)]


def prompts_of_generation(call: Mapping[str, Any], cache_name: str) -> Prompts | None:
    """The prompts that a call fills an empty cache with; None if it is another call.

    Args:
        call: Arguments of the decoder.
        cache_name: The argument that holds the cache.
    """
    ids, mask = call["input_ids"], call.get("attention_mask")
    cache: Any = call.get(cache_name)
    # layers with windows or recurrent states do not keep all keys and values
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    if not plain or cache.get_seq_length() or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    if any(isinstance(value, Tensor) and name not in _READ for name, value in call.items()):
        return None
    # real tokens are the last ones of each row, and are counted from 0
    mask_RC, width = on_host(mask).bool(), ids.shape[1]
    lengths = mask_RC.sum(dim=1)
    column_RC = torch.arange(width) - (width - lengths)[:, None]
    if bool((mask_RC != (column_RC >= 0)).any()) or int(lengths.min()) == 0:
        return None
    positions = call.get("position_ids")
    if positions is not None and bool((on_host(positions).expand(ids.shape) != column_RC)[mask_RC].any()):
        return None
    # moved to the left
    place_RC = (torch.arange(width) + (width - lengths)[:, None]).clamp_max(width - 1)
    real_RC = torch.arange(width) < lengths[:, None]
    rest = {name: value for name, value in call.items() if name not in (*_READ, cache_name)}
    moved = {"input_ids": ids.gather(1, place_RC.to(ids.device)), "attention_mask": real_RC.long().to(ids.device)}
    return Prompts({**rest, **moved, "use_cache": False}, lengths)
