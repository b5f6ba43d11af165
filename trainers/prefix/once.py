"""What a trainer does with a `FrozenPrefix`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from ...adapters.blocks import find_blocks, find_stack
from ...adapters.observing import evaluating
from .checkpointing import run_again_alike
from .cut import base_of
from .frozen import FrozenPrefix
from .notices import Notices
from .reference import ReferenceMemo
from .shortcut import Shortcut


class PayOnce:
    """The memo of one trainer, looked at again at the start of every training and evaluation.

    Where the prefix is off though nobody asked for that, a trainer that was not told anything says so once.

    Args:
        asked: The trainer's `frozen_prefix=`.

    Raises:
        TypeError: neither a bool, nor None, nor a `FrozenPrefix`.
    """

    def __init__(self, asked: FrozenPrefix | bool | None) -> None:
        if not isinstance(asked, FrozenPrefix | bool | None):
            raise TypeError(f"frozen_prefix={asked!r}: give True, False, or a FrozenPrefix.")
        own = None if asked is False else FrozenPrefix(warn=asked is True)
        self._prefix = asked if isinstance(asked, FrozenPrefix) else own
        self._nobody_asked = asked is None
        self._notices: Notices | None = None  # of this run
        self._shortcut: Shortcut | None = None
        self._model: nn.Module | None = None  # whose plain passes are ours to look after
        self.reference: ReferenceMemo | None = None

    def start(self, trainer: Any, training: bool, whole_rows: bool = False) -> None:
        """Find what is constant in the trainer's model from now on; with `whole_rows`, what no row is run in parts
        for."""
        self._shortcut = self.reference = None
        why = _impossible(trainer)
        self._model = None if why else trainer.model
        if self._prefix is None:
            return
        if training or self._notices is None:
            self._notices = Notices(self._prefix.level, visible=self._nobody_asked)
        if why:
            self._notices.off(why)
            return
        if trainer.loss is not None and trainer.loss.needs.states:
            self._notices.off("the loss looks at hidden states, which layers that are left out do not show")
        with nullcontext() if training else evaluating(trainer.model):  # as evaluation loops will run it
            self._shortcut = self._prefix.shortcut(trainer.model, training, self._notices)
        if whole_rows and self._shortcut is not None:
            self._shortcut.run_whole_rows()
        own = getattr(trainer, "ref_model", None)
        loss = trainer.loss_at_work
        if loss is not None and loss.needs.reference and _rounds_finely(trainer):
            self.reference = self._prefix.reference(trainer.model if own is None else own, trained=own is None)
        if trainer.views is not None:
            trainer.views.remember(self._prefix)

    def elsewhere(self, model: nn.Module) -> Shortcut | None:
        """What forward passes of another model on the same weights can leave out, in training."""
        return None if self._prefix is None else self._prefix.shortcut(model, training=True)

    def shortcut(self, labels_only: bool = False) -> AbstractContextManager[None]:
        """Forward passes inside leave out what they can (see `Shortcut.on`)."""
        return self.whole() if self._shortcut is None else self._shortcut.on(labels_only)

    def whole(self) -> AbstractContextManager[None]:
        """Forward passes inside leave nothing out; where layers are checkpointed, they are run again as they ran."""
        if self._model is None or not self._model.training:
            return nullcontext()
        try:
            base = base_of(self._model)
            stack, blocks = find_stack(base), [block for _, block in find_blocks(base)]
        except ValueError:  # blocks that nobody knows
            return nullcontext()
        return run_again_alike(stack, blocks)


def _rounds_finely(trainer: Trainer) -> bool:
    """Whether two ways to compute log-probabilities agree to 1e-6, as they do in fp32.

    In half precision the reference takes the policy's own way, batch by batch: kept from another way, it would differ
    by rounding, and an untrained adapter would have a margin.
    """
    model: Any = trainer.model
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
    return trainer.accelerator.mixed_precision == "no" and not dtypes & {torch.bfloat16, torch.float16}


def _impossible(trainer: Trainer) -> str | None:
    """Why the way this trainer runs its model rules a memo out."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.torch_compile:
        return "a compiled graph runs all layers. Set torch_compile=False to leave them out instead"
    if args.n_gpu > 1:
        return "nn.DataParallel copies the model at every step; use accelerate launch"
    kind = accelerator.distributed_type
    stage = getattr(accelerator.state.deepspeed_plugin, "zero_stage", 0) if kind == DistributedType.DEEPSPEED else 0
    # from_pretrained(distributed_config=) makes DTensors, and accelerate calls it DDP
    model: Any = trainer.model
    at_load = any(hasattr(p, "device_mesh") for p in model.parameters())
    if kind == DistributedType.FSDP or stage == 3 or at_load:
        return "sharded weights: all processes must run the same layers. DDP or ZeRO-2 leave the weights whole"
    return None
