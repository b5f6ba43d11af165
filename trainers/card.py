"""Write the model card of a trained adapter, from what the trainer knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sized
from pathlib import Path
from typing import Any

from ..adapters.card import Card, write_card
from .checkpoints import adapter_folder
from .rates import describe_rates
from .types import SteeringRun


def write_trainer_card(trainer: SteeringRun, folder: str | Path, overwrite: bool = False) -> None:
    """Fill in `trainer.card` and write it next to a saved adapter; do nothing if there is no adapter.

    Args:
        trainer: The trainer.
        folder: Where its adapter was saved.
        overwrite: Whether to replace a README that a user may have written.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    home = adapter_folder(model, Path(folder))
    if not (home / "adapter_config.json").is_file():
        return
    card = trainer.card
    texts = {"data": _data(trainer), "made": _made(trainer)}
    blanks = {name: text for name, text in texts.items() if getattr(card, name) is None}
    if card.title == Card.title:
        blanks["title"] = home.resolve().name
    write_card(home, dataclasses.replace(card, **blanks), overwrite)


def _data(trainer: SteeringRun) -> str | None:
    rows = trainer.train_dataset
    if not isinstance(rows, Sized):
        return None
    kind = "preference pairs" if trainer.takes_pairs else "examples"
    return f"{len(rows)} {kind}, whose source the trainer does not know."


def _made(trainer: SteeringRun) -> str:
    args = trainer.args
    loss = "the trainer's own loss" if trainer.loss is None else f"the loss {trainer.loss}"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    return (
        f"`{type(trainer).__name__}` with {loss}: {trainer.state.global_step} steps of {batch} examples, "
        f"{describe_rates(trainer)}, seed {args.seed}."
    )
