"""A model that runs without what is known of its forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import steering_layers
from ...adapters.blocks import text_config
from ...adapters.caches import CACHE_NAMES
from ...adapters.observing import evaluating
from .._host import sent
from .completions import PromptCaches, prompts_are_constant
from .cut import NoPrefix, base_of, dropout, frozen_blocks
from .decoder import Decoder
from .keys import Unknown, attention_of, config_of, rows_of
from .memo import Memo
from .notices import Notices, in_words
from .packing import Layout, common_layout
from .prompts import Split, part, row_lengths, run_split, shared_prompts
from .randomness import draws, draws_again
from .rounding import difference
from .states import States

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
_KEPT_BY_LAYER = ("output_hidden_states", "output_attentions", "output_router_logits")


class Shortcut:
    """What a forward pass of one model, as it stands, can leave out while `on()`.

    The blocks below everything that is trained are answered from a memo, and a prompt that chosen and rejected answer
    share runs once. Before either is used for the first time two rows of a batch (or pairs), the shortest and the
    longest, run with and without it; where the last hidden states differ by more than rounding (a model whose upper
    layers read more of the lower ones than their output, say) it stays off.

    Args:
        memo: Where states are kept.
        model: A transformers model, with or without PEFT.
        training: Whether parameters that require gradients will be changed.
        proven: What was compared before; what is found exact is added.
        notices: Says why something is off.
        stops: See `FrozenPrefix`.

    Raises:
        NoPrefix: the model's decoder blocks are unknown.
    """

    def __init__(
        self,
        memo: Memo,
        model: nn.Module,
        training: bool,
        proven: set[str],
        notices: Notices,
        stops: Collection[int] = (),
    ) -> None:
        self.model, self._proven, self._notices = model, proven, notices
        self._error: str | None = None  # of our own code, until the plain path has done without it
        self._seen_proven: set[tuple[Any, ...]] = set()
        self._draws: bool | None = None  # random numbers; not looked at yet
        self._training = training
        self._made_for = self._state_of_model()
        self._draws_by_mode = training or model.training
        try:
            count = frozen_blocks(model, training)
        except NoPrefix as why:
            notices.off(why)
            count = 0
        self.decoder = Decoder(model, count)
        self._states = States(memo, model, self.decoder, training, self._draws_by_mode, stops) if count else None
        random = self._draws_by_mode and any(dropout(module) for module in model.modules())
        cached = bool(self.decoder.cache) and self.decoder.takes("use_cache") and count < self.decoder.depth
        self.shares_prompts = cached and not random
        self.packs = self.decoder.packs and not random and count < self.decoder.depth
        constant = self.shares_prompts and count > 0 and prompts_are_constant(model, training)
        self._caches = PromptCaches(memo, model, self.decoder) if constant else None
        self._longest = _original_context(text_config(base_of(model)))
        self._labels_only = False

    @property
    def skipped(self) -> int:
        """How many blocks are answered from the memo."""
        return 0 if self._states is None else self.decoder.count

    def run_whole_rows(self) -> None:
        """Run no row in parts: prompts and completions are not taken apart."""
        self.shares_prompts, self.packs, self._caches = False, False, None

    @contextmanager
    def on(self, labels_only: bool = False) -> Iterator[None]:
        """Take it in every forward pass inside.

        Args:
            labels_only: Whether nothing is read of the outputs before the last prompt token. Then prompts that no
                adapter changes need not run at all.
        """
        drawing = self._training or self.model.training
        if self._made_for != self._state_of_model() or drawing > self._draws_by_mode:
            self._notices.off("adapters, trained parameters or the mode are not those it was made for")
            self._leave_nothing_out()
        before = self._labels_only
        self._labels_only = labels_only and (before or not self.decoder.is_on)
        try:
            with self.decoder.on(self._forward):
                yield
        finally:
            self._labels_only = before
        if self._error is not None:  # an error of the model itself would have been raised by the plain path
            self._notices.failed("a pass without them", self._error)
            self._error = None

    def _leave_nothing_out(self) -> None:
        self._states, self._caches, self.shares_prompts, self.packs = None, None, False, False

    def _forward(self, call: dict[str, Any]) -> Any | None:
        """The decoder's output; None where the plain path is to run, also after an error of any kind."""
        if self._states is None and not self.shares_prompts and not self.packs:
            return None
        ids = call.get("input_ids")
        rewind = draws_again(ids.device) if self._draws_by_mode and isinstance(ids, Tensor) else None
        try:
            return self._output(call)
        except Exception as error:
            self._leave_nothing_out()
            self._error = in_words(error)
            if rewind is not None:
                rewind()
            return None

    def _output(self, call: dict[str, Any]) -> Any | None:
        if any(call.get(name) is not None for name in CACHE_NAMES):  # generation
            return None
        try:
            if self._asked(call, "use_cache"):
                raise Unknown("a call asks for all layers' keys and values; where none are needed, use_cache=False")
            if torch.is_grad_enabled() and (why := self.decoder.not_recomputable()):
                raise Unknown(why)
            for name in _KEPT_BY_LAYER:
                if self._asked(call, name):
                    raise Unknown(f"{name} needs all layers")
            rows = rows_of(call)
            if self._longest is not None and call["input_ids"].shape[1] > self._longest:
                raise Unknown(f"beyond {self._longest} tokens this RoPE depends on the longest row of a batch")
        except Unknown as why:
            self._notices.off(why)
            return None
        states = self._known(call, rows)
        if (self.shares_prompts or self.packs) and self._draws_by_mode:
            self._check_draws(call)
        if states is not None and self._labels_only and (output := self._completions(call, rows, states)) is not None:
            return output
        layout = self._layout(call, states)
        if layout is not None:
            return self._run_packed(call, states, layout)
        split = self._split(call, states)
        if split is not None:
            return run_split(self.model, self.decoder, call, states, split)
        return None if states is None else self.decoder.run(call, states)

    def _layout(self, call: Mapping[str, Any], states: Tensor | None) -> Layout | None:
        lengths = row_lengths(call) if self.packs else None
        if lengths is None:
            return None
        ends, steers = self._ends(), self._steers_by_position()
        share = ends is not None or not steers
        layout = common_layout(call, lengths, ends, share)
        if layout is None:
            return None
        try:
            what = f"a pass without padding{_shape(lengths, call)}"
            if self._unproven(what, call):
                sample = torch.tensor(_shortest_and_longest(lengths.tolist()))

                def run(few: dict[str, Any]) -> Any:
                    own = common_layout(few, lengths[sample], None if ends is None else ends[sample], share, True)
                    assert own is not None
                    return self._run_packed(few, None if states is None else states[sample], own)

                self._prove(call, what, sample, run)
        except NoPrefix as why:
            self.packs = False
            self._notices.less(why)
            return None
        return layout

    def _run_packed(self, call: Mapping[str, Any], states: Tensor | None, layout: Layout) -> Any:
        """The decoder's output on a batch, computed in one line."""
        line = layout.call(call)
        with layout.at_work(self.decoder.module.config), part(self.model, layout.row_T[None], layout.column_T[None]):
            output = self.decoder.run(line, None if states is None else layout.packed(states))
        output.last_hidden_state = layout.unpacked(output[0])
        return output

    def _known(self, call: Mapping[str, Any], rows: list[dict[str, Tensor]]) -> Tensor | None:
        if self._states is None:
            return None
        try:
            states = self._states.of(rows, call["input_ids"].shape[1])
            what, lengths = "the memo of the lower layers", [row["input_ids"].shape[1] for row in rows]
            if self._unproven(what, call):
                sample = torch.tensor(_shortest_and_longest(lengths))
                self._prove(call, what, sample, lambda some: self.decoder.run(some, states[sample]))
            self._states.keep()
        except NoPrefix as why:
            self._states = None
            self._notices.off(why)
            return None
        return states

    def _completions(self, call: Mapping[str, Any], rows: list[dict[str, Tensor]], states: Tensor) -> Any | None:
        caches = self._caches
        split = None if caches is None or self._beyond_window(call) else caches.split(call)
        if caches is None or split is None:
            return None
        try:
            what = f"running completions only{_shape(split.starts, call)}"
            if self._unproven(what, call):
                some, sample = split.only(_shortest_and_longest(split.prompts.tolist()))
                column = torch.arange(call["input_ids"].shape[1])
                read = (column >= some.starts[:, None]) & (column < some.lengths[:, None])
                few = [rows[i] for i in sample.tolist()]
                self._prove(call, what, sample, lambda few_rows: caches.run(few_rows, few, states[sample], some), read)
            output = caches.run(call, rows, states, split)
            caches.keep()
            return output
        except NoPrefix as why:
            self._caches = None
            self._notices.less(why)
            return None

    def _check_draws(self, call: Mapping[str, Any]) -> None:
        """Run no row in parts where training draws random numbers (in routers, say): they differ between rows."""
        if self._draws is None:

            def run(row: Mapping[str, Tensor]) -> Any:
                column = torch.arange(row["input_ids"].shape[1], device=row["input_ids"].device)[None]
                with part(self.model, column[0, :1], column):  # row 0
                    return self.decoder.run({**row, "use_cache": False}, None)

            self._draws = draws(self.model, rows_of(call)[0], run)[1]
        if self._draws:
            self.run_whole_rows()
            self._notices.less("no row is run in parts: training draws random numbers, which differ between rows")

    def _beyond_window(self, call: Mapping[str, Any]) -> bool:
        """Whether a sliding window would have to know how far apart tokens are, which a padded cache changes."""
        config = self.decoder.module.config
        found = [getattr(config, name, None) for name in _WINDOWS]
        return any(isinstance(window, int) and call["input_ids"].shape[1] > window for window in found)

    def _split(self, call: Mapping[str, Any], states: Tensor | None) -> Split | None:
        if not self.shares_prompts or self._beyond_window(call):
            return None
        ends = self._ends()
        # rows of several prompts, or of unknown ones, share no beginning
        split = None if ends is None and self._steers_by_position() else shared_prompts(call, ends)
        if split is None:
            return None
        try:
            what = f"a shared pass over the prompts{_shape(split.starts, call)}"
            if self._unproven(what, call):
                some, sample = split.only(_shortest_and_longest(split.prompts.tolist()))
                known = None if states is None else states[sample]
                self._prove(call, what, sample, lambda few: run_split(self.model, self.decoder, few, known, some))
        except NoPrefix as why:
            self.shares_prompts = False
            self._notices.less(why)
            return None
        return split

    def _ends(self) -> Tensor | None:
        """Where each row's prompt ends, if vectors care and every row has one prompt."""
        return steering_layers(self.model)[0].boundary.prompt_end if self._steers_by_position() else None

    def _steers_by_position(self) -> bool:
        return any(c.positions != "all" for layer in steering_layers(self.model) for c in layer.config.values())

    def _state_of_model(self) -> tuple[Any, ...]:
        """What a shortcut is made for: unfreezing a layer or adding an adapter afterwards changes what is constant."""
        return tuple(p.requires_grad for p in self.model.parameters()), tuple(getattr(self.model, "peft_config", ()))

    def _asked(self, call: Mapping[str, Any], name: str) -> bool:
        value = call.get(name)
        return bool(getattr(self.decoder.module.config, name, False) if value is None else value)

    def _proof(self, what: str, call: Mapping[str, Any]) -> str:
        return hashlib.blake2b(f"{what}/{self.decoder.count}/{self._kind(call)}".encode()).hexdigest()

    def _unproven(self, what: str, call: Mapping[str, Any]) -> bool:
        on = call["input_ids"].device
        seen = (what, on, torch.is_autocast_enabled(on.type) and torch.get_autocast_dtype(on.type))
        if seen not in self._seen_proven and self._proof(what, call) in self._proven:
            self._seen_proven.add(seen)
        return seen not in self._seen_proven

    @torch.no_grad()
    def _prove(
        self,
        call: Mapping[str, Any],
        what: str,
        sample: Tensor,
        run: Callable[[dict[str, Any]], Any],
        real: Tensor | None = None,
    ) -> None:
        """Compare the last hidden states of some rows with those of the plain path, once for a model and a way.

        Args:
            call: Arguments of the decoder.
            what: The way, in words.
            sample: The rows.
            run: The decoder's output from its arguments for these rows, in that way.
            real: Which of their tokens mean something; None: all that are no padding.

        Raises:
            NoPrefix: they differ.
        """
        shape = call["input_ids"].shape
        there = sent(sample, call["input_ids"].device)
        call = {
            name: value[there] if isinstance(value, Tensor) and value.shape == shape else value
            for name, value in call.items()
        }
        with evaluating(self.model), ExitStack() as stack:
            for boundary in {id(layer.boundary): layer.boundary for layer in steering_layers(self.model)}.values():
                stack.enter_context(boundary.select(there))
            plain = self.decoder.run(call, None)[0]
            try:
                ours = run(call)[0]
            except Exception as error:  # whatever it is, the plain path has just worked
                raise NoPrefix(
                    f"{what} is off: {type(self.decoder.module).__name__} fails with it: {error}"
                ) from error
        if real is None and (mask := call.get("attention_mask")) is not None:
            real = mask.bool()
        if (apart := difference(plain, ours, real)) is not None:
            raise NoPrefix(f"{what} is off: {type(self.decoder.module).__name__} differs by {apart:.1e} with it")
        self._proven.add(self._proof(what, call))

    def _kind(self, call: Mapping[str, Any]) -> str:
        """What a proof is about: another model, adapter, precision or device is compared again."""
        base, ids = base_of(self.model), call["input_ids"]
        adapters = {name: repr(config) for name, config in getattr(self.model, "peft_config", {}).items()}
        parameter = next(base.parameters())
        autocast = torch.is_autocast_enabled(ids.device.type) and torch.get_autocast_dtype(ids.device.type)
        return repr((type(base), attention_of(base), config_of(base), adapters, parameter.dtype, ids.device, autocast))


def _shape(starts: Tensor, call: Mapping[str, Any]) -> str:
    """What a proof of running rows in parts is about: prompts of one length leave no hole behind them where positions
    are counted, and short rows do not meet what only long ones do."""
    lengths = "of one length" if len(starts.unique()) == 1 else "of several lengths"
    return f" ({lengths}, in rows of up to {1 << (call['input_ids'].shape[1] - 1).bit_length()} tokens)"


def _shortest_and_longest(lengths: Sequence[int]) -> list[int]:
    """Indices of two lengths that lie far apart; of one, if there is no other."""
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return sorted({by_length[0], by_length[-1]})


def _original_context(config: Any) -> int | None:
    """Tokens beyond which the frequencies of a dynamic RoPE depend on the longest row of a batch; None: they never
    do."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given] if "rope_type" in given else [kind for kind in given.values() if isinstance(kind, dict)]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if "dynamic" in str(kind.get("rope_type")) or kind.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)
