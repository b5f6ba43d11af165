"""Compute losses: collect the batches of a step, read each once, and run the model at the strengths of the loss."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.observing import untouched
from ..losses import Loss, Staged
from .batch import Batch, Inputs
from .callbacks.base import LossValues
from .callbacks.checkpoints import Checkpoints
from .callbacks.metrics import Metrics
from .data import DataError
from .model_at import ModelAt, prompt_of, scaled
from .parents import ParentsMetrics, parents_mean
from .prefix.frozen import CachedPrefix
from .reference import reference_model
from .types import JointPass
from .vector_mixin import VectorMixin
from .views import Views


class LossMixin(VectorMixin):
    """A Trainer with a loss of ours, or with its own if `loss` is None."""

    loss: Loss | None
    parents_loss: Loss | None = None  # the loss of ours that equals the parent's own
    parents_metrics: ParentsMetrics
    takes_pairs: bool | None = None  # whether the parent's data are preference pairs; None: either
    views: Views | None = None
    reference: nn.Module | None = None  # a copy made before full finetuning, if the parent has none
    pay_once: CachedPrefix
    _unwrapped: tuple[nn.Module, Any] | None = None  # a model, and what is inside its wrappers
    joint_pass: JointPass | None = None  # while `train_together` trains several trainers
    micro_step: int  # number of the next micro-batch within its optimiser step
    step_batches: list[Inputs]  # of the optimiser step that runs
    max_length: int | None = None  # where rows are cut, if the arguments have no `max_length`
    columns: tuple[str, ...] | None = None  # format of the training data; None: the user's own collator reads them
    metrics: Metrics
    checkpoints: Checkpoints
    trust_checkpoint: bool = False
    """Whether `train` may resume from a checkpoint whose pickles name code (DeepSpeed's, FSDP's; see trust.md)."""

    @property
    def loss_at_work(self) -> Loss | None:
        """The loss of this step (after training, the last), or the one of ours that equals the parent's own."""
        if not isinstance(self.loss, Staged):
            return self.parents_loss if self.loss is None else self.loss
        return self.loss.stage(self.state.global_step, self.state.max_steps) if self.is_in_train else self.loss.then

    def parent_log(self) -> dict[str, list[float]] | None:
        """The values that the parent has recorded since its last log; None if it records none besides the loss.

        They belong to training or evaluation, according to the model's mode.
        """
        return None

    # -- batches --------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Collect the step's batches like the parent, and count what our loss is averaged over in the whole step."""
        self.micro_step = 0
        if self._plain:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        # A run that resumes at its end is finished; the parent would take one more step.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples and self.state.global_step == 0:
            raise DataError("The stream has no row to train on: it is empty, or all its rows were dropped.")
        # Each batch is unpacked only here, for the loss, the callbacks and the checks.
        self.step_batches = [self._prepare_inputs(inputs) for inputs in samples]
        loss = self.loss_at_work
        # The units of the whole step, over all processes. For its own loss, the parent has already counted them.
        if self.loss is not None and loss is not None and samples:
            count: Any = sum(self._batch_for(loss, inputs).count(loss.needs.unit) for inputs in self.step_batches)
            gathered: Any = self.accelerator.gather(torch.as_tensor(count, device=device))
            items = gathered.sum()
        return self.step_batches, items

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Send a batch to the device like the parent, and unpack it, unless that was done before."""
        if isinstance(inputs, Inputs):
            return inputs
        inputs = super()._prepare_inputs(inputs)
        return inputs if self._plain else Inputs.of(inputs)

    def _batch_for(self, loss: Loss, inputs: Inputs) -> Batch:
        """The part of a batch that a loss reads: a loss on single answers reads the chosen ones of pairs."""
        batch = inputs.batch
        if loss.needs.pairs and not batch.pairs:
            raise DataError(
                f"{type(loss).__name__} compares chosen with rejected answers, but the batch has no pairs."
            )
        return batch if loss.needs.pairs or not batch.pairs else batch.chosen

    def _boundary(self, inputs: Inputs) -> AbstractContextManager[None]:
        """Context in which `positions` know where prompts end, for forward passes of the parent."""
        return prompt_of(self.model, inputs.batch) if inputs.labelled else nullcontext()

    # -- loss -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the parent's loss, or ours: its values summed, over the step's number of pairs, rows or tokens."""
        if self._plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, inputs = self.loss_at_work, Inputs.of(inputs)
        # the parent's own loss, where it is not exactly one of ours or its outputs are read
        if loss is None or (self.loss is None and (return_outputs or not inputs.has_units_of(loss.needs.pairs))):
            # outputs that are read must be the parent's on padding too, where skipped states are zero
            passes = self.pay_once.whole() if return_outputs else self.pay_once.on()
            with untouched(self.model), self._boundary(inputs), passes:
                return super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        unwrapped = self._inside(model)
        mean = self._our_loss(loss, model, unwrapped, self._batch_for(loss, inputs), num_items_in_batch)
        if not return_outputs:
            return mean
        # of all rows, like the parent's outputs, even if the loss reads the chosen ones only
        with torch.no_grad(), prompt_of(unwrapped, inputs.batch), self.pay_once.whole():
            return mean, model(**inputs.batch.inputs)

    def _inside(self, model: nn.Module) -> Any:
        """The model inside its wrappers, cached because accelerate looks up installed packages to unwrap it."""
        if self._unwrapped is None or self._unwrapped[0] is not model:
            self._unwrapped = model, self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return self._unwrapped[1]

    def _our_loss(
        self, loss: Loss, model: nn.Module, unwrapped: nn.Module, batch: Batch, items: Tensor | int | None
    ) -> Tensor:
        """The mean of a loss of ours over `items` (all processes' units in the step; None: the batch's own)."""
        # refuse at the first step a strength that the loss draws only at some steps
        for strength in loss.needs.strengths[-1:]:
            with scaled(unwrapped, strength):
                pass
        joint = self.joint_pass.logps if self.joint_pass is not None and torch.is_grad_enabled() else None
        # where we compute the parent's own loss, we also log the parent's numbers
        log = None if self.loss is not None else self.parent_log()
        look = None if log is None else self.parents_metrics.look
        reference = self.reference or reference_model(self)
        at = ModelAt(model, unwrapped, batch, reference, self.pay_once.reference, joint, self.views, look)
        # Blocks that are skipped, or that run only parts of rows, do not return all hidden states.
        with self.pay_once.whole() if loss.needs.states else self.pay_once.on(labels_only=True):
            values = loss(at, self._generator())  # one per example or labelled token
        if self.loss is None:
            if log is not None:
                self.parents_metrics.note(log, at, batch, self.model.training)
            return parents_mean(values, loss, batch, items, self)
        for callback in self.steering_callbacks():
            callback.on_loss_values(LossValues(loss, values, at, batch, self.model.training))
        if items is None:
            items, processes = batch.count(loss.needs.unit), 1
        else:  # counted over all processes, whose gradients are then averaged
            processes = self.accelerator.num_processes
        # A step without a unit (all its labels were truncated) has a loss of 0, as with the parents.
        return values.sum() / torch.as_tensor(items).clamp(min=1) * processes

    def _generator(self) -> torch.Generator:
        """Random numbers of the next micro-batch: the same on every process, after a resume, in every evaluation."""
        step = self.state.global_step if self.model.training else "eval"
        key = f"{self.args.seed}/{step}/{self.micro_step}".encode()
        self.micro_step += 1
        return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))
