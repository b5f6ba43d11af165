"""Find prompts by labels: one in a row, or several (packed samples, chats of several turns)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def samples_of(tokens: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """The index of the sample in its row that each token belongs to, `(rows, columns)`; None if a row is one sample.

    Samples are separated by `seq_idx`, by `cu_seq_lens_q`, or by position ids that start again, as in transformers'
    own attention masks. Position ids also start again after padding, which does not start a sample.
    """
    rows, columns = tokens.shape[:2]
    if (index := arguments.get("seq_idx")) is not None:
        return index.expand(rows, columns)
    if (ends := arguments.get("cu_seq_lens_q")) is not None and rows == 1:
        column = torch.arange(columns, device=tokens.device)
        return torch.searchsorted(ends.to(tokens.device, column.dtype), column, right=True)[None]
    positions = arguments.get("position_ids")
    if positions is None or positions.ndim != 2 or positions.shape[1] != columns:
        return None
    starts = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=1) != 1).expand(rows, columns)
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]:
        real = mask.bool()
        starts = starts & real & real.roll(1, dims=1)
    return starts.cumsum(dim=1)


def prompts_of(labels: Tensor, samples: Tensor | None = None) -> Tensor:
    """True on tokens of a prompt, `(rows, columns)`: those without a label before a labelled one of their sample, and
    all tokens of a sample without labels."""
    labelled = labels != -100
    before = _nearest(labelled, samples, after=False)
    return ~labelled & (_nearest(labelled, samples, after=True) | ~before)


def last_of_prompts(prompts: Tensor, real: Tensor | None, samples: Tensor | None = None) -> Tensor:
    """True on the last real (not padding) token of each prompt, `(rows, columns)`."""
    candidates = prompts if real is None else prompts & real
    runs = (~prompts).cumsum(dim=1)  # constant within a prompt
    if samples is not None:
        runs = runs + samples * (prompts.shape[1] + 1)
    return candidates & ~_nearest(candidates, runs, after=True, strictly=True)


def hides_a_first_label(labels: Tensor, samples: Tensor) -> Tensor:
    """Whether a packed sample starts with exactly one unlabelled token. It may be a prompt or not, because
    padding-free collators remove the label of every first token."""
    first = torch.ones_like(samples, dtype=torch.bool)
    first[:, 1:] = samples[:, 1:] != samples[:, :-1]
    second = first.roll(1, dims=1) & ~first
    second[:, 0] = False
    return (second & (labels != -100) & (labels.roll(1, dims=1) == -100)).any()


def _nearest(chosen: Tensor, groups: Tensor | None, after: bool, strictly: bool = False) -> Tensor:
    """Whether the group of each token has a chosen token at it or after (or before) it, `(rows, columns)`."""
    columns = chosen.shape[1]
    column = torch.arange(columns, device=chosen.device)
    if after:
        nearest = torch.where(chosen, column, columns).flip(1).cummin(dim=1).values.flip(1)
        if strictly:
            nearest = torch.cat([nearest[:, 1:], torch.full_like(nearest[:, :1], columns)], dim=1)
        exists = nearest < columns
    else:
        nearest = torch.where(chosen, column, -1).cummax(dim=1).values
        exists = nearest >= 0
    if groups is None:
        return exists
    return exists & (groups.gather(1, nearest.clamp(0, columns - 1)) == groups)
