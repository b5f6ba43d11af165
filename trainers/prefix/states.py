"""The residual stream at the cut: of every row once, then from the memo."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.observing import evaluating
from .._host import on_host
from .cut import NoPrefix, base_of, check_frozen
from .decoder import Decoder
from .keys import attention_of, config_of, row_key, weights_key
from .memo import Memo
from .packing import alone_layout
from .randomness import draws, last_tokens
from .rounding import difference

_ONE = torch.ones(1)


class States:
    """Outputs of the last frozen block, kept by content. They are computed in evaluation mode.

    Args:
        memo: Where they are kept.
        model: The model, with or without PEFT.
        decoder: Its stack of blocks, with the frozen ones to be skipped.
        training: Whether parameters that require gradients will be changed.
        random: Whether modules are in training mode, in which some draw random numbers.
        stops: Numbers of blocks after which states are kept as well, where a pass comes by.
    """

    def __init__(
        self,
        memo: Memo,
        model: nn.Module,
        decoder: Decoder,
        training: bool,
        random: bool,
        stops: Collection[int] = (),
    ) -> None:
        self.memo, self.model, self.decoder, self.training, self.random = memo, model, decoder, training, random
        self.stops = sorted({stop for stop in stops if 0 < stop < decoder.count})
        self._namespace: str | None = None
        self._ran_until: dict[int, dict[str, nn.Module]] = {}
        self._stop_namespaces: dict[int, str] = {}
        self._below: list[nn.Module] = []
        self._new: dict[str, Tensor] = {}
        self.together, self._compared = decoder.packs and not has_experts(decoder.module.config), False

    def of(self, rows: Sequence[Mapping[str, Tensor]], width: int) -> Tensor:
        """States of a batch, `(rows, width, d)`, zero on the padding to the right. Rows run alone where they are new,
        and are in the memo after `keep`.

        Raises:
            NoPrefix: what runs below the cut is not constant.
        """
        if self._namespace is None:
            self._namespace = self._check(rows[0])
        _check_hooks(self._below)
        self._new.clear()
        keys = [row_key(self._namespace, row) for row in rows]
        known = {key: self.memo.get(key) for key in keys}
        new = {key: row for key, row in zip(keys, rows, strict=True) if known[key] is None}
        if new:
            with evaluating(base_of(self.model)):
                known |= self._computed(new)
        return padded([known[key] for key in keys], width, rows[0]["input_ids"].device)

    def _computed(self, new: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """States of rows by their keys: in one line where that gives the bits that each row alone gives, else one by
        one."""
        rows = list(new.values())
        if self.together and all(_is_plain(row) for row in rows):
            states = self._in_one_line(rows)
            if not self._compared:
                self.together = self._compared = self._gives_the_same_bits(rows, states)
            if self.together:
                return self._noted(rows, states, new)
        return self._noted(rows, [self._alone(row) for row in rows], new)

    def _noted(
        self, rows: Sequence[Mapping[str, Tensor]], states: Sequence[dict[int, Tensor]], keys: Iterable[str]
    ) -> dict[str, Tensor]:
        computed = {}
        for key, row, own in zip(keys, rows, states, strict=True):
            for stop, state in own.items():
                if stop == self.decoder.count:
                    computed[key] = self._new[key] = state
                else:
                    self._new[row_key(self._stop_namespace(stop), row)] = state
        return computed

    def _alone(self, row: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """A row's states by the number of blocks below them, `(tokens, d)`."""
        with self._stopping() as passed:
            state = self.decoder.state({**row, "use_cache": False})
        return {stop: lower[0] for stop, lower in {**passed, self.decoder.count: state}.items()}

    def _in_one_line(self, rows: Sequence[Mapping[str, Tensor]]) -> list[dict[int, Tensor]]:
        layout, call = alone_layout(rows)
        with layout.at_work(self.decoder.module.config), self._stopping() as passed:
            passed[self.decoder.count] = self.decoder.state(call)
        states: list[dict[int, Tensor]] = [{} for _ in rows]
        for stop, line_1TD in passed.items():
            for own, state_TD in zip(states, line_1TD[0].split(list(layout.lengths or ())), strict=False):
                own[stop] = state_TD
        return states

    def _gives_the_same_bits(self, rows: Sequence[Mapping[str, Tensor]], states: Sequence[dict[int, Tensor]]) -> bool:
        """Whether the shortest and the longest row have the states that they have alone."""
        lengths = [row["input_ids"].shape[1] for row in rows]
        for i in {lengths.index(min(lengths)), lengths.index(max(lengths))}:
            alone = self._alone(rows[i])
            if any(not torch.equal(state, alone[stop]) for stop, state in states[i].items()):
                return False
        return True

    def keep(self) -> None:
        """Memoise what the last `of` computed: it was right."""
        for key, state in self._new.items():
            self.memo.put(key, state)
        self._new.clear()

    @contextmanager
    def _stopping(self) -> Iterator[dict[int, Tensor]]:
        """A dictionary that the forward pass inside fills: number of blocks -> state behind them."""
        passed: dict[int, Tensor] = {}
        handles = [
            self.decoder.blocks[stop - 1].register_forward_hook(partial(_keep, passed, stop)) for stop in self.stops
        ]
        try:
            yield passed
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, row: Mapping[str, Tensor]) -> str:
        """Check all that runs below the cut, and say what its outputs depend on."""
        row = last_tokens(row)
        base, stack = base_of(self.model), self.decoder.module
        names = {module: name for name, module in base.named_modules()}
        ran = {names[stack]: stack}

        def note(module: nn.Module, _: object) -> None:
            ran[names[module]] = module

        def note_stop(stop: int, *_: object) -> None:
            self._ran_until[stop] = dict(ran)

        handles = [module.register_forward_pre_hook(note) for module in names]
        handles += [self.decoder.blocks[n - 1].register_forward_hook(partial(note_stop, n)) for n in self.stops]
        try:
            with evaluating(base):  # dropout would draw random numbers
                state = self.decoder.state({**row, "use_cache": False})
        finally:
            for handle in handles:
                handle.remove()
        check_frozen(ran.items(), self.training, self.random)
        self._below = [module for module in ran.values() if module is not stack]
        if self.random:
            as_trained, drawn = draws(base, row, lambda row: self.decoder.state({**row, "use_cache": False}))
            if drawn or difference(state, as_trained) is not None:
                raise NoPrefix(
                    "what runs below the trained layers differs in training (noise on embeddings or routers?). Set "
                    "neftune_noise_alpha=None, or router_jitter_noise=0, to leave them out"
                )
        namespace = self._key(ran, self.decoder.count)
        dtype = str(state.dtype).removeprefix("torch.")
        what = f"{type(base).__name__} of width {state.shape[-1]} up to block {self.decoder.count - 1} in {dtype}"
        self.memo.belongs_to(namespace, f"{what} with {attention_of(base)} attention")
        return namespace

    def _stop_namespace(self, stop: int) -> str:
        """The namespace of a stop: computed when a row is new, because it reads all weights below."""
        if stop not in self._stop_namespaces:
            self._stop_namespaces[stop] = self._key(self._ran_until[stop], stop)
        return self._stop_namespaces[stop]

    def _key(self, ran: Mapping[str, nn.Module], count: int) -> str:
        """What the state behind `count` blocks depends on beside the row."""
        base = base_of(self.model)
        names = {module: name for name, module in base.named_modules()}
        # experts that no token chose, too
        ran = {**ran, **{names[module]: module for module in self.decoder.inside(count)}}
        below = {f"{name}.{key}".lstrip("."): t for name, module in ran.items() for key, t in _own_tensors(module)}
        settings = (type(self.decoder.module).__name__, count, attention_of(base), config_of(base))
        return weights_key(sorted(below.items()), *settings)


def _is_plain(row: Mapping[str, Tensor]) -> bool:
    """Whether a row is nothing but tokens, all of them real and at their usual positions."""
    return set(row) <= {"input_ids", "attention_mask"} and bool(on_host(row.get("attention_mask", _ONE)).all())


def _keep(passed: dict[int, Tensor], stop: int, module: nn.Module, args: object, output: Any) -> None:
    passed[stop] = (output[0] if isinstance(output, tuple) else output).detach()


def has_experts(config: Any) -> bool:
    """Whether tokens are sent to experts, whose matrix products depend on how many tokens others sent there."""
    return any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def padded(rows: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
    """Rows of states `(tokens, d)` side by side on a device, `(rows, width, d)`, zero behind their ends. From pinned
    memory nobody waits for the copies."""
    whole = torch.zeros(len(rows), width, rows[0].shape[-1], dtype=rows[0].dtype, device=device)
    for row, place in zip(rows, whole, strict=True):
        place[: len(row)].copy_(row, non_blocking=True)
    return whole


def _check_hooks(modules: Sequence[nn.Module]) -> None:
    """Raise a NoPrefix for a hook below the cut: what it does is in no key, and it may be gone the next time. Those of
    transformers only record, ours are known, and gradient checkpointing hangs one on the embeddings that lets their
    output require a gradient (transformers, PEFT and TRL give it one name)."""
    for module in modules:
        # torch has no public way to ask
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if "make_inputs_require_grad" in getattr(hook, "__qualname__", ""):
                continue
            owner = str(getattr(getattr(hook, "func", hook), "__module__", ""))
            if not owner.startswith(("transformers.utils.output_capturing", "steertune.")):
                raise NoPrefix(f"a forward hook hangs on a {type(module).__name__} below the trained layers")


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
