"""Evaluation of a trainer: like its parent, with our metrics, and on rows in any format that it trains on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .callbacks.metrics import evaluation_loss, means
from .construction import check_evaluation_rows
from .loss_mixin import LossMixin


class EvaluationMixin(LossMixin):
    """Evaluations, predictions and searches of a trainer with a loss of ours, or of its parent."""

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate like the parent. Rows that are given here are checked like those of the constructor."""
        rows = eval_dataset
        # a string names one of the constructor's sets, which were checked there
        if rows is not None and not isinstance(rows, str) and not self._plain:
            rows = self._prepare_evaluation(rows)
        return super().evaluate(rows, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    def _prepare_evaluation(self, data: Any) -> Any:
        """Check rows, as one data set or several by name; a parent that takes text tokenises them itself."""
        check_evaluation_rows(self, data)
        return data

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate like the parent, with our metrics; every evaluation draws the same random numbers."""
        options = dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        if self._plain:
            return super().evaluation_loop(*options)
        # Within a training run, the training's cached prefix stays valid.
        if not self.is_in_train:
            self.pay_once.start(self, training=False)
        # Drop values that an earlier prediction recorded and that were never logged.
        if (log := self.parent_log()) is not None and not self.model.training:
            log.clear()
        # an evaluation between two micro-batches must not change what they draw
        before, self.micro_step = self.micro_step, 0
        try:
            with self.metrics.evaluation() as values:
                output: Any = super().evaluation_loop(*options)
        finally:
            self.micro_step = before
        output.metrics.update(means(values, metric_key_prefix))
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Predict like the parent; with our loss the batch need not have `labels`."""
        if self._plain:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        # the parent's loss, or outputs that the parent computes from labels
        if self.loss is None or (not prediction_loss_only and (self.takes_pairs or "labels" in inputs)):
            with self._boundary(inputs):
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            # A plain Trainer does not support pairs, so return the outputs that DPOTrainer would.
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss.detach(), outputs.logits, inputs["input_ids"]

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Search like the parent; the objective is the evaluation loss, unless one is given.

        The parent's objective is the sum of the other metrics, margins and accuracies, which are better when higher.
        """
        if compute_objective is None and not self._plain and self.compute_metrics is None:
            compute_objective = evaluation_loss
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)
