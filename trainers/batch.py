"""One format for the batches of all collators.

Shapes: B rows, T tokens, L labelled tokens of the whole batch, C columns that predict a label in some row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from .host_copies import both, on_host, sent, unpacked

_NOT_FOR_THE_MODEL = {"labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps", "seq_lengths"}


@dataclass(frozen=True)
class Batch:
    """Model inputs, and the tokens to predict.

    Attributes:
        inputs: Keyword arguments of the model, every tensor `(rows, ...)`.
        labels: Token ids to predict, -100 elsewhere, `(rows, tokens)`.
        pairs: Whether the first half of the rows are chosen and the second half rejected answers.
        reference_logps: Log-probability of each row's answer under the reference, `(rows,)`, if it was precomputed
            (`DPOConfig(precompute_ref_log_probs=True)`).
    """

    inputs: dict[str, Any]
    labels: Tensor
    pairs: bool
    reference_logps: Tensor | None = None

    @classmethod
    def read(cls, inputs: Mapping[str, Any]) -> Batch:
        """Read the batch of TRL's preference collator (`completion_mask`), or of a collator that makes `labels`.

        Raises:
            ValueError: it has neither.
        """
        inputs = unpacked(inputs)
        model_inputs = {k: v for k, v in inputs.items() if k not in _NOT_FOR_THE_MODEL}
        if "completion_mask" in inputs:
            labels_BT = both(
                lambda ids, mask: ids.masked_fill(mask == 0, -100), inputs["input_ids"], inputs["completion_mask"]
            )
            logps = [inputs[k] for k in ("ref_chosen_logps", "ref_rejected_logps") if k in inputs]
            return cls(model_inputs, labels_BT, pairs=True, reference_logps=torch.cat(logps) if logps else None)
        if "labels" not in inputs:
            raise ValueError(f"A batch needs labels or completion_mask; this one has {sorted(inputs)}.")
        return cls(model_inputs, inputs["labels"], pairs=False)

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to another device."""
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        logps = None if self.reference_logps is None else self.reference_logps.to(device)
        return Batch(inputs, self.labels.to(device), self.pairs, logps)

    @cached_property
    def chosen(self) -> Batch:
        """The chosen half of a batch of pairs."""
        half = len(self.labels) // 2

        def first(values: Tensor) -> Tensor:
            return both(lambda v: v[:half], values)

        inputs = {k: first(v) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        logps = None if self.reference_logps is None else self.reference_logps[:half]
        return Batch(inputs, first(self.labels), pairs=False, reference_logps=logps)

    @cached_property
    def targets(self) -> Tensor:
        """Labels in the columns that predict one in some row, `(rows, columns)`."""
        return sent(self._next_BT[:, (self._next_BT != -100).any(dim=0)], self.labels.device)

    @cached_property
    def answers(self) -> Tensor:
        """All labels of `targets`, `(labels,)`, row after row."""
        return sent(self._next_BT[self._next_BT != -100], self.labels.device)

    @cached_property
    def _next_BT(self) -> Tensor:
        """The label that each token but the last predicts, `(rows, tokens - 1)`, on the host."""
        return on_host(self.labels)[:, 1:]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Row and column of every token that predicts a label, each `(labels,)`."""
        rows_L, columns_L = (self._next_BT != -100).nonzero(as_tuple=True)
        return sent(rows_L, self.labels.device), sent(columns_L, self.labels.device)

    def labelled(self, states: Tensor) -> Tensor:
        """Select the states that predict a label.

        An adapter can put extra tokens in front (prompt tuning does); these are skipped.

        Args:
            states: `(rows, tokens, ...)`.

        Returns:
            `(labels, ...)`, row after row.
        """
        rows_L, columns_L = self._places
        tokens = states.shape[1]
        return states.flatten(0, 1).index_select(0, rows_L * tokens + columns_L + (tokens - self.labels.shape[1]))

    def spread(self, values: Tensor) -> Tensor:
        """Put one value per label, `(labels,)`, where `targets` has the labels, `(rows, columns)`; zero elsewhere."""
        labels_BC = on_host(self.targets)
        places_L = sent((labels_BC != -100).flatten().nonzero().squeeze(1), values.device)
        return values.new_zeros(labels_BC.numel()).index_copy(0, places_L, values).view(labels_BC.shape)

    def count(self, unit: Literal["example", "token"]) -> Tensor | int:
        """Count the examples (rows, or pairs), or the labelled tokens that have a token before them."""
        if unit == "token":
            return (self.labels[:, 1:] != -100).sum()
        return len(self.labels) // 2 if self.pairs else len(self.labels)


class Inputs(dict[str, Any]):
    """A collated batch as the parents read it, and the `Batch` that our losses read; both are made only once."""

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Inputs:
        """Unpack a collated batch, unless that was done before."""
        return inputs if isinstance(inputs, cls) else cls(unpacked(inputs))

    @cached_property
    def batch(self) -> Batch:
        """The batch.

        Raises:
            ValueError: it has no labels.
        """
        return Batch.read(self)

    @property
    def labelled(self) -> bool:
        """Whether the batch marks the tokens to predict."""
        return "labels" in self or "completion_mask" in self

    def has_units_of(self, pairs: bool) -> bool:
        """Whether the batch has the columns of a loss on pairs, or on rows; a custom collator may omit them."""
        return "completion_mask" in self if pairs else "labels" in self and "completion_mask" not in self
