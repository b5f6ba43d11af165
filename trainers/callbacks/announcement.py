"""Log at the start of training what is trained and how fast, and warn of an unsuitable learning rate."""

from __future__ import annotations

import logging
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ...adapters import SteeringVectorConfig, steering_layers
from ..parallel import full_size
from ..rates import largest_share, mark_deepspeeds_optimizer, rate_of_vectors, trained_vectors, warning_of
from ..types import SteeringRun

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # shown by default, although they are not warnings


class Announcement(TrainerCallback):
    """Logs once, on the main process, what is trained and with which learning rate.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: SteeringRun) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Announce the training. Optimiser and scheduler exist, but no step has been taken."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled and trained_vectors(trainer.model) and not trainer.vectors_have_groups:
            mark_deepspeeds_optimizer(trainer, kwargs["optimizer"])
        if not state.is_world_process_zero:
            return
        model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        say_what_is_trained(model)
        for line in filter(None, (bias.note(trainer) for bias in trainer.inductive_biases)):
            _say(line)
        if not trained_vectors(model):
            return
        rate = rate_of_vectors(trainer, kwargs["optimizer"])
        steps = max(state.max_steps - state.global_step, 0)
        share = largest_share(kwargs["optimizer"], kwargs["lr_scheduler"], steps, rate.value)
        reach = ""
        if share is not None and steps:
            reach = f": {steps} steps can move it by up to {share:.0%} of the residual stream"
        _say(f"Learning rate {rate.value:g} ({rate.reason}){reach}.")
        if share is not None and steps and (problem := warning_of(rate.value, steps, share)):
            logger.warning("Learning rate %g: %s", rate.value, problem)


def say_what_is_trained(model: nn.Module) -> None:
    """Log in one line how many parameters are trained, and of which adapters."""
    _say(_what_is_trained(model))


def _say(line: str) -> None:
    """Log a line, and show it even if logging was not set up, when Python would show only warnings."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    logger.info("%s", line)


def _what_is_trained(model: nn.Module) -> str:
    sizes = {p: full_size(p) for p in model.parameters()}
    trained, total = sum(size for p, size in sizes.items() if p.requires_grad), sum(sizes.values())
    if not isinstance(model, PeftModel):
        return f"Training {trained:,} of {total:,} parameters of {type(model).__name__}: full finetuning, no adapter."
    adapters = []
    for name in model.active_adapters:
        config = model.peft_config[name]
        if isinstance(config, SteeringVectorConfig):
            layers = [layer.layer_index for layer in steering_layers(model, name)]
            where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
            adapters.append(f"steering vector {name!r} at {where}")
        else:
            adapters.append(f"{getattr(config.peft_type, 'value', config.peft_type)} {name!r}")
    return f"Training {trained:,} of {total:,} parameters: {', '.join(adapters)}."
