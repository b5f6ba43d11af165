"""`at(strength)` for a real model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters import SteeringVectorLayer, prompt_length, set_strength, steering_layers
from ..adapters.blocks import find_blocks, find_stack, resolve_layers, site_name
from ..adapters.config import Layers, Site
from ..adapters.observing import evaluating, untouched
from ..adapters.positions import prompts_by_labels
from ..losses import Outputs, Strength
from ._batch import Batch
from ._host import both, on_host
from .prefix.cached_states import CachedReference
from .prefix.decoder import base_of
from .views import ViewError, Views

REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of an adapter that training continues


class Asked(NamedTuple):
    """What is asked for beside log-probabilities: hidden states of layers, and whether the whole distribution."""

    layers: tuple[int, ...] = ()
    distribution: bool = False
    site: Site = "block"


NOTHING = Asked()


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
        views: Other versions of the batch.
        look: Is shown the logits of the batch's labels at strength 1, and the labels.
    """

    def __init__(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        batch: Batch,
        reference_model: nn.Module | None = None,
        reference_memo: CachedReference | None = None,
        together: Callable[[Batch, Strength], Outputs] | None = None,
        views: Views | None = None,
        look: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self.together, self.views, self.look = together, views, look
        self.model = model
        self.unwrapped = unwrapped
        self.batch = batch
        self.reference_model = reference_model
        self.reference_memo = reference_memo
        self._seen: dict[tuple[Strength, str, Asked], Outputs] = {}

    def __call__(
        self,
        strength: Strength,
        view: str = "",
        layers: Layers = (),
        distribution: bool = False,
        site: Site = "block",
    ) -> Outputs:
        """What the model says of the batch, or of a view of it, at `strength`.

        Args:
            strength: See the class.
            view: Name of a view; "": the batch itself.
            layers: Whose hidden states are asked for, as in `SteeringVectorConfig`.
            distribution: Whether the whole distribution over the vocabulary is.
            site: Of those layers, the residual stream, or what attention or MLP write into it.

        Raises:
            ViewError: there is no such view.
            ValueError: the model has no such layer or site.
        """
        strength = strength if strength == "null" else float(strength)
        found = [] if layers == () else resolve_layers(layers, len(find_blocks(base_of(self.unwrapped))))
        key = (strength, view, Asked(tuple(found), distribution, site if found else "block"))
        if key not in self._seen:
            self._seen[key] = self._outputs(*key)
        return self._seen[key]

    @property
    def seen(self) -> dict[Strength, Outputs]:
        """The strengths that the batch itself was seen at so far."""
        return {strength: outputs for (strength, view, _), outputs in self._seen.items() if not view}

    def _outputs(self, strength: Strength, view: str, asked: Asked) -> Outputs:
        batch = self.batch
        if view:
            if self.views is None:
                raise ViewError(f"The loss asks for view {view!r}, and there is none: give the trainer views=.")
            batch = self.views.of(view, batch)
            if (teacher := self.views.views[view].teacher) is not None:
                if strength != 0.0:
                    raise ViewError(f"View {view!r} is seen by another model, which has no strength: at(0.0, view=).")
                return _remembered(self.views.memos.get(view), batch, partial(_frozen, teacher, asked=asked), asked)
        if strength == 0.0:
            return self._reference(batch, asked)
        if self.together is not None:
            return self.together(batch, strength)
        with scaled(self.unwrapped, strength):
            return token_logps(self.model, self.unwrapped, batch, asked, None if view else self.look)

    def _reference(self, batch: Batch, asked: Asked) -> Outputs:
        if batch.reference_logps is not None and asked == NOTHING:
            # known per row only; spread over its tokens, which leaves sums and means per row what they are
            mask = batch.targets != -100
            per_token = batch.reference_logps / mask.sum(dim=1).clamp_min(1)
            return Outputs(mask * per_token[:, None], mask)
        return _remembered(self.reference_memo, batch, partial(self._compute_reference, asked=asked), asked)

    @torch.no_grad()
    def _compute_reference(self, batch: Batch, asked: Asked) -> Outputs:
        if self.reference_model is not None:
            return _frozen(self.reference_model, batch, asked)
        if not isinstance(self.unwrapped, PeftModel):
            raise ValueError(
                "This loss compares with the base model, which full finetuning changes: give a reference_model."
            )
        # with a memo, processes run different numbers of rows: nothing that waits for the others may be called
        model = self.model if self.reference_memo is None else self.unwrapped
        with reference_adapter(self.unwrapped), evaluating(self.unwrapped):
            return token_logps(model, self.unwrapped, batch, asked)


@torch.no_grad()
def _frozen(model: nn.Module, batch: Batch, asked: Asked) -> Outputs:
    """What a model that is not trained says of a batch."""
    with evaluating(model):
        return token_logps(model, model, batch, asked)


def _remembered(
    memo: CachedReference | None, batch: Batch, compute: Callable[[Batch], Outputs], asked: Asked
) -> Outputs:
    """Outputs from a memo where there is one; whole distributions are too large to keep."""
    if memo is None or asked.distribution:
        return compute(batch)
    return memo.outputs(batch, compute, asked.layers, asked.site)


@contextmanager
def reference_adapter(model: PeftModel) -> Iterator[None]:
    """The model as training found it: the copy `ref` if there is one, else no adapter."""
    from trl.trainer.utils import use_adapter

    with untouched(model), use_adapter(model, REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None):
        yield


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
    if strength == "null" and any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "strength='null' under ZeRO-3: it expects the order of modules that it saw before, and this pass has "
            "another. Use ZeRO-2, FSDP2 or DDP, or a loss without it."
        )
    lora = any(isinstance(layer, LoraLayer) for layer in model.modules())
    if lora and strength == "null":
        raise ValueError(
            "strength='null' takes out the direction of a steering vector; a LoRA has none. (RePS can do without: "
            "suppress='negative'.)"
        )
    stack = ExitStack()
    if steering_layers(model):
        stack.enter_context(set_strength(model, strength))
    if lora and strength != "null":
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


def token_logps(
    model: nn.Module,
    unwrapped: nn.Module,
    batch: Batch,
    asked: Asked = NOTHING,
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> Outputs:
    """Log-probabilities of a batch's labels, and what else is asked for; `look` is shown their logits, and them."""
    with _states(unwrapped, batch, asked) as hidden:
        logits = labelled_logits(model, unwrapped, batch)
    if look is not None:
        look(logits, batch.answers)
    found = -F.cross_entropy(logits, batch.answers, reduction="none")
    outputs = Outputs(batch.spread(found), batch.targets != -100)
    if asked == NOTHING:
        return outputs
    return replace(outputs, hidden=hidden, distribution=logits.log_softmax(-1) if asked.distribution else None)


@contextmanager
def _states(model: nn.Module, batch: Batch, asked: Asked) -> Iterator[dict[int, Tensor]]:
    """A dictionary that the forward pass inside fills with what blocks hand on, or their attention or MLP give, where
    labels are predicted."""
    found: dict[int, Tensor] = {}
    if not asked.layers:
        yield found
        return
    base = base_of(model)
    blocks = find_blocks(base)
    modules = {layer: base.get_submodule(site_name(*blocks[layer], asked.site)) for layer in asked.layers}

    def keep(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[layer] = batch.labelled(hidden).float()

    handles = [module.register_forward_hook(partial(keep, layer)) for layer, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def labelled_logits(model: nn.Module, unwrapped: nn.Module, batch: Batch) -> Tensor:
    """What the model predicts where a label stands next, `(labels, vocabulary)` in fp32, row after row. The head runs
    on nothing else."""
    base = base_of(unwrapped)
    kwargs: dict[str, Any] = {"use_cache": False}
    if "output_router_logits" in inspect.signature(type(base).forward).parameters:
        kwargs["output_router_logits"] = False  # TRL asks the config for them, for a loss that is not used here
    with prompt_of(unwrapped, batch), _only(base, batch) as packed:
        logits = model(**batch.inputs, **kwargs).logits
    # not logits[0], whose backward fills zeros of their size and copies into them
    return (logits.flatten(0, 1) if packed else batch.labelled(logits)).float()


@contextmanager
def _only(base: nn.Module, batch: Batch) -> Iterator[bool]:
    """Of the last hidden states, the head sees only those that predict a label, as one row; False if the module that
    gives them is unknown."""
    try:
        stack = find_stack(base)
    except ValueError:
        yield False
        return

    def pack(module: nn.Module, args: Any, output: Any) -> Any:
        packed = batch.labelled(output[0])[None]
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
    """Say where each row's completion starts (its first label; the row's length if it has none) to `positions`; of
    rows with several answers, where each of them does."""
    labelled = on_host(batch.labels) != -100
    if bool(((labelled[:, 1:] & ~labelled[:, :-1]).sum(dim=1) + labelled[:, 0] > 1).any()):
        return prompts_by_labels(model, batch.labels)

    def start(labels: Tensor) -> Tensor:
        labelled = labels != -100
        return torch.where(labelled.any(dim=1), labelled.int().argmax(dim=1), labels.shape[1])

    return prompt_length(model, both(start, batch.labels))
