"""The model card of what a trainer trained, from what the trainer knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.card import Card, write_card
from ._saved import adapter_folder

if TYPE_CHECKING:
    from ._mixin import SteeringMixin


def write_trainer_card(trainer: SteeringMixin, folder: str | Path, anyway: bool = False) -> None:
    """Write `trainer.card` beside an adapter, its open places filled in; nothing where no adapter was saved.

    Args:
        trainer: The trainer.
        folder: Where its adapter was saved.
        anyway: Whether a README is replaced that may say what somebody wrote.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    home = adapter_folder(model, Path(folder))
    if not (home / "adapter_config.json").is_file():
        return
    card = trainer.card
    known = {"data": _data(trainer), "made": _made(trainer)}
    blank = {name: text for name, text in known.items() if getattr(card, name) is None}
    if card.title == Card.title:
        blank["title"] = home.resolve().name
    write_card(home, dataclasses.replace(card, **blank), anyway)


def _data(trainer: SteeringMixin) -> str | None:
    rows = trainer.train_dataset
    if rows is None or not hasattr(rows, "__len__"):
        return None
    kind = "preference pairs" if trainer.takes_pairs else "examples"
    return f"{len(rows)} {kind}. Which ones, the trainer was not told."  # pyright: ignore[reportArgumentType]


def _made(trainer: SteeringMixin) -> str:
    args = trainer.args
    loss = "the trainer's own loss" if trainer.loss is None else f"the loss {trainer.loss}"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    return (
        f"`{type(trainer).__name__}` with {loss}: {trainer.state.global_step} steps of {batch} examples, learning "
        f"rate {args.learning_rate:g}, seed {args.seed}."
    )
