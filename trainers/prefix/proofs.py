"""Compare each shortcut with the plain path, once per model and shortcut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import steering_layers
from ...adapters.observing import base_model, evaluating
from ..host_copies import sent
from .decoder import Decoder
from .exactness import NoPrefix, difference
from .store import attention_of, config_of


class Proofs:
    """The shortcuts that were compared with the plain path, and equal it up to rounding.

    Args:
        model: The model, with or without PEFT.
        decoder: Its stack of blocks.
        shared: Digests of proofs that hold for every pass of this kind; new ones are added.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, shared: set[str]) -> None:
        self.model, self.decoder, self._shared = model, decoder, shared
        self._here: set[tuple[Any, ...]] = set()

    def missing(self, what: str, call: Mapping[str, Any]) -> bool:
        """Whether a shortcut has not been compared yet for the model as it runs in this call."""
        on = call["input_ids"].device
        # a cheap key, because this is looked up often; `_digest` covers everything that a proof depends on
        key = (what, on, torch.is_autocast_enabled(on.type) and torch.get_autocast_dtype(on.type))
        if key not in self._here and self._digest(what, call) in self._shared:
            self._here.add(key)
        return key not in self._here

    @torch.no_grad()
    def make(
        self,
        call: Mapping[str, Any],
        what: str,
        sample: Tensor,
        run: Callable[[dict[str, Any]], Any],
        real_RC: Tensor | None = None,
    ) -> None:
        """Compare the last hidden states of some rows with those of the plain path.

        Args:
            call: Arguments of the decoder.
            what: The shortcut, in words.
            sample: The rows.
            run: The decoder's output from its arguments for these rows, with the shortcut.
            real_RC: Which of their tokens are compared; None for all but padding.

        Raises:
            NoPrefix: they differ.
        """
        # a batch of the sampled rows, with their own prompts
        shape = call["input_ids"].shape
        sample_there = sent(sample, call["input_ids"].device)
        few = {
            name: value[sample_there] if isinstance(value, Tensor) and value.shape == shape else value
            for name, value in call.items()
        }
        with evaluating(self.model), ExitStack() as stack:
            for boundary in {id(layer.boundary): layer.boundary for layer in steering_layers(self.model)}.values():
                stack.enter_context(boundary.select(sample_there))
            # from the tokens, with nothing skipped
            plain = self.decoder.run(few, None)[0]
            try:
                ours = run(few)[0]
            except Exception as error:  # of any kind: the plain path has just worked
                raise NoPrefix(
                    f"{what} is off: {type(self.decoder.module).__name__} fails with it: {error}"
                ) from error
        # outputs on padding are undefined in both
        if real_RC is None and (mask := few.get("attention_mask")) is not None:
            real_RC = mask.bool()
        if (apart := difference(plain, ours, real_RC)) is not None:
            raise NoPrefix(f"{what} is off: {type(self.decoder.module).__name__} differs by {apart:.1e} with it")
        self._shared.add(self._digest(what, call))

    def _digest(self, what: str, call: Mapping[str, Any]) -> str:
        """A digest of what a comparison depends on: another model, adapter, precision or device is compared again."""
        base, ids = base_model(self.model), call["input_ids"]
        adapters = {name: repr(config) for name, config in getattr(self.model, "peft_config", {}).items()}
        autocast = torch.is_autocast_enabled(ids.device.type) and torch.get_autocast_dtype(ids.device.type)
        about = (type(base), attention_of(base), config_of(base), adapters, next(base.parameters()).dtype)
        return hashlib.blake2b(f"{what}/{self.decoder.count}/{about}/{ids.device}/{autocast}".encode()).hexdigest()


def kind_of_rows(lengths: Tensor, call: Mapping[str, Any]) -> str:
    """The kind of rows that a comparison covers: rows (or prompts) of one length have no gaps between positions, and
    short rows do not reach what only long ones do."""
    equal = "of one length" if len(lengths.unique()) == 1 else "of several lengths"
    return f" ({equal}, in rows of up to {1 << (call['input_ids'].shape[1] - 1).bit_length()} tokens)"


def shortest_and_longest(lengths: Sequence[int]) -> list[int]:
    """The indices of the shortest and the longest length, which may be the same."""
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return sorted({by_length[0], by_length[-1]})
