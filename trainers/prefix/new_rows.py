"""Compute the states of new rows: several rows run packed into one line, but the bits of each are independent.

Matrix products are computed by kernels that are chosen by the number of tokens, and each kernel can sum in a different
order. So a row would have other bits in another batch, and a resumed run would read other states. There are two ways
to avoid this:

*Lines of any length*, in 32 bits: above some number of tokens, this machine's kernels agree (`least_tokens`). Shorter
rows run alone.

*Filled lines*, in 16 bits and where kernels disagree: every line has the same number of tokens, the last
ones being filler, so that every product has one shape. Longer rows run alone.

Either way is compared bit by bit in the first batch. If bits differ, and always with experts and in narrow models, all
rows run alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.outputs import states_in
from ..host_copies import on_host
from .decoder import Decoder
from .exactness import Notices, has_experts, is_wide, least_tokens
from .packing import alone_layout

Row = Mapping[str, Tensor]
"""Model inputs of one row, `(1, tokens)` each."""

States = dict[int, Tensor]
"""States of one row, `(tokens, D)`, by the number of blocks below them."""

FILLED = {"cpu": 256}
"""Tokens of a filled line, by device: on a CPU, longer lines save little time per token."""
FILLED_ELSEWHERE = 2048
_FEW = 8  # tokens


class NewRows:
    """Computes the states after the cached prefix of rows that are not in the store.

    Args:
        decoder: The stack of blocks.
        stops: Numbers of blocks after which states are also stored.
        notices: Reports why rows run one by one.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[int], notices: Notices) -> None:
        self.decoder, self.stops, self._notices = decoder, stops, notices
        alike = decoder.packs and not has_experts(decoder.module.config) and is_wide(decoder.inside(decoder.count))
        # whether rows run together; None until it is known
        self._together: bool | None = None if alike else False
        # shorter rows run alone; None: lines are filled. Valid once measured
        self._least: int | None = None
        self._measured = False

    def states(self, rows: Sequence[Row]) -> list[States]:
        """The states of every row."""
        states: dict[int, States] = {}
        if self._together is not False:
            self._measure(rows)
            for line in self._lines(rows):
                if self._together is not False:
                    states |= self._checked([rows[i] for i in line], line)
        return [states.get(i) or self._alone(row) for i, row in enumerate(rows)]

    # -- which rows run together ----------------------------------------------------------------------------------

    def _measure(self, rows: Sequence[Row]) -> None:
        """Decide once between lines of any length and filled lines."""
        if self._measured:
            return
        device, modules = rows[0]["input_ids"].device, list(self.decoder.inside(self.decoder.count))
        narrow = any(p.dtype.itemsize < 4 for module in modules for p in module.parameters(recurse=False))
        # 16 bits hide most differences between kernels, so a trial would not find them
        if not narrow and not torch.is_autocast_enabled(device.type):
            self._least = least_tokens(modules)
        self._measured = True

    def _lines(self, rows: Sequence[Row]) -> list[list[int]]:
        """Indices of the rows of every line."""
        lengths = [row["input_ids"].shape[1] for row in rows]
        plain = [i for i, row in enumerate(rows) if _is_plain(row)]
        if self._least is not None:
            line = [i for i in plain if lengths[i] >= self._least]
            # a single row has the same bits if it runs alone
            return [line] if len(line) > 1 else []
        # the longest rows first, each into the first line that has room for it
        size = self._line_tokens(rows)
        lines: list[list[int]] = []
        for i in sorted((i for i in plain if lengths[i] <= size), key=lambda i: -lengths[i]):
            room = (line for line in lines if sum(lengths[j] for j in line) + lengths[i] <= size)
            line = next(room, None)
            if line is None:
                lines.append(line := [])
            line.append(i)
        return lines

    def _line_tokens(self, rows: Sequence[Row]) -> int:
        return FILLED.get(rows[0]["input_ids"].device.type, FILLED_ELSEWHERE)

    def _checked(self, rows: Sequence[Row], line: Sequence[int]) -> dict[int, States]:
        """The states of a line, by index of the row; empty if bits depend on the other rows."""
        states = self._in_one_line(rows)
        if self._together is None:
            self._together = self._have_their_own_bits(rows, states)
            if not self._together:
                self._notices.less(
                    "new rows run one by one: on this machine they round differently together, and a resumed run "
                    "would see them in other batches"
                )
                return {}
        return dict(zip(line, states, strict=True))

    def _have_their_own_bits(self, rows: Sequence[Row], states: Sequence[States]) -> bool:
        """Whether the states of the shortest, the middle and the longest row equal those of the row by itself."""
        if self._least is None and len(rows) == 1:
            # Repeat the row as often as it fits: it must have the same bits at every place of the line.
            times = self._line_tokens(rows) // rows[0]["input_ids"].shape[1]
            rows = [*rows] * times
            states = self._in_one_line(rows)
        by_length = sorted(range(len(rows)), key=lambda i: rows[i]["input_ids"].shape[1])
        for i in {by_length[0], by_length[len(rows) // 2], by_length[-1]}:
            alone = self._alone(rows[i]) if self._least is not None else self._in_one_line([rows[i]])[0]
            if not all(torch.equal(state, alone[stop]) for stop, state in states[i].items()):
                return False
        return True

    # -- running them -----------------------------------------------------------------------------------------------

    def _alone(self, row: Row) -> States:
        with self._noting_stops() as passed:
            state_1CD = self.decoder.state({**row, "use_cache": False})
        return {stop: state[0] for stop, state in {**passed, self.decoder.count: state_1CD}.items()}

    def _in_one_line(self, rows: Sequence[Row]) -> list[States]:
        filled = self._line_tokens(rows) if self._least is None else None
        layout, call = alone_layout(rows, filled)
        with layout.at_work(self.decoder.module.config), self._noting_stops() as passed:
            passed[self.decoder.count] = self.decoder.state(call)
        # the line is cut into rows again, at every stop
        lengths = list(layout.lengths or ())
        split = {stop: state_1TD[0].split(lengths) for stop, state_1TD in passed.items()}
        return [{stop: states[i] for stop, states in split.items()} for i in range(len(rows))]

    @contextmanager
    def _noting_stops(self) -> Iterator[States]:
        """Yield a dictionary that the forward pass fills: number of blocks -> state after them."""
        passed: States = {}

        def note(stop: int, module: nn.Module, args: object, output: Any) -> None:
            passed[stop] = states_in(output).detach()

        handles = [self.decoder.blocks[n - 1].register_forward_hook(partial(note, n)) for n in self.stops]
        try:
            yield passed
        finally:
            for handle in handles:
                handle.remove()


def _is_plain(row: Row) -> bool:
    """Whether a row consists of at least a few tokens without padding, at default positions, and of nothing else."""
    if not set(row) <= {"input_ids", "attention_mask"} or row["input_ids"].shape[1] < _FEW:
        return False
    return "attention_mask" not in row or bool(on_host(row["attention_mask"]).all())
