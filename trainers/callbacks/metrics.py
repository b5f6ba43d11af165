"""Margins at strength 1, logged with the training loss, and the means of an evaluation.

In an evaluation every example counts once, whatever the batches and processes: examples repeated to fill the last
batch are left out, and a loss per token is averaged over all tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..model_at import ModelAt
from .base import LossValues, SteeringCallback

_LOSS, _COUNT = "loss", "count"


class _Values(defaultdict[str, list[Tensor]]):
    """Name -> one tensor per batch, with one value per example."""

    def __init__(self) -> None:
        super().__init__(list)


class Metrics(SteeringCallback):
    """Means over the examples of the training steps since the last log, or of one evaluation.

    Values are kept only inside `step` and `evaluation`. So an evaluation depends on its rows alone: it never sees the
    values of another evaluation, finished or not, of a prediction, or of a user's own call of `compute_loss`; and the
    values of an evaluation inside an evaluation, or inside a step, stay separate.

    Args:
        accelerator: The trainer's; it gathers values from all processes.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._training = _Values()
        self._open: list[_Values] = []  # the innermost loop last

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the values that an earlier training did not log."""
        self._training.clear()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of a training step: its values are kept until they are logged."""
        with self._opened(self._training):
            yield

    @contextmanager
    def evaluation(self) -> Iterator[dict[str, list[Tensor]]]:
        """Context of one evaluation or prediction; it yields the values that `means` averages."""
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
    def on_loss_values(self, result: LossValues) -> None:
        """Keep the margins of pairs, and in an evaluation the loss by example."""
        if not self._open:
            return
        training = self._open[-1] is self._training
        by_name = _margins(result.at, result.batch)
        if not training:
            by_name |= _loss_by_example(result)
        for name, value in by_name.items():
            if not training:  # gather now: only the loader that is being read knows which examples are repeated
                value = self._accelerator.gather_for_metrics(value)
            self._open[-1][name].append(value)

    def extra_logs(self) -> dict[str, float]:
        """Means of training since the last log, over all processes."""
        values = {name: torch.cat(tensors) for name, tensors in self._training.items()}
        self._training.clear()
        return {name: float(self._accelerator.gather(value).mean()) for name, value in values.items()}


def means(values: Mapping[str, list[Tensor]], prefix: str) -> dict[str, float]:
    """Average the values of an evaluation, under its prefix (`eval`, `eval_<name of the set>`, `test`)."""
    tensors = {name: torch.cat(of_batches) for name, of_batches in values.items()}
    counts = tensors.pop(_COUNT, None)
    averages = {name: float(value.mean()) for name, value in tensors.items() if name != _LOSS}
    if counts is not None:
        averages[_LOSS] = float(tensors[_LOSS].sum() / counts.sum())
    return {f"{prefix}_{name}": value for name, value in averages.items()}


def evaluation_loss(metrics: dict[str, float]) -> float:
    """The loss of an evaluation, which a search over training arguments minimises.

    Raises:
        ValueError: there are several evaluation sets, with one loss each.
    """
    if "eval_loss" not in metrics:
        raise ValueError(
            f"The evaluation measured {sorted(metrics)}, but no eval_loss to minimise. Give compute_objective=."
        )
    return metrics["eval_loss"]


def _margins(at: ModelAt, batch: Batch) -> dict[str, Tensor]:
    """Margins of pairs at strength 1, each `(pairs,)`, if the loss asked for that strength."""
    outputs = at.seen
    if not batch.pairs or 1.0 not in outputs:
        return {}
    policy = outputs[1.0]
    margin = (policy.chosen.logps - policy.rejected.logps).detach()
    margins = {"pair_accuracy": (margin.sign() + 1) / 2, "margin": margin}
    if 0.0 in outputs:
        base = outputs[0.0]
        margins["margin_gain"] = margin - (base.chosen.logps - base.rejected.logps)
    return margins


def _loss_by_example(result: LossValues) -> dict[str, Tensor]:
    """Sum and number of a loss's values for each example, `(rows,)`."""
    values, batch = result.values, result.batch
    if result.loss.needs.unit == "example":
        return {_LOSS: values.float(), _COUNT: torch.ones_like(values, dtype=torch.float32)}
    tokens = (batch.labels[:, 1:] != -100).sum(dim=1)  # (rows,)
    if values.ndim == 2:  # (rows, columns)
        sums = values.float().sum(dim=1)
    else:  # (labels,)
        row = torch.arange(len(tokens), device=values.device).repeat_interleave(tokens)
        sums = torch.zeros(len(tokens), device=values.device).index_add(0, row, values.float())
    return {_LOSS: sums, _COUNT: tokens.float()}
