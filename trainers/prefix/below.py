"""The residual stream at the cut: of every row once, then from the memo."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.blocks import text_config
from .._modes import evaluating
from .cut import NoPrefix, base_of, check_frozen, frozen_blocks
from .keys import Unknown, row_key, rows_of, weights_key
from .memo import Memo
from .skip import SkippedBlocks

logger = logging.getLogger(__name__)
_KEPT_BY_LAYER = ("output_hidden_states", "output_attentions", "output_router_logits")


class PrefixBelow:
    """The blocks below everything that is trained, answered from a memo while `on()`.

    Before the first use one batch runs with and without the memo; if its last hidden states differ by more than
    rounding (a model whose upper layers read more of the lower ones than their output), the memo stays off.

    Args:
        memo: Where states are kept.
        model: A transformers model, with or without PEFT.
        training: Whether parameters that require gradients will be changed.
        proven: Namespaces that were checked before; this one is added.
        level: Level of the message that says why a forward pass turned it off.

    Raises:
        NoPrefix: nothing is frozen below, or gradient checkpointing is on.
    """

    def __init__(self, memo: Memo, model: nn.Module, training: bool, proven: set[str], level: int) -> None:
        if training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            raise NoPrefix("gradient checkpointing asks for gradients of the embeddings, below the trained layers")
        self.memo, self.model, self.training = memo, model, training
        self.count = frozen_blocks(model, training)
        self._skipped = SkippedBlocks(model, self.count)
        self._proven, self._level = proven, level
        self._namespace: str | None = None
        self._off = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """The memo answers for the lower blocks in every forward pass inside."""
        with self._skipped.on(self._states):
            yield

    def _states(self, call: dict[str, Any]) -> Tensor | None:
        cached = call.get("past_key_values") is not None or self._asked(call, "use_cache")
        if self._off or cached:  # generation
            return None
        try:
            for name in _KEPT_BY_LAYER:
                if self._asked(call, name):
                    raise Unknown(f"{name} needs all layers")
            rows = rows_of(call)
            if self._namespace is None:
                self._namespace = self._check(rows[0])
            states = self._batch(rows, call["input_ids"].shape[1])
            if self._namespace not in self._proven:
                self._prove(call, states, self._namespace)
        except (NoPrefix, Unknown) as error:
            self._off = True
            logger.log(self._level, "The frozen prefix is off: %s.", error)
            return None
        return states

    def _asked(self, call: Mapping[str, Any], name: str) -> bool:
        value = call.get(name)
        return bool(getattr(self._skipped.decoder.config, name, False) if value is None else value)

    def _batch(self, rows: Sequence[Mapping[str, Tensor]], width: int) -> Tensor:
        assert self._namespace is not None
        known = []
        for row in rows:
            key = row_key(self._namespace, row)
            state = self.memo.get(key)
            if state is None:
                state = self._skipped.run({**row, "use_cache": False})[0]
                self.memo.put(key, state)
            known.append(state)
        device = rows[0]["input_ids"].device
        states = known[0].new_zeros(len(rows), width, known[0].shape[-1], device="cpu")
        for i, state in enumerate(known):
            states[i, : len(state)] = state
        return states.to(device, non_blocking=True)

    def _check(self, row: Mapping[str, Tensor]) -> str:
        """Check all that runs below the cut, and say what its outputs depend on."""
        base = base_of(self.model)
        names = {module: name for name, module in base.named_modules()}
        ran = {names[self._skipped.decoder]: self._skipped.decoder}

        def note(module: nn.Module, _: Any) -> None:
            ran[names[module]] = module

        handles = [module.register_forward_pre_hook(note) for module in names]
        try:
            with evaluating(base):  # dropout would draw random numbers
                self._skipped.run({**row, "use_cache": False})
        finally:
            for handle in handles:
                handle.remove()
        check_frozen(ran.items(), self.training)
        below = {f"{name}.{key}".lstrip("."): t for name, module in ran.items() for key, t in _own_tensors(module)}
        config = text_config(base)
        attention = getattr(config, "_attn_implementation", None)  # transformers has no public name for it
        return weights_key(sorted(below.items()), type(self._skipped.decoder).__name__, self.count, attention)

    @torch.no_grad()
    def _prove(self, call: Mapping[str, Any], states: Tensor, namespace: str) -> None:
        """Compare the last hidden states of one batch with those of the plain path."""
        with evaluating(self.model):
            plain, ours = (self._skipped.run_all(call, given) for given in (None, states))
        device = plain.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else plain.dtype
        real = call.get("attention_mask")
        real = torch.ones_like(call["input_ids"]).bool() if real is None else real.bool()
        difference = float((plain - ours)[real].abs().max() / plain[real].abs().max())
        if not difference <= torch.finfo(dtype).eps ** 0.5:
            raise NoPrefix(
                f"with it the last hidden states of {type(self._skipped.decoder).__name__} differ by "
                f"{difference:.1e}, so its upper layers read more of the lower ones than their output"
            )
        self._proven.add(namespace)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
