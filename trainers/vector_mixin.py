"""The mixin of every trainer of vectors, with any loss: learning rates in units of the stream, logs, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from ..adapters.card import Card
from .callbacks.base import SteeringCallback
from .card import write_trainer_card
from .checkpoints import check_saved
from .inductive_biases import Bias
from .rates import check_optimizer, group_vectors, trained_vectors, vector_rate


class VectorMixin(Trainer):
    """A Trainer whose optimizer has groups for vectors, and whose adapters are saved with a card and a check."""

    model: Any  # the parent's type allows None, which it is not after construction
    card: Card = Card()
    """What the model card says about behaviour, problem, data and measurements. Set it before the adapter is saved or
    pushed; the card says which parts are missing."""
    inductive_biases: list[Bias]
    vector_learning_rate: float | None
    vectors_have_groups: bool = False  # in the optimizer
    _plain: bool = False  # whether this trainer does exactly what its parent does

    @property
    def _run(self) -> Any:
        """This trainer, for functions that read the part of a `SteeringRun` that it has."""
        return self

    def steering_callbacks(self) -> list[SteeringCallback]:
        """The callbacks that have our additional events."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, SteeringCallback)]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make an optimizer like the parent, with the learning rate of vectors."""
        given = self.optimizer is not None
        if not self._plain and (vectors := trained_vectors(self.model)):
            check_optimizer(self.args, vectors, given, self.vector_learning_rate)
        optimizer = super().create_optimizer(*args, **kwargs)
        # an optimizer that the user passed keeps its groups
        if not self._plain and not given and trained_vectors(self.model):
            group_vectors(optimizer, self.model, vector_rate(self.args, self.vector_learning_rate).value)
            self.vectors_have_groups = True
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log like the parent; in training, with the additional values of the callbacks."""
        if "loss" in logs and not self._plain:
            for callback in self.steering_callbacks():
                logs |= callback.extra_logs()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save like the parent, with a model card, and check that the file holds every vector in full size.

        Raises:
            IncompleteAdapterError: weights are missing from the file, or cut.
        """
        super().save_model(output_dir, _internal_call)
        if not self._plain and self.args.should_save:
            saved: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            folder = Path(output_dir or str(self.args.output_dir))
            check_saved(saved, folder)
            if not _internal_call:
                write_trainer_card(self._run, folder)

    def save_last_good(self) -> str:
        """Save the model as it was before a bad step, and return the folder."""
        folder = str(Path(str(self.args.output_dir)) / "last-good")
        self.save_model(folder)
        return folder

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a model card like the parent, for `push_to_hub`, with its metadata and the text of `card`."""
        super().create_model_card(*args, **kwargs)
        if not self._plain and self.is_world_process_zero():
            write_trainer_card(self._run, str(self.args.output_dir), overwrite=True)
