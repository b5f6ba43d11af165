"""Protocols of a trainer, as the parts of this package use it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from ..adapters.card import Card
from ..losses import Loss, Outputs, Strength
from .batch import Batch, Inputs
from .views import Views


class JointPass(Protocol):
    """One trainer's access to the passes that `train_together` runs for several trainers at once."""

    def logps(self, batch: Batch, strength: Strength) -> Outputs:
        """The trainer's outputs on its own batch, from the pass that all trainers share."""
        ...

    def backward(self) -> None:
        """Wait for the shared backward pass; afterwards the trainer's vectors have their gradients."""
        ...


class SteeringRun(Protocol):
    """A trainer of this package, as callbacks, checks and losses see it."""

    # from `transformers.Trainer`, which types some of them more loosely than they are after construction
    model: Any
    args: Any
    state: Any
    accelerator: Any
    train_dataset: Any
    data_collator: Any
    processing_class: Any
    optimizer: Any
    compute_loss_func: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool

    # from `SteeringMixin`, which documents them
    loss: Loss | None
    vector_learning_rate: float | None
    vectors_have_groups: bool
    takes_pairs: bool | None
    trust_checkpoint: bool
    card: Card
    views: Views | None
    inductive_biases: list[Any]
    pay_once: Any
    reference: nn.Module | None
    parents_metrics: Any
    joint_pass: JointPass | None
    micro_step: int
    step_batches: list[Inputs]

    def parent_log(self) -> dict[str, list[float]] | None:
        """The values that the parent has recorded since its last log; None if it records none besides the loss."""
        ...

    def compute_loss(self, model: nn.Module, inputs: Any) -> Any:
        """The loss of a batch."""
        ...

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Context with the precision of the loss."""
        ...

    def add_callback(self, callback: Any) -> None:
        """Add a callback."""
        ...

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback."""
        ...

    def save_last_good(self) -> str:
        """Save the model as it was before a bad step, and return the folder."""
        ...

    def _prepare_inputs(self, inputs: Any) -> Inputs: ...  # the parent's name
