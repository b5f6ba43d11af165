"""What a bad step came from: it is computed again, example by example, with every block watched.

That costs nothing as long as all goes well, and a step's time where the run is over anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters.blocks import find_blocks
from .prefix.decoder import base_of
from .prefix.frozen import CachedPrefix

if TYPE_CHECKING:
    from ._mixin import SteeringMixin

_NAMED = 4  # examples in the message
_LETTERS = 60  # of an example's text
_SEARCHED = 100_000  # rows of a data set that are looked through for an example


def culprit(trainer: SteeringMixin) -> str:
    """What was not finite first and in which examples of the step, in words. Never raises: an error is on its way."""
    try:
        bad = [name for name, p in trainer.model.named_parameters() if not torch.isfinite(p).all()]
        weights = f"{bad[0]} itself holds NaN or infinite values. " if bad else ""
        if trainer.accelerator.num_processes > 1:  # a pass on one process alone would wait for the others
            texts = [_text(trainer, e) for batch in trainer.step_batches for e in _examples(batch)]
            return f"{weights}This process had {_listed(texts)}."
        found = list(_again(trainer))
    except Exception as error:
        return f"(The step could not be computed again to see where: {type(error).__name__}: {error})"
    if not found:
        return f"{weights}Computed again, every example of the step alone is finite: their sum, or chance, is not."
    return f"{weights}First in {_listed([f'{place} of {text}' for text, place in found])}."


def largest(trainer: SteeringMixin) -> str:
    """Which examples of the step have the largest loss, and which parameter the largest gradient. Never raises."""
    norms = [(float(p.grad.norm()), name) for name, p in trainer.model.named_parameters() if p.grad is not None]
    steepest = f"The largest gradient is that of {max(norms)[1]} (norm {max(norms)[0]:.3g})." if norms else ""
    try:
        if trainer.accelerator.num_processes > 1:  # a pass on one process alone would wait for the others
            texts = [_text(trainer, e) for batch in trainer.step_batches for e in _examples(batch)]
            return f"This process had {_listed(texts)}. {steepest}"
        with _alone(trainer), torch.no_grad():
            losses = sorted(_losses(trainer), key=lambda found: -found[0])
    except Exception as error:
        return f"(The step could not be computed again: {type(error).__name__}: {error}) {steepest}"
    return f"Largest loss: {_listed([f'{loss:.4g} of {text}' for loss, text in losses])}. {steepest}"


def _losses(trainer: SteeringMixin) -> Iterator[tuple[float, str]]:
    """The loss of every example of the step, alone."""
    for micro, batch in enumerate(trainer.step_batches):
        for example in _examples(batch):
            trainer.restart_draws(micro)
            with trainer.compute_loss_context_manager():
                loss: Tensor = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(example)))
            yield float(loss), _text(trainer, example)


def _listed(items: list[str]) -> str:
    more = f", and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return "; ".join(items[:_NAMED]) + more


def _again(trainer: SteeringMixin) -> Iterator[tuple[str, str]]:
    """Every example of the step that is not finite: its name, and what is not."""
    base = base_of(trainer.model)
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    with _alone(trainer), torch.enable_grad():
        for micro, batch in enumerate(trainer.step_batches):
            for example in _examples(batch):
                trainer.restart_draws(micro)
                with _watched(base, example) as places, trainer.compute_loss_context_manager():
                    loss: Tensor = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(example)))
                if not places and torch.isfinite(loss):
                    gradients = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
                    # backward comes to the last layer first
                    places = [
                        f"the gradient of {name}"
                        for (name, _), gradient in zip(trained, gradients, strict=True)
                        if gradient is not None and not torch.isfinite(gradient).all()
                    ][::-1]
                elif not places:
                    places = ["the loss itself"]
                if places:
                    yield _text(trainer, example), places[0]


@contextmanager
def _alone(trainer: SteeringMixin) -> Iterator[None]:
    """Inside, the trainer runs whole passes of its own: nothing memoised, nobody beside it."""
    before = trainer.pay_once, trainer.seat, trainer._micro_step
    trainer.pay_once, trainer.seat = CachedPrefix(False), None
    try:
        yield
    finally:
        trainer.pay_once, trainer.seat, trainer._micro_step = before


@contextmanager
def _watched(base: nn.Module, example: Mapping[str, Any]) -> Iterator[list[str]]:
    """A list that forward passes inside fill with the names of what is not finite, in the order it is computed."""
    mask, seen = example.get("attention_mask"), []

    def look(name: str, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if not isinstance(states, Tensor):
            return
        good = torch.isfinite(states)
        if isinstance(mask, Tensor) and mask.shape == states.shape[:2]:
            good = good | ~mask.bool().to(good.device)[..., None]  # padding may hold anything
        if not good.all():
            seen.append(f"the output of {name}")

    names = {module: name for name, module in base.named_modules()}
    ends = [getattr(base, f"get_{side}_embeddings")() for side in ("input", "output")]
    modules = [ends[0], *(block for _, block in find_blocks(base)), ends[1]]
    handles = [
        module.register_forward_hook(lambda m, args, output: look(names[m], output))
        for module in modules
        if isinstance(module, nn.Module)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _examples(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A collated batch, example by example (a pair is one); whole where it has no rows of tokens."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        yield dict(batch)
        return
    rows = len(ids)
    count = rows // 2 if "completion_mask" in batch else rows
    for i in range(count):
        index = [i, i + count] if count < rows else [i]
        yield {
            name: value
            if not isinstance(value, Tensor) or value.ndim == 0
            else value[index]
            if len(value) == rows
            else value[i : i + 1]
            for name, value in batch.items()
        }


def _text(trainer: SteeringMixin, example: Mapping[str, Any]) -> str:
    """`row 3 ('How do I ...')`: its place in the data set, where that can be found, and how it begins."""
    ids = example.get("input_ids")
    if not isinstance(ids, Tensor):
        return "the batch"
    mask = example.get("attention_mask")
    real = ids[0][mask[0].bool()] if isinstance(mask, Tensor) and mask.shape == ids.shape else ids[0]
    place = _place(trainer.train_dataset, real.tolist())
    tokenizer: Any = trainer.processing_class
    text: Any = real[:_LETTERS].tolist()
    if hasattr(tokenizer, "decode"):
        text = tokenizer.decode(text, skip_special_tokens=True)[:_LETTERS]
    return f"{'a row' if place is None else f'row {place}'} ({text!r})"


def _place(dataset: Any, ids: list[int]) -> int | None:
    """Index of the first row with these tokens (a pair: those of its chosen answer)."""
    names = getattr(dataset, "column_names", None) or []
    columns = [c for c in ("prompt_ids", "chosen_ids") if c in names] or [c for c in ("input_ids",) if c in names]
    if not columns or not hasattr(dataset, "__len__") or len(dataset) > _SEARCHED:
        return None
    for index, row in enumerate(dataset.select_columns(columns)):
        known = [token for column in columns for token in row[column]]
        if known[: len(ids)] == ids:
            return index
    return None
