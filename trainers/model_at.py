"""`at(strength)` for a real model.

Shapes: B rows, T tokens, L labelled tokens of the batch, D width, V vocabulary.
"""

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
from ..adapters.observing import base_model, evaluating, untouched
from ..adapters.outputs import states_in
from ..adapters.prompts import prompts_by_labels
from ..adapters.types import Layers, Site
from ..losses import Outputs, Strength
from .batch import Batch
from .host_copies import both, on_host
from .parallel import is_sharded
from .prefix.cached_states import CachedReference
from .views import ViewError, Views

REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of an adapter that training continues


class Extras(NamedTuple):
    """What a loss reads besides log-probabilities: hidden states of layers, and the whole distribution."""

    layers: tuple[int, ...] = ()
    distribution: bool = False
    site: Site = "block"


LOGPS_ONLY = Extras()


class ModelAt:
    """The outputs of a model on a batch at any strength of its adapter, with one forward pass per strength.

    `at(1)` is the model as it is. `at(0)` is the reference, without gradients and without dropout: the base model, or
    the frozen copy `ref` when training continues an existing adapter. Other strengths scale the adapter, and "null"
    removes the direction of a steering vector.

    Args:
        model: The model to call (possibly wrapped for distributed training).
        unwrapped: The model inside the wrapper.
        batch: The batch.
        reference_model: A separate reference, for full finetuning.
        reference_memo: Cached reference outputs, consulted before the model runs.
        together: Computes the outputs of a batch at a strength other than 0, in place of the model.
        views: Other versions of the batch.
        look: Receives the logits of the batch's labels at strength 1, and the labels.
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
        self._outputs_of: dict[tuple[Strength, str, Extras], Outputs] = {}

    def __call__(
        self,
        strength: Strength,
        view: str = "",
        layers: Layers = (),
        distribution: bool = False,
        site: Site = "block",
    ) -> Outputs:
        """The model's outputs on the batch, or on a view of it, at `strength`.

        Args:
            strength: See the class.
            view: Name of a view; "" for the batch itself.
            layers: Layers whose hidden states to return, as in `SteeringVectorConfig`.
            distribution: Whether to return the whole distribution over the vocabulary.
            site: Of those layers, the residual stream, or what attention or MLP write into it.

        Raises:
            ViewError: the view does not exist.
            ValueError: the model has no such layer or site.
        """
        strength = strength if strength == "null" else float(strength)
        indices = [] if layers == () else resolve_layers(layers, len(find_blocks(base_model(self.unwrapped))))
        key = (strength, view, Extras(tuple(indices), distribution, site if indices else "block"))
        if key not in self._outputs_of:
            self._outputs_of[key] = self._compute(*key)
        return self._outputs_of[key]

    @property
    def seen(self) -> dict[Strength, Outputs]:
        """Outputs on the batch itself, by the strengths that were requested so far."""
        return {strength: outputs for (strength, view, _), outputs in self._outputs_of.items() if not view}

    def _compute(self, strength: Strength, view: str, extras: Extras) -> Outputs:
        batch = self.batch
        if view:
            if self.views is None:
                raise ViewError(
                    f"The loss asks for view {view!r}, but the trainer has no views. Pass views= to the trainer."
                )
            batch = self.views.of(view, batch)
            if (teacher := self.views.views[view].teacher) is not None:
                if strength != 0.0:
                    raise ViewError(
                        f"View {view!r} has a teacher model, which has no strength {strength}. Use at(0.0, view=)."
                    )
                teach = partial(_frozen_outputs, teacher, extras=extras)
                return _cached(self.views.memos.get(view), batch, teach, extras)
        if strength == 0.0:
            return self._reference(batch, extras)
        if self.together is not None:
            return self.together(batch, strength)
        with scaled(self.unwrapped, strength):
            return token_logps(self.model, self.unwrapped, batch, extras, None if view else self.look)

    def _reference(self, batch: Batch, extras: Extras) -> Outputs:
        if batch.reference_logps is not None and extras == LOGPS_ONLY:
            # TRL keeps one number per row; spread over its tokens, it does not change sums and means per row
            mask_BC = batch.targets != -100
            per_token_B = batch.reference_logps / mask_BC.sum(dim=1).clamp_min(1)
            return Outputs(mask_BC * per_token_B[:, None], mask_BC)
        return _cached(self.reference_memo, batch, partial(self._compute_reference, extras=extras), extras)

    @torch.no_grad()
    def _compute_reference(self, batch: Batch, extras: Extras) -> Outputs:
        if self.reference_model is not None:
            return _frozen_outputs(self.reference_model, batch, extras)
        if not isinstance(self.unwrapped, PeftModel):
            raise ValueError(
                "This loss compares with the base model, which full finetuning changes. Give a reference_model."
            )
        # with a cache, processes run different numbers of rows: nothing that waits for the others may be called
        model = self.model if self.reference_memo is None else self.unwrapped
        with reference_adapter(self.unwrapped), evaluating(self.unwrapped):
            return token_logps(model, self.unwrapped, batch, extras)


@torch.no_grad()
def _frozen_outputs(model: nn.Module, batch: Batch, extras: Extras) -> Outputs:
    """Outputs of a model that is not trained."""
    with evaluating(model):
        return token_logps(model, model, batch, extras)


def _cached(
    cache: CachedReference | None, batch: Batch, compute: Callable[[Batch], Outputs], extras: Extras
) -> Outputs:
    """Outputs from a cache if there is one; whole distributions are too large to keep."""
    if cache is None or extras.distribution:
        return compute(batch)
    return cache.outputs(batch, compute, extras.layers, extras.site)


@contextmanager
def reference_adapter(model: PeftModel) -> Iterator[None]:
    """Context in which the model is as before training: with the copy `ref` if there is one, else without adapters."""
    from trl.trainer.utils import use_adapter

    with untouched(model), use_adapter(model, REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None):
        yield


def scaled(model: nn.Module, strength: Strength) -> AbstractContextManager[Any]:
    """Context in which the active adapters are scaled by `strength`.

    Raises:
        ValueError: the adapter cannot be scaled, or gradient checkpointing covers it (the backward pass would
            recompute the forward pass at another strength).
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
    if strength == "null" and any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "strength='null' does not work under ZeRO-3, which expects the modules of every pass in the order of the "
            "first. Use ZeRO-2, FSDP2 or DDP, or a loss without it."
        )
    lora = any(isinstance(layer, LoraLayer) for layer in model.modules())
    if lora and strength == "null":
        raise ValueError(
            "strength='null' removes the direction of a steering vector; a LoRA has none. (RePS can do without it: "
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
    `__call__`, also the hooks of the block.
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
    extras: Extras = LOGPS_ONLY,
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> Outputs:
    """Run the model on a batch: log-probabilities of its labels, and the extras. `look` receives logits and labels."""
    with _captured_states(unwrapped, batch, extras) as hidden:
        logits_LV = labelled_logits(model, unwrapped, batch)
    if look is not None:
        look(logits_LV, batch.answers)
    logps_L = -F.cross_entropy(logits_LV, batch.answers, reduction="none")
    outputs = Outputs(batch.spread(logps_L), batch.targets != -100)
    if extras == LOGPS_ONLY:
        return outputs
    return replace(outputs, hidden=hidden, distribution=logits_LV.log_softmax(-1) if extras.distribution else None)


@contextmanager
def _captured_states(model: nn.Module, batch: Batch, extras: Extras) -> Iterator[dict[int, Tensor]]:
    """Yield a dictionary that the forward pass fills: layer -> its states that predict a label, `(labels, d)`."""
    states: dict[int, Tensor] = {}
    if not extras.layers:
        yield states
        return
    base = base_model(model)
    blocks = find_blocks(base)
    modules = {layer: base.get_submodule(site_name(*blocks[layer], extras.site)) for layer in extras.layers}

    def capture(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        states[layer] = batch.labelled(states_in(output)).float()

    handles = [module.register_forward_hook(partial(capture, layer)) for layer, module in modules.items()]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def labelled_logits(model: nn.Module, unwrapped: nn.Module, batch: Batch) -> Tensor:
    """Logits of the tokens that predict a label, `(labels, vocabulary)` in fp32, row after row.

    The head runs only on these tokens.
    """
    base = base_model(unwrapped)
    kwargs: dict[str, Any] = {"use_cache": False}
    if "output_router_logits" in inspect.signature(type(base).forward).parameters:
        kwargs["output_router_logits"] = False  # TRL sets them in the config, for a loss that is not used here
    with prompt_of(unwrapped, batch), _head_on_labels(base, batch) as packed:
        logits = model(**batch.inputs, **kwargs).logits  # (1, L, V) if packed, else (B, T, V)
    # not logits[0], whose backward fills zeros of their size and copies into them
    return (logits.flatten(0, 1) if packed else batch.labelled(logits)).float()


@contextmanager
def _head_on_labels(base: nn.Module, batch: Batch) -> Iterator[bool]:
    """Context in which the head sees only the last hidden states that predict a label, as one row.

    It yields False if the module that computes the last hidden states is unknown; the head then sees all of them.
    """
    try:
        stack = find_stack(base)
    except ValueError:
        yield False
        return

    def pack(module: nn.Module, args: Any, output: Any) -> Any:
        h_1LD = batch.labelled(output[0])[None]
        if isinstance(output, tuple):
            return h_1LD, *output[1:]
        output.last_hidden_state = h_1LD
        return output

    handle = stack.register_forward_hook(pack)
    try:
        yield True
    finally:
        handle.remove()


def prompt_of(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """Context in which `positions` know where each row's completion starts: at its first label, or at its end.

    In rows with several answers, each of them starts a completion.
    """
    labelled_BT = on_host(batch.labels) != -100
    answers_B = (labelled_BT[:, 1:] & ~labelled_BT[:, :-1]).sum(dim=1) + labelled_BT[:, 0]
    if bool((answers_B > 1).any()):
        return prompts_by_labels(model, batch.labels)

    def start(labels_BT: Tensor) -> Tensor:
        labelled_BT = labels_BT != -100
        return torch.where(labelled_BT.any(dim=1), labelled_BT.int().argmax(dim=1), labels_BT.shape[1])

    return prompt_length(model, both(start, batch.labels))
