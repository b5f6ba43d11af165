"""One batch, whatever collator made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ._host import both, on_host, sent, unpacked

_NOT_FOR_THE_MODEL = {"labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps", "seq_lengths"}


@dataclass(frozen=True)
class Batch:
    """Model inputs and what is to be predicted.

    Attributes:
        inputs: Keyword arguments of the model, every tensor `(rows, ...)`.
        labels: Token ids to predict, -100 elsewhere, `(rows, tokens)`.
        pairs: Whether the first half of the rows are chosen and the second half rejected answers.
        reference_logps: Log-probability of each row's answer under the reference, `(rows,)`, if it was computed before
            (`DPOConfig(precompute_ref_log_probs=True)`).
    """

    inputs: dict[str, Any]
    labels: Tensor
    pairs: bool
    reference_logps: Tensor | None = None

    @classmethod
    def read(cls, inputs: Mapping[str, Any]) -> Batch:
        """From the inputs of TRL's preference collator (`completion_mask`), or of a collator that makes `labels`.

        Raises:
            ValueError: neither is there.
        """
        inputs = unpacked(inputs)
        model_inputs = {k: v for k, v in inputs.items() if k not in _NOT_FOR_THE_MODEL}
        if "completion_mask" in inputs:
            labels = both(
                lambda ids, mask: ids.masked_fill(mask == 0, -100), inputs["input_ids"], inputs["completion_mask"]
            )
            known = [inputs[k] for k in ("ref_chosen_logps", "ref_rejected_logps") if k in inputs]
            return cls(model_inputs, labels, pairs=True, reference_logps=torch.cat(known) if known else None)
        if "labels" not in inputs:
            raise ValueError(f"A batch needs labels or completion_mask; this one has {sorted(inputs)}.")
        return cls(model_inputs, inputs["labels"], pairs=False)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        known = None if self.reference_logps is None else self.reference_logps.to(device)
        return Batch(inputs, self.labels.to(device), self.pairs, known)

    @property
    def chosen(self) -> Batch:
        """The chosen half of a pair batch."""
        half = len(self.labels) // 2

        def first(values: Tensor) -> Tensor:
            return both(lambda v: v[:half], values)

        inputs = {k: first(v) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        known = None if self.reference_logps is None else self.reference_logps[:half]
        return Batch(inputs, first(self.labels), pairs=False, reference_logps=known)

    @cached_property
    def targets(self) -> Tensor:
        """Labels on the columns that predict one in some row, `(rows, columns)`."""
        return sent(self._next[:, (self._next != -100).any(dim=0)], self.labels.device)

    @cached_property
    def answers(self) -> Tensor:
        """The labels of `targets` in one line, `(labels,)`, row after row."""
        return sent(self._next[self._next != -100], self.labels.device)

    @cached_property
    def _next(self) -> Tensor:
        """What every token but the last has to predict, `(rows, tokens - 1)`, on the host."""
        return on_host(self.labels)[:, 1:]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Row and column of every prediction of a label."""
        rows, columns = (self._next != -100).nonzero(as_tuple=True)
        return sent(rows, self.labels.device), sent(columns, self.labels.device)

    def labelled(self, states: Tensor) -> Tensor:
        """Of states `(rows, tokens, ...)` those that predict a label, `(labels, ...)`, row after row. Tokens of its
        own that an adapter put first (prompt tuning does) are passed over."""
        rows, columns = self._places
        tokens = states.shape[1]
        return states.flatten(0, 1).index_select(0, rows * tokens + columns + (tokens - self.labels.shape[1]))

    def spread(self, values: Tensor) -> Tensor:
        """Values of labels, `(labels,)`, where `targets` has these labels; zero elsewhere."""
        labels = on_host(self.targets)
        places = sent((labels != -100).flatten().nonzero().squeeze(1), values.device)
        return values.new_zeros(labels.numel()).index_copy(0, places, values).view(labels.shape)

    def count(self, unit: Literal["example", "token"]) -> Tensor | int:
        """Number of examples (rows, or pairs), or of labelled tokens that have something before them."""
        if unit == "token":
            return (self.labels[:, 1:] != -100).sum()
        return len(self.labels) // 2 if self.pairs else len(self.labels)
