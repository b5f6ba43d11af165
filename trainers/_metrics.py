"""What is logged beside the loss of training: margins at strength 1, and of an evaluation the loss itself.

In an evaluation every example counts once, whatever the batches and processes: those that were repeated to fill the
last batch are left out, and a loss per token is averaged over all tokens.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor

from ..losses import Loss
from ._at import ModelAt
from ._batch import Batch

_LOSS, _COUNT = "loss", "count"


class Metrics:
    """Values by name, one an example, since the last log of their kind.

    Args:
        accelerator: Of the trainer; it knows the other processes.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._values: dict[bool, dict[str, list[Tensor]]] = {True: defaultdict(list), False: defaultdict(list)}

    @torch.no_grad()
    def note(self, loss: Loss, values: Tensor, at: ModelAt, batch: Batch, training: bool) -> None:
        """Take in what a batch has shown.

        Args:
            loss: The loss.
            values: What it gave.
            at: Where the margins are.
            batch: The batch.
            training: Whether this is a step of training.
        """
        found = _margins(at, batch)
        if not training:
            found |= _by_example(values, batch, loss.unit)
        for name, value in found.items():
            if not training:  # now: only the loader that is being read knows what was repeated
                value = self._accelerator.gather_for_metrics(value)
            self._values[training][name].append(value)

    def read(self, training: bool) -> dict[str, float]:
        """Means over all processes, after which counting starts again."""
        kept = {name: torch.cat(values) for name, values in self._values[training].items()}
        self._values[training].clear()
        if training:
            return {name: float(self._accelerator.gather(values).mean()) for name, values in kept.items()}
        counts = kept.pop(_COUNT, None)
        found = {name: float(values.mean()) for name, values in kept.items() if name != _LOSS}
        if counts is not None:
            found[_LOSS] = float(kept[_LOSS].sum() / counts.sum())
        return found


def _margins(at: ModelAt, batch: Batch) -> dict[str, Tensor]:
    """At strength 1, of pairs that were seen there."""
    seen = at.seen
    if not batch.pairs or 1.0 not in seen:
        return {}
    policy = seen[1.0]
    margin = (policy.chosen.logps - policy.rejected.logps).detach()
    found = {"pair_accuracy": (margin > 0).float(), "margin": margin}
    if 0.0 in seen:
        base = seen[0.0]
        found["margin_gain"] = margin - (base.chosen.logps - base.rejected.logps)
    return found


def _by_example(values: Tensor, batch: Batch, unit: Literal["example", "token"]) -> dict[str, Tensor]:
    """Sum and number of a loss's values, by example; of a loss per token they come by row, or all in a line."""
    if unit == "example":
        return {_LOSS: values.float(), _COUNT: torch.ones_like(values, dtype=torch.float32)}
    tokens = (batch.labels[:, 1:] != -100).sum(dim=1)
    if values.ndim == 2:
        sums = values.float().sum(dim=1)
    else:
        row = torch.arange(len(tokens), device=values.device).repeat_interleave(tokens)
        sums = torch.zeros(len(tokens), device=values.device).index_add(0, row, values.float())
    return {_LOSS: sums, _COUNT: tokens.float()}


def evaluation_loss(metrics: dict[str, float]) -> float:
    """The loss of an evaluation: what a search over training arguments makes small.

    Raises:
        ValueError: there are several, one of each evaluation set.
    """
    if "eval_loss" not in metrics:
        raise ValueError(
            f"The evaluation measured {sorted(metrics)}, and no eval_loss to search by. Give compute_objective=."
        )
    return metrics["eval_loss"]
