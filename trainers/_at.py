"""`at(strength)` for a real model."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters import SteeringVectorLayer, prompt_length, set_strength, steering_layers
from ..losses import Outputs
from ._batch import Batch

REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of an adapter that training continues


class ModelAt:
    """A batch seen by a model at any strength of its adapter; one forward per strength.

    `at(1)` is the model as it is. `at(0)` is the reference, without gradients and without dropout: the base model, or
    the frozen copy `ref` when training continues an existing adapter. Other strengths scale the adapter.

    Args:
        model: The model to call (possibly wrapped for distributed training).
        unwrapped: The model inside the wrapper.
        batch: The batch.
        reference_model: A separate reference, for full finetuning.
    """

    def __init__(self, model: nn.Module, unwrapped: nn.Module, batch: Batch, reference_model: nn.Module | None = None):
        self.model = model
        self.unwrapped = unwrapped
        self.batch = batch
        self.reference_model = reference_model
        self._seen: dict[float, Outputs] = {}

    def __call__(self, strength: float) -> Outputs:
        """Token log-probabilities of the batch at `strength`."""
        strength = float(strength)
        if strength not in self._seen:
            if strength == 0.0:
                self._seen[strength] = self._reference()
            else:
                with scaled(self.unwrapped, strength):
                    self._seen[strength] = token_logps(self.model, self.unwrapped, self.batch)
        return self._seen[strength]

    @property
    def seen(self) -> dict[float, Outputs]:
        """The strengths asked for so far."""
        return dict(self._seen)

    def _reference(self) -> Outputs:
        if self.batch.reference_logps is not None:
            # known per row only; spread over its tokens, which leaves sums and means per row what they are
            mask = _targets(self.batch)[0] != -100
            per_token = self.batch.reference_logps / mask.sum(dim=1).clamp_min(1)
            return Outputs(mask * per_token[:, None], mask)
        if self.reference_model is not None:
            with torch.no_grad(), _eval_mode(self.reference_model):
                return token_logps(self.reference_model, self.reference_model, self.batch)
        if not isinstance(self.unwrapped, PeftModel):
            raise ValueError(
                "This loss compares with the base model, and full finetuning changes it. Train an adapter, use "
                "SteeringDPOTrainer (it keeps a reference copy), or choose a loss without a reference."
            )
        with torch.no_grad(), reference_adapter(self.unwrapped), _eval_mode(self.unwrapped):
            return token_logps(self.model, self.unwrapped, self.batch)


def reference_adapter(model: PeftModel) -> AbstractContextManager[Any]:
    """The model as training found it: the copy `ref` if there is one, else no adapter."""
    from trl.trainer.utils import use_adapter

    return use_adapter(model, REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None)


def scaled(model: nn.Module, strength: float) -> AbstractContextManager[Any]:
    """Context in which the active adapters count `strength` times.

    Raises:
        ValueError: an adapter that cannot be scaled, or gradient checkpointing around it (the backward pass would
            recompute the forward at another strength).
    """
    if strength == 1.0:
        return nullcontext()
    if not scalable(model):
        raise ValueError(
            f"strength={strength} needs a steering vector or a LoRA to scale; other adapters have no scale."
        )
    if _recomputed(model):
        raise ValueError(
            f"strength={strength} with gradient checkpointing: the backward pass would recompute the layer at another "
            "strength. Set gradient_checkpointing=False (or, from transformers 5.23, steer site='block')."
        )
    stack = ExitStack()
    if steering_layers(model):
        stack.enter_context(set_strength(model, strength))
    if any(isinstance(layer, LoraLayer) for layer in model.modules()):
        stack.enter_context(rescale_adapter_scale(model, strength))
    return stack


def scalable(model: nn.Module) -> bool:
    """Whether the model's adapters have a strength: steering vectors and LoRA do."""
    return any(isinstance(layer, SteeringVectorLayer | LoraLayer) for layer in model.modules())


def _recomputed(model: nn.Module) -> bool:
    """Whether the backward pass runs an adapter again.

    Checkpointing covers what is inside a block; before transformers 5.23, which checkpoints `forward` and not
    `__call__`, the hooks of the block as well.
    """
    hooks_too = "__call__" in vars(GradientCheckpointingLayer)
    checkpointing = any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )
    configs = [config for layer in steering_layers(model) for config in layer.config.values()]
    inside = any(hooks_too or config.site != "block" for config in configs)
    return checkpointing and (inside or any(isinstance(module, LoraLayer) for module in model.modules()))


def token_logps(model: nn.Module, unwrapped: nn.Module, batch: Batch) -> Outputs:
    """Log-probabilities of a batch's labels. The head runs only on columns in which some row has one."""
    labels, columns = _targets(batch)
    kwargs: dict[str, Any] = {"use_cache": False}
    base = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
    keeps = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    if keeps:
        kwargs["logits_to_keep"] = columns
    with prompt_of(unwrapped, batch):
        logits = model(**batch.inputs, **kwargs).logits
    logits = (logits if keeps else logits[:, columns]).float()
    logps = -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return Outputs(logps, labels != -100)


def _targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Labels on the columns that predict one in some row, `(rows, columns)`, and those columns."""
    labels = batch.labels[:, 1:]
    columns = (labels != -100).any(dim=0).nonzero().squeeze(1)
    return labels[:, columns], columns


def prompt_of(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """Say where each row's completion starts (its first label; the row's length if it has none) to `positions`."""
    labelled = batch.labels != -100
    start = torch.where(labelled.any(dim=1), labelled.int().argmax(dim=1), batch.labels.shape[1])
    return prompt_length(model, start)


class _eval_mode:
    """Evaluation mode for a while, each module put back as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.training = [module for module in model.modules() if module.training]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False

    def __exit__(self, *error: Any) -> None:
        for module in self.training:
            module.training = True
