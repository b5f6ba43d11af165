"""One forward pass that skips what is cached. Every shortcut is compared with the plain path before it is used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import steering_layers
from ...adapters.blocks import text_config
from ...adapters.caches import CACHE_NAMES
from ...adapters.observing import base_model
from .cached_states import CachedStates
from .decoder import Decoder, frozen_blocks
from .exactness import (
    NoPrefix,
    Notices,
    Unknown,
    beyond_window,
    draws,
    draws_again,
    dropout,
    in_words,
    original_context,
)
from .generation import Generation
from .packing import KeysAndValues, Layout, common_layout
from .prompts import PromptCaches, Split, part, prompts_are_constant, row_lengths, run_split, shared_prompts
from .proofs import Proofs, kind_of_rows, shortest_and_longest
from .store import TensorStore, attention_of, rows_of

_KEPT_BY_LAYER = ("output_hidden_states", "output_attentions", "output_router_logits")


class CachedPass:
    """Forward passes of one model in its current state, which skip what they can while `on()`.

    In this order: the cached prefix is replaced by states from the store. Then the suffix runs on completions only
    (`PromptCaches`), or on rows without padding (`Layout`), or on prompts and what follows them (`Split`), or on the
    batch as it is. The prompts of a generation run without padding (`Generation`). Before a shortcut is used for the
    first time, two rows of a batch, the shortest and the longest, run with and without it. If the last hidden states
    differ by more than rounding (in a model whose upper blocks read more of the lower ones than their output, say),
    the shortcut stays off.

    Args:
        store: Where states are kept.
        model: A transformers model, with or without PEFT.
        training: Whether parameters that require gradients will be changed.
        proven: The shortcuts that were verified before; new ones are added.
        notices: Reports why something is off.
        stops: See `FrozenPrefix`.
        keep: Whether states of rows are cached; otherwise every block runs.

    Raises:
        NoPrefix: the model's decoder blocks are unknown.
    """

    def __init__(
        self,
        store: TensorStore,
        model: nn.Module,
        training: bool,
        proven: set[str],
        notices: Notices,
        stops: Collection[int] = (),
        keep: bool = True,
    ) -> None:
        self.model, self._notices = model, notices
        self._error: str | None = None  # of this class, reported once the plain path has succeeded
        self._draws: bool | None = None  # whether training draws random numbers; None: not checked yet
        self._training = training
        self._made_for = self._state_of_model()
        self._layers = steering_layers(model)  # listed once, because a walk over all modules takes long
        self._draws_by_mode = training or model.training
        # without frozen blocks the suffix is the whole model, which can still run without padding
        try:
            count = frozen_blocks(model, training) if keep else 0
        except NoPrefix as why:
            notices.off(why)
            count = 0
        self.decoder = Decoder(model, count)
        self._proofs = Proofs(model, self.decoder, proven)
        self._states = (
            CachedStates(store, model, self.decoder, training, self._draws_by_mode, notices, stops) if count else None
        )
        # Tokens that run once for several rows cannot have different random numbers in each.
        random = self._draws_by_mode and any(dropout(module) for module in model.modules())
        suffix = not random and count < self.decoder.depth
        self.packs = suffix and self.decoder.packs
        self.shares_prompts = suffix and bool(self.decoder.cache) and self.decoder.takes("use_cache")
        # with `positions="completion"` prompts are constants of the suffix, too
        constant = self.shares_prompts and count > 0 and prompts_are_constant(model, training)
        self._caches = PromptCaches(store, model, self.decoder) if constant else None
        if suffix and not self.packs:
            name, attention = type(self.decoder.module).__name__, attention_of(base_model(model))
            notices.less(
                f"rows keep their padding: {name} with {attention} attention has no argument for where rows begin"
            )
        # The prompts of a generation always start in the first block.
        packs = self.decoder.packs and not random
        self._generation = Generation(self.decoder, self._proofs, self._run_packed) if packs else None
        self._longest = original_context(text_config(base_model(model)))
        self._labels_only = False

    @property
    def skipped(self) -> int:
        """How many blocks are replaced by states from the store."""
        return 0 if self._states is None else self.decoder.count

    def run_whole_rows(self) -> None:
        """Run every row as it is, with its padding and in one piece."""
        self.shares_prompts, self.packs, self._caches, self._generation = False, False, None, None

    def keep_rows_apart(self, share_prompts: bool) -> None:
        """Every row has its own vector: rows share no tokens, except pairs if `share_prompts`."""
        self.packs, self.shares_prompts, self._generation = False, self.shares_prompts and share_prompts, None

    @contextmanager
    def on(self, labels_only: bool = False) -> Iterator[None]:
        """Skip what can be skipped in every forward pass inside the context.

        Args:
            labels_only: Whether the outputs before the last prompt token are not read. Then prompts that no adapter
                changes need not run at all.
        """
        # The checks are valid only for the state in which the model was checked.
        drawing = self._training or self.model.training
        if self._made_for != self._state_of_model() or drawing > self._draws_by_mode:
            self._notices.off("adapters, trained parameters or the mode have changed since it was made")
            self._leave_nothing_out()
        before = self._labels_only
        # an inner evaluation may read less than the outer one, never more
        self._labels_only = labels_only and (before or not self.decoder.is_on)
        try:
            with self.decoder.on(self._forward):
                yield
        finally:
            self._labels_only = before
        if self._error is not None:  # an error of the model itself would have been raised by the plain path
            self._notices.failed("a pass without them", self._error)
            self._error = None

    # -- the pass -----------------------------------------------------------------------------------------------

    def _leave_nothing_out(self) -> None:
        self._states = None
        self.run_whole_rows()

    def _forward(self, call: dict[str, Any]) -> Any | None:
        """The decoder's output; None if the plain path has to run, as after any error."""
        if self._states is None and not self.shares_prompts and not self.packs and self._generation is None:
            return None
        ids = call.get("input_ids")
        # so that an error in this class changes no random number
        rewind = draws_again(ids.device) if self._draws_by_mode and isinstance(ids, Tensor) else None
        try:
            return self._output(call)
        except Exception as error:
            self._leave_nothing_out()
            self._error = in_words(error)
            # The plain path has to draw the same numbers again.
            if rewind is not None:
                rewind()
            return None

    def _output(self, call: dict[str, Any]) -> Any | None:
        # with a cache the tokens are not the whole rows
        if any(call.get(name) is not None for name in CACHE_NAMES):  # generation
            return self._prompts(call)
        try:
            rows = self._rows(call)
        except Unknown as why:
            self._notices.off(why)
            return None
        # first what is cached, then the cheapest way to run the rest
        h_RCD = self._cached(call, rows)
        if (self.shares_prompts or self.packs) and self._draws_by_mode:
            self._check_draws(call, rows[0])
        if h_RCD is not None and self._labels_only:
            output = self._completions(call, rows, h_RCD)
            if output is not None:
                return output
        if (layout := self._layout(call, h_RCD)) is not None:
            return self._run_packed(call, h_RCD, layout)
        if (split := self._split(call, h_RCD)) is not None:
            return run_split(self.model, self.decoder, call, h_RCD, split)
        return None if h_RCD is None else self.decoder.run(call, h_RCD)

    def _rows(self, call: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """The rows of a call, each alone.

        Raises:
            Unknown: the call asks for outputs of blocks that would be skipped, or has inputs other than
                rows of tokens.
        """
        # outputs of the blocks that would be skipped
        if self._setting(call, "use_cache"):
            raise Unknown("a call requests the keys and values of all layers; set use_cache=False if it needs none")
        if torch.is_grad_enabled() and (why := self.decoder.not_recomputable()):
            raise Unknown(why)
        for name in _KEPT_BY_LAYER:
            if self._setting(call, name):
                raise Unknown(f"{name} needs all layers")
        rows = rows_of(call)
        if self._beyond_rope(call):
            raise Unknown(f"beyond {self._longest} tokens this RoPE depends on the longest row of a batch")
        return rows

    def _setting(self, call: Mapping[str, Any], name: str) -> bool:
        value = call.get(name)
        return bool(getattr(self.decoder.module.config, name, False) if value is None else value)

    # -- ways to leave something out, each proven before it is used ---------------------------------------------

    def _cached(self, call: Mapping[str, Any], rows: list[dict[str, Tensor]]) -> Tensor | None:
        """States after the cached prefix, `(R, C, D)`; None if it has to run."""
        if self._states is None:
            return None
        try:
            h_RCD = self._states.of(rows, call["input_ids"].shape[1])
            what = "the cache of the lower layers"
            # The shortcut is verified on the first batch, before anything is stored.
            if self._proofs.missing(what, call):
                sample = torch.tensor(shortest_and_longest([row["input_ids"].shape[1] for row in rows]))
                self._proofs.make(call, what, sample, lambda few: self.decoder.run(few, h_RCD[sample]))
            self._states.keep()
        except NoPrefix as why:
            self._states = None
            self._notices.off(why)
            return None
        return h_RCD

    def _completions(self, call: Mapping[str, Any], rows: list[dict[str, Tensor]], h_RCD: Tensor) -> Any | None:
        """The output after each prompt, whose keys and values are cached; None if prompts have to run."""
        caches = self._caches
        split = None if caches is None or self._beyond_window(call) else caches.split(call)
        if caches is None or split is None:
            return None
        try:
            what = f"running completions only{kind_of_rows(split.starts, call)}"
            if self._proofs.missing(what, call):
                some, sample = split.only(shortest_and_longest(split.prompts.tolist()))
                # only the output after the prompt is valid
                column_C = torch.arange(call["input_ids"].shape[1])
                read_RC = (column_C >= some.starts[:, None]) & (column_C < some.lengths[:, None])
                few = [rows[i] for i in sample.tolist()]
                self._proofs.make(
                    call, what, sample, lambda sampled: caches.run(sampled, few, h_RCD[sample], some), read_RC
                )
            output = caches.run(call, rows, h_RCD, split)
            caches.keep()
            return output
        except NoPrefix as why:
            self._caches = None
            self._notices.less(why)
            return None

    def _layout(self, call: Mapping[str, Any], h_RCD: Tensor | None) -> Layout | None:
        """The layout in which rows run without padding; None if they keep it."""
        lengths_R = row_lengths(call) if self.packs else None
        if lengths_R is None:
            return None
        # If it is unknown which tokens are steered, rows share none.
        ends_R = self._ends()
        share = ends_R is not None or not self._steers_by_position()
        layout = common_layout(call, lengths_R, ends_R, share)
        if layout is None:
            return None
        try:
            what = f"a pass without padding{kind_of_rows(lengths_R, call)}"
            if self._proofs.missing(what, call):
                sample = torch.tensor(shortest_and_longest(lengths_R.tolist()))

                # the sample has its own layout
                def run(few: dict[str, Any]) -> Any:
                    ends = None if ends_R is None else ends_R[sample]
                    sample_layout = common_layout(few, lengths_R[sample], ends, share, at_least=0.0)
                    return self._run_packed(few, None if h_RCD is None else h_RCD[sample], sample_layout)

                self._proofs.make(call, what, sample, run)
        except NoPrefix as why:
            self.packs = False
            self._notices.less(why)
            return None
        return layout

    def _run_packed(
        self,
        call: Mapping[str, Any],
        h_RCD: Tensor | None,
        layout: Layout | None,
        states: KeysAndValues | None = None,
    ) -> Any:
        """The decoder's output on a batch, computed on packed rows. `states` collects keys and values by layer."""
        assert layout is not None
        # Steering layers use row and column to find the tokens that they steer.
        row_1T, column_1T = layout.row_T[None], layout.column_T[None]
        with layout.at_work(self.decoder.module.config, states), part(self._layers, row_1T, column_1T):
            output = self.decoder.run(layout.call(call), None if h_RCD is None else layout.packed(h_RCD))
        # the head reads rows
        output.last_hidden_state = layout.unpacked(output[0])
        return output

    def _prompts(self, call: Mapping[str, Any]) -> Any | None:
        """The output on the prompts of a generation, whose cache is filled; None if the plain path has to run."""
        if self._generation is None or torch.is_grad_enabled() or self._draws_by_mode or self._steers_by_position():
            return None
        if self._beyond_window(call) or self._beyond_rope(call):
            return None
        try:
            return self._generation.output(call)
        except NoPrefix as why:
            self._generation = None
            self._notices.less(why)
            return None

    def _split(self, call: Mapping[str, Any], h_RCD: Tensor | None) -> Split | None:
        """The split with which prompts that two rows share run once; None if that saves little."""
        if not self.shares_prompts or self._beyond_window(call):
            return None
        # Rows with several prompts, or with unknown ones, share no prompt.
        ends_R = self._ends()
        split = None if ends_R is None and self._steers_by_position() else shared_prompts(call, ends_R)
        if split is None:
            return None
        try:
            what = f"a shared pass over the prompts{kind_of_rows(split.starts, call)}"
            if self._proofs.missing(what, call):
                some, sample = split.only(shortest_and_longest(split.prompts.tolist()))
                h_SCD = None if h_RCD is None else h_RCD[sample]
                self._proofs.make(
                    call, what, sample, lambda few: run_split(self.model, self.decoder, few, h_SCD, some)
                )
        except NoPrefix as why:
            self.shares_prompts = False
            self._notices.less(why)
            return None
        return split

    def _check_draws(self, call: Mapping[str, Any], row: Mapping[str, Tensor]) -> None:
        """Run every row as it is if training draws random numbers (in routers, say), which differ between rows."""
        if self._draws is None:

            def run(row: Mapping[str, Tensor]) -> Any:
                # as steering layers see the first row
                column_1C = torch.arange(row["input_ids"].shape[1], device=row["input_ids"].device)[None]
                with part(self._layers, column_1C[0, :1], column_1C):  # row 0
                    return self.decoder.run({**row, "use_cache": False}, None)

            self._draws = draws(self.model, row, run)[1]
        if self._draws:
            self.run_whole_rows()
            self._notices.less("no row is run in parts: training draws random numbers, which differ between rows")

    def _beyond_window(self, call: Mapping[str, Any]) -> bool:
        return beyond_window(self.decoder.module.config, call["input_ids"].shape[1])

    def _beyond_rope(self, call: Mapping[str, Any]) -> bool:
        return self._longest is not None and call["input_ids"].shape[1] > self._longest

    def _ends(self) -> Tensor | None:
        """Where each row's prompt ends, `(R,)`, if vectors depend on that and every row has one prompt."""
        return self._layers[0].boundary.prompt_end if self._steers_by_position() else None

    def _steers_by_position(self) -> bool:
        return any(c.positions != "all" for layer in self._layers for c in layer.config.values())

    def _state_of_model(self) -> tuple[Any, ...]:
        """The state that the checks hold for: unfreezing a layer or adding an adapter changes what is constant."""
        trained = tuple(id(p) if p.requires_grad else 0 for p in self.model.parameters())
        return trained, tuple(getattr(self.model, "peft_config", ()))
