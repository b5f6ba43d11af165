"""What is logged beside the loss of training: margins at strength 1, and of an evaluation the loss itself.

In an evaluation every example counts once, whatever the batches and processes: those that were repeated to fill the
last batch are left out, and a loss per token is averaged over all tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ..losses import Loss
from ._at import ModelAt
from ._batch import Batch

_LOSS, _COUNT = "loss", "count"


class Metrics:
    """Means of what batches showed, of a stretch of training or of one evaluation.

    Values are kept only inside `step` and `evaluation`. So an evaluation is a function of its rows: it neither sees
    what another one noted, finished or not, nor what a prediction or somebody's own call of `compute_loss` did, and an
    evaluation inside an evaluation, or inside a step, keeps to itself.

    Args:
        accelerator: Of the trainer; it knows the other processes.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._training = _Values()
        self._open: list[_Values] = []  # the innermost loop last

    def restart(self) -> None:
        """Forget what an earlier training noted and did not log."""
        self._training.clear()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of training: its values are kept until they are logged."""
        with self._opened(self._training):
            yield

    @contextmanager
    def evaluation(self) -> Iterator[dict[str, list[Tensor]]]:
        """One evaluation or prediction: what is noted inside, for `means`."""
        values = _Values()
        with self._opened(values):
            yield values

    @contextmanager
    def _opened(self, values: _Values) -> Iterator[None]:
        self._open.append(values)
        try:
            yield
        finally:
            self._open.pop()

    @torch.no_grad()
    def note(self, loss: Loss, values: Tensor, at: ModelAt, batch: Batch) -> None:
        """Take in what a batch has shown; outside of `step` and `evaluation` nothing.

        Args:
            loss: The loss.
            values: What it gave.
            at: Where the margins are.
            batch: The batch.
        """
        if not self._open:
            return
        training = self._open[-1] is self._training
        by_name = _margins(at, batch)
        if not training:
            by_name |= _by_example(values, batch, loss.needs.unit)
        for name, value in by_name.items():
            if not training:  # now: only the loader that is being read knows what was repeated
                value = self._accelerator.gather_for_metrics(value)
            self._open[-1][name].append(value)

    def logged(self) -> dict[str, float]:
        """Means of training since the last time, over all processes."""
        values = {name: torch.cat(of_batches) for name, of_batches in self._training.items()}
        self._training.clear()
        return {name: float(self._accelerator.gather(value).mean()) for name, value in values.items()}


class _Values(defaultdict[str, list[Tensor]]):
    """Values by name, one an example, a tensor of them for every batch."""

    def __init__(self) -> None:
        super().__init__(list)


def means(values: Mapping[str, list[Tensor]], prefix: str) -> dict[str, float]:
    """Means of an evaluation, over all processes, with its prefix (`eval`, `eval_<name of the set>`, `test`)."""
    kept = {name: torch.cat(of_batches) for name, of_batches in values.items()}
    counts = kept.pop(_COUNT, None)
    found = {name: float(value.mean()) for name, value in kept.items() if name != _LOSS}
    if counts is not None:
        found[_LOSS] = float(kept[_LOSS].sum() / counts.sum())
    return {f"{prefix}_{name}": value for name, value in found.items()}


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
