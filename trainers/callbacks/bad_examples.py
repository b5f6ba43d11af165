"""Find the examples that caused a bad step, by recomputing it example by example with every block watched.

This costs nothing until a step fails, and then the time of one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ...adapters.blocks import find_blocks
from ...adapters.observing import base_model
from ...adapters.outputs import states_in
from ..prefix.frozen import CachedPrefix
from ..types import SteeringRun

_NAMED = 4  # examples in the message
_LETTERS = 60  # of an example's text
_SEARCHED = 100_000  # rows of a data set that are searched for an example


def first_not_finite(trainer: SteeringRun) -> str:
    """Describe what was not finite first, and in which examples. Never raises: the caller raises an error with it."""
    try:
        bad = [name for name, p in trainer.model.named_parameters() if not torch.isfinite(p).all()]
        weights = f"{bad[0]} itself holds NaN or infinite values. " if bad else ""
        if trainer.accelerator.num_processes > 1:  # a pass on one process alone would wait for the others
            return f"{weights}{_this_process(trainer)}"
        places = list(_bad_places(trainer))
    except Exception as error:
        return f"(The step could not be recomputed to find the cause: {type(error).__name__}: {error})"
    if not places:
        return (
            f"{weights}Recomputed alone, every example of the step is finite. The cause is their sum, or randomness."
        )
    return f"{weights}First in {_listed([f'{place} of {text}' for text, place in places])}."


def largest(trainer: SteeringRun) -> str:
    """Describe the examples of the step with the largest loss, and the parameter with the largest gradient. Never
    raises."""
    norms = [(float(p.grad.norm()), name) for name, p in trainer.model.named_parameters() if p.grad is not None]
    steepest = f"The largest gradient is that of {max(norms)[1]} (norm {max(norms)[0]:.3g})." if norms else ""
    try:
        if trainer.accelerator.num_processes > 1:  # a pass on one process alone would wait for the others
            return f"{_this_process(trainer)} {steepest}"
        with _alone(trainer), torch.no_grad():
            losses = [(float(_loss(trainer, example)), example) for example in _step_examples(trainer)]
    except Exception as error:
        return f"(The step could not be recomputed: {type(error).__name__}: {error}) {steepest}"
    losses.sort(key=lambda pair: -pair[0])
    items = [f"{loss:.4g} of {_text(trainer, example)}" for loss, example in losses]
    return f"Largest loss: {_listed(items)}. {steepest}"


def _this_process(trainer: SteeringRun) -> str:
    texts = [_text(trainer, example) for batch in trainer.step_batches for example in _examples(batch)]
    return f"This process had {_listed(texts)}."


def _listed(items: list[str]) -> str:
    more = f", and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return "; ".join(items[:_NAMED]) + more


def _bad_places(trainer: SteeringRun) -> Iterator[tuple[str, str]]:
    """Every example of the step that is not finite alone: its name, and what is not finite first."""
    base = base_model(trainer.model)
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    with _alone(trainer), torch.enable_grad():
        for example in _step_examples(trainer):
            # the first block whose output is not finite, else the loss, else the last layer's gradient
            with _watched(base, example) as places:
                loss = _loss(trainer, example)
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


def _step_examples(trainer: SteeringRun) -> Iterator[dict[str, Any]]:
    """The examples of the step, one by one, with the random numbers that each one's micro-batch drew."""
    for micro_step, batch in enumerate(trainer.step_batches):
        for example in _examples(batch):
            trainer.micro_step = micro_step
            yield example


def _loss(trainer: SteeringRun, example: dict[str, Any]) -> Tensor:
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(example)))


@contextmanager
def _alone(trainer: SteeringRun) -> Iterator[None]:
    """Context in which the trainer runs whole passes alone: no prefix is cached, and no other trainer takes part."""
    before = trainer.pay_once, trainer.joint_pass, trainer.micro_step
    trainer.pay_once, trainer.joint_pass = CachedPrefix(False), None
    try:
        yield
    finally:
        trainer.pay_once, trainer.joint_pass, trainer.micro_step = before


@contextmanager
def _watched(base: Any, example: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield a list that forward passes fill with the names of outputs that are not finite, in order."""
    mask, places = example.get("attention_mask"), []

    def look(name: str, output: Any) -> None:
        states = states_in(output)  # (rows, tokens, d)
        if not isinstance(states, Tensor):
            return
        good = torch.isfinite(states)
        if isinstance(mask, Tensor) and mask.shape == states.shape[:2]:
            good = good | ~mask.bool().to(good.device)[..., None]  # padding can hold any value
        if not good.all():
            places.append(f"the output of {name}")

    names = {module: name for name, module in base.named_modules()}
    blocks = (block for _, block in find_blocks(base))
    handles = [
        module.register_forward_hook(lambda m, args, output: look(names[m], output))
        for module in (base.get_input_embeddings(), *blocks, base.get_output_embeddings())
        if isinstance(module, nn.Module)
    ]
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()


def _examples(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Split a collated batch into examples (a pair is one); a batch without token rows stays whole."""
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
            else value[i : i + 1]  # one value per pair
            for name, value in batch.items()
        }


def _text(trainer: SteeringRun, example: Mapping[str, Any]) -> str:
    """`row 3 ('How do I ...')`: the example's index in the data set, if it can be found, and its beginning."""
    ids = example.get("input_ids")
    if not isinstance(ids, Tensor):
        return "the batch"
    mask = example.get("attention_mask")
    tokens = ids[0][mask[0].bool()] if isinstance(mask, Tensor) and mask.shape == ids.shape else ids[0]
    place = _place(trainer.train_dataset, tokens.tolist())
    text: Any = tokens[:_LETTERS].tolist()
    if isinstance(trainer.processing_class, PreTrainedTokenizerBase | ProcessorMixin):
        text = trainer.processing_class.decode(text, skip_special_tokens=True)[:_LETTERS]
    return f"{'a row' if place is None else f'row {place}'} ({text!r})"


def _place(dataset: Any, ids: list[int]) -> int | None:
    """Index of the first row that begins with these tokens (for a pair, with those of its chosen answer)."""
    if not isinstance(dataset, Dataset) or len(dataset) > _SEARCHED:
        return None
    names = dataset.column_names
    columns = [c for c in ("prompt_ids", "chosen_ids") if c in names] or [c for c in ("input_ids",) if c in names]
    rows: Any = dataset.select_columns(columns) if columns else []
    for index, row in enumerate(rows):
        tokens = [token for column in columns for token in row[column]]
        if tokens[: len(ids)] == ids:
            return index
    return None
