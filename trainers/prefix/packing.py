"""Run rows without padding, packed into one line of tokens; a prefix that rows share runs once.

Apart from attention, a block treats its tokens one by one. So the rows of a batch are packed into one line, with
positions that say where each token was, and only attention sees rows again: through transformers' public
`AttentionInterface`, the model's own attention gets them side by side, with the mask that the model makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ..host_copies import on_host, sent

_NAME = "steertune_packed"


KeysAndValues = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer for packed rows, `(1, heads, T, size)` each."""


@dataclass(frozen=True)
class Layout:
    """The rows of a batch, packed into one line of T tokens.

    Attributes:
        width: Columns of the batch.
        row_T: Row of the batch that each token belongs to (the first of several that share it), `(T,)`.
        column_T: Its column, `(T,)`.
        place_RC: Where in the line the token of each row and column is; 0 on padding, `(rows, columns)`.
        lengths: For rows that must not depend on each other: tokens of each, whose attention runs row by row. None:
            attention sees all rows side by side.
    """

    width: int
    row_T: Tensor
    column_T: Tensor
    place_RC: Tensor
    lengths: tuple[int, ...] | None = None

    def packed(self, values_RC: Tensor) -> Tensor:
        """Values of a batch, `(rows, columns, ...)`, in one line, `(1, T, ...)`."""
        return values_RC[self.row_T, self.column_T][None]

    def unpacked(self, values_1T: Tensor) -> Tensor:
        """Values in one line, `(1, T, ...)`, as rows again; undefined on padding."""
        return values_1T[0][self.place_RC]

    def call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a decoder for this line."""
        # every tensor with one value per token is laid out like the tokens
        shape = call["input_ids"].shape
        packed = {k: self.packed(v) if isinstance(v, Tensor) and v.shape == shape else v for k, v in call.items()}
        # a mask of ones keeps transformers from guessing packed texts from the positions; the one that
        # counts is made by `_mask`
        mask_1T = torch.ones_like(packed["input_ids"])
        return {**packed, "attention_mask": mask_1T, "position_ids": self.column_T[None], "use_cache": False}

    @contextmanager
    def at_work(self, config: Any, caught: KeysAndValues | None = None) -> Iterator[None]:
        """Context in which the attention of models with this configuration sees rows.

        Args:
            config: The configuration that the attention layers read.
            caught: Collects keys and values of every layer.
        """
        # attention layers look up their function by name in every pass, so changing the name is enough
        global _now
        before, name = _now, config._attn_implementation  # transformers has no public name for it
        # inside another layout (a pass within a pass) the model's own attention is still the plain one
        _now = _Now(self, name if before is None else before.plain, config, caught)
        config._attn_implementation = _NAME
        try:
            yield
        finally:
            _now = before
            config._attn_implementation = name


@dataclass(frozen=True)
class _Now:
    """The active layout, the model's own attention, its configuration, and the list that collects keys and values."""

    layout: Layout
    plain: str
    config: Any
    caught: KeysAndValues | None = None


_now: _Now | None = None


def snapshot() -> Callable[[], AbstractContextManager[None]]:
    """The active layout as a context for later: gradient checkpointing runs blocks again in the backward pass."""
    return nullcontext if _now is None else functools.partial(_now.layout.at_work, _now.config)


def common_layout(
    call: Mapping[str, Any], lengths: Tensor, ends: Tensor | None, share: bool = True, at_least: float = 0.1
) -> Layout | None:
    """The layout of a batch in which each prefix that rows share occurs once; None if it saves little.

    Args:
        call: Arguments of the decoder.
        lengths: Real tokens of every row, `(rows,)`, on the host.
        ends: Where each row's prompt ends, if that decides what is steered: two rows share no token that one of them
            steers and the other does not, `(rows,)`.
        share: Whether rows may share tokens at all.
        at_least: Share of the tokens, with padding, that the layout has to save.
    """
    ids_RC = on_host(call["input_ids"])
    rows, width = ids_RC.shape
    # computed on the host, so no copy waits for the device
    column_C, row_R = torch.arange(width), torch.arange(rows)
    real_RC = column_C < lengths[:, None]
    owner_RC = row_R[:, None].expand(rows, width)
    if share and rows > 1:
        # the length of the prefix that two rows share
        same_RRC = (ids_RC[:, None] == ids_RC[None]) & real_RC[:, None] & real_RC[None]
        common_RR = same_RRC.byte().cumprod(dim=2, dtype=torch.uint8).sum(dim=2)
        if ends is not None:
            # a row without an answer ends where its tokens do
            ends_R = torch.minimum(on_host(ends), lengths)
            first_RR = torch.minimum(ends_R[:, None], ends_R[None]) - 1
            common_RR = torch.where(ends_R[:, None] == ends_R[None], common_RR, torch.minimum(common_RR, first_RR))
        # the first of the rows that are equal up to a column represents them all: argmax finds the first True
        owner_RC = (common_RR[:, :, None] > column_C).to(torch.uint8).argmax(dim=1)
    # a token is packed if its row represents itself
    kept_RC = real_RC & (owner_RC == row_R[:, None])
    if int(kept_RC.sum()) > (1 - at_least) * rows * width:
        return None
    # where each row and column finds its token in the line
    index_RC = (kept_RC.flatten().long().cumsum(0) - 1).view(rows, width)
    place_RC = torch.where(real_RC, index_RC[owner_RC, column_C], 0)
    row_T, column_T = kept_RC.nonzero(as_tuple=True)
    device = call["input_ids"].device
    return Layout(width, sent(row_T, device), sent(column_T, device), sent(place_RC, device))


def alone_layout(rows: Sequence[Mapping[str, Tensor]], tokens: int | None = None) -> tuple[Layout, dict[str, Any]]:
    """A layout of rows in which none depends on the others, and the decoder's arguments for it.

    Args:
        rows: Inputs of the rows, `(1, tokens)` each.
        tokens: Length of the line, which a dummy row fills up; None for that of the rows.
    """
    ids = [row["input_ids"][0] for row in rows]
    if tokens is not None and (missing := tokens - sum(map(len, ids))):
        ids.append(ids[0][:1].expand(missing))
    lengths = tuple(map(len, ids))
    device = ids[0].device
    # each row is a section of the line, and its positions start at 0
    row_T = torch.arange(len(ids), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    column_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    layout = Layout(max(lengths), row_T, column_T, row_T[:0], lengths)
    line = torch.cat(ids)[None]
    return layout, {
        "input_ids": line,
        "attention_mask": torch.ones_like(line),
        "position_ids": column_T[None],
        "use_cache": False,
    }


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Apply the model's own attention to rows, given packed states, `(1, heads, T, size)`."""
    assert _now is not None
    plain, layout = AttentionInterface()[_now.plain], _now.layout
    if _now.caught is not None:
        _now.caught.append((key, value))
    # they are those of the line, in which flash attention would look for packed rows
    kwargs.pop("position_ids", None)
    # rows that must not depend on each other
    if layout.lengths is not None:
        return _row_by_row(plain, module, (query, key, value), layout.lengths, attention_mask, kwargs), None
    rows, width = layout.place_RC.shape
    place = layout.place_RC.flatten()
    # each row gets a copy of the keys and values that it shares; padding gets those of any token
    side_by_side = [
        states[0].index_select(1, place).unflatten(1, (rows, width)).transpose(0, 1) for states in (query, key, value)
    ]
    output_RCHD = _in_32_bits_on_cpu(functools.partial(plain, module), side_by_side, attention_mask, kwargs)
    # for a token that rows share, take the output of the row that represents it
    return output_RCHD.flatten(0, 1).index_select(0, layout.row_T * width + layout.column_T)[None], None


def _in_32_bits_on_cpu(
    plain: Callable[..., Any], states: Sequence[Tensor], mask: Any, kwargs: Mapping[str, Any]
) -> Tensor:
    """Attention, on a CPU in 32 bits: in 16 bits its backward pass over short rows takes three times as long there."""
    device, dtype = states[0].device.type, states[0].dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # additive masks are made for the precision of the states
    if (
        device != "cpu"
        or dtype not in (torch.bfloat16, torch.float16)
        or (mask is not None and mask.dtype != torch.bool)
    ):
        return plain(*states, mask, **kwargs)[0]
    # autocast would convert them back
    with torch.autocast(device, enabled=False):
        return plain(*(state.float() for state in states), mask, **kwargs)[0].to(dtype)


def _row_by_row(
    plain: Callable[..., Any],
    module: Any,
    states: tuple[Tensor, ...],
    lengths: Sequence[int],
    masks: Sequence[Any] | None,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Attention of every row as if it were alone, `(1, T, heads, size)`."""
    # one call per row, with the shapes of the row alone, gives the bits of the row alone
    split = zip(*(tensor.split(list(lengths), dim=2) for tensor in states), strict=True)
    outputs = [plain(module, *row, None if masks is None else masks[i], **kwargs)[0] for i, row in enumerate(split)]
    return torch.cat(outputs, dim=1)


def _mask(**kwargs: Any) -> Any:
    """The mask the model would make for rows side by side. Padding needs none: it comes after all real tokens, and
    attention is causal."""
    assert _now is not None
    plain, layout = AttentionMaskInterface()[_now.plain], _now.layout

    # `kwargs` holds everything else that the mask depends on (windows, say)
    def mask(rows: int, width: int) -> Any:
        of_rows = {"batch_size": rows, "q_length": width, "kv_length": width, "attention_mask": None}
        return plain(**{**kwargs, **of_rows})

    if layout.lengths is None:
        return mask(*layout.place_RC.shape)
    # None if the mask is only causal, which attention applies faster by itself
    masks = [mask(1, length) for length in layout.lengths]
    return None if all(mask is None for mask in masks) else masks


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
