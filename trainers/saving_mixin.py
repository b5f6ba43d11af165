"""How a trainer saves: like its parent, with a model card, and with a check of what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.card import Card
from .card import write_trainer_card
from .checkpoints import check_saved
from .loss_mixin import LossMixin


class SavingMixin(LossMixin):
    """Adapters and model cards of a trainer."""

    card: Card = Card()
    """What the model card says of behaviour, problem, data and measurements. Set it before the adapter is saved or
    pushed; the card says which parts were left open."""

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
                write_trainer_card(self, folder)

    def save_last_good(self) -> str:
        """Save the model as it was before a bad step, and return the folder."""
        folder = str(Path(str(self.args.output_dir)) / "last-good")
        self.save_model(folder)
        return folder

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a model card like the parent, for `push_to_hub`, with its metadata and the text of `card`."""
        super().create_model_card(*args, **kwargs)
        if not self._plain and self.is_world_process_zero():
            write_trainer_card(self, str(self.args.output_dir), overwrite=True)
