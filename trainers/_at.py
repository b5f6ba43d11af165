"""`at(strength)` for a real model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters import SteeringVectorLayer, prompt_length, set_strength, steering_layers
from ..adapters.blocks import find_stack
from ..losses import Outputs, Strength
from ._batch import Batch
from ._modes import evaluating
from .prefix.reference import ReferenceMemo

REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of an adapter that training continues


class ModelAt:
    """A batch seen by a model at any strength of its adapter; one forward per strength.

    `at(1)` is the model as it is. `at(0)` is the reference, without gradients and without dropout: the base model, or
    the frozen copy `ref` when training continues an existing adapter. Other strengths scale the adapter, and "null"
    takes the direction of a steering vector out.

    Args:
        model: The model to call (possibly wrapped for distributed training).
        unwrapped: The model inside the wrapper.
        batch: The batch.
        reference_model: A separate reference, for full finetuning.
        reference_memo: What is known of the reference already; it is asked first.
        together: Computes the outputs of a batch at a strength other than 0, in place of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        batch: Batch,
        reference_model: nn.Module | None = None,
        reference_memo: ReferenceMemo | None = None,
        together: Callable[[Batch, Strength], Outputs] | None = None,
    ) -> None:
        self.together = together
        self.model = model
        self.unwrapped = unwrapped
        self.batch = batch
        self.reference_model = reference_model
        self.reference_memo = reference_memo
        self._seen: dict[Strength, Outputs] = {}

    def __call__(self, strength: Strength) -> Outputs:
        """Token log-probabilities of the batch at `strength`."""
        strength = strength if strength == "null" else float(strength)
        if strength not in self._seen:
            if strength == 0.0:
                self._seen[strength] = self._reference()
            elif self.together is not None:
                self._seen[strength] = self.together(self.batch, strength)
            else:
                with scaled(self.unwrapped, strength):
                    self._seen[strength] = token_logps(self.model, self.unwrapped, self.batch)
        return self._seen[strength]

    @property
    def seen(self) -> dict[Strength, Outputs]:
        """The strengths asked for so far."""
        return dict(self._seen)

    def _reference(self) -> Outputs:
        if self.batch.reference_logps is not None:
            # known per row only; spread over its tokens, which leaves sums and means per row what they are
            mask = self.batch.targets[0] != -100
            per_token = self.batch.reference_logps / mask.sum(dim=1).clamp_min(1)
            return Outputs(mask * per_token[:, None], mask)
        if self.reference_memo is not None:
            return self.reference_memo.outputs(self.batch, self._compute_reference)
        return self._compute_reference(self.batch)

    @torch.no_grad()
    def _compute_reference(self, batch: Batch) -> Outputs:
        if self.reference_model is not None:
            with evaluating(self.reference_model):
                return token_logps(self.reference_model, self.reference_model, batch)
        if not isinstance(self.unwrapped, PeftModel):
            raise ValueError(
                "This loss compares with the base model, and full finetuning changes it. Train an adapter, use "
                "SteeringDPOTrainer (it keeps a reference copy), or choose a loss without a reference."
            )
        # with a memo, processes run different numbers of rows: nothing that waits for the others may be called
        model = self.model if self.reference_memo is None else self.unwrapped
        with reference_adapter(self.unwrapped), evaluating(self.unwrapped):
            return token_logps(model, self.unwrapped, batch)


def reference_adapter(model: PeftModel) -> AbstractContextManager[Any]:
    """The model as training found it: the copy `ref` if there is one, else no adapter."""
    from trl.trainer.utils import use_adapter

    return use_adapter(model, REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None)


def scaled(model: nn.Module, strength: Strength) -> AbstractContextManager[Any]:
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
        if strength == "null":
            raise ValueError("strength='null' takes out the direction of a steering vector; a LoRA has none.")
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
    """Log-probabilities of a batch's labels."""
    labels = batch.targets[0]
    mask = labels != -100
    found = -F.cross_entropy(labelled_logits(model, unwrapped, batch), labels[mask], reduction="none")
    return Outputs(found.new_zeros(mask.shape).masked_scatter(mask, found), mask)


def labelled_logits(model: nn.Module, unwrapped: nn.Module, batch: Batch) -> Tensor:
    """What the model predicts where a label stands next, `(labels, vocabulary)` in fp32, row after row. The head runs
    on nothing else."""
    labels, columns = batch.targets
    mask = labels != -100
    base = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
    kwargs: dict[str, Any] = {"use_cache": False}
    if "output_router_logits" in inspect.signature(type(base).forward).parameters:
        kwargs["output_router_logits"] = False  # TRL asks the config for them, for a loss that is not used here
    with prompt_of(unwrapped, batch), _only(base, mask, columns) as packed:
        logits = model(**batch.inputs, **kwargs).logits
    return (logits[0] if packed else logits[:, columns][mask]).float()


@contextmanager
def _only(base: nn.Module, mask: Tensor, columns: Tensor) -> Iterator[bool]:
    """Of the last hidden states, the head sees only those of `columns` where `mask` holds, as one row; False if the
    module that gives them is unknown."""
    try:
        stack = find_stack(base)
    except ValueError:
        yield False
        return

    def pack(module: nn.Module, args: Any, output: Any) -> Any:
        packed = output[0][:, columns][mask][None]
        if isinstance(output, tuple):
            return packed, *output[1:]
        output.last_hidden_state = packed
        return output

    handle = stack.register_forward_hook(pack)
    try:
        yield True
    finally:
        handle.remove()


def prompt_of(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """Say where each row's completion starts (its first label; the row's length if it has none) to `positions`."""
    labelled = batch.labels != -100
    start = torch.where(labelled.any(dim=1), labelled.int().argmax(dim=1), batch.labels.shape[1])
    return prompt_length(model, start)
