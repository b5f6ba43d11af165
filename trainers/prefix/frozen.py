"""`FrozenPrefix`, a cache that users can share between trainers, and `CachedPrefix`, its use by one trainer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from ...adapters.blocks import find_blocks, find_stack
from ...adapters.observing import base_model, evaluating
from .cached_pass import CachedPass
from .cached_states import CachedReference
from .checkpointing import run_again_alike
from .exactness import NoPrefix, Notices, in_words
from .store import TensorStore


class FrozenPrefix:
    """A cache of what is constant for an example, for any number of trainers, arms, seeds and evaluations.

    The constants are the residual stream at the output of the last block below all trained parameters, and the
    log-probabilities of the example's answer under the reference, `at(0)`. Both are stored by content: the row's
    tokens, mask and positions, and the weights they were computed with. The bits of a row do not depend on the batch
    in which it was first seen, and a resumed run sees the same bits.

    Args:
        ram_gb: RAM budget in GB (10⁹ bytes), never exceeded. A token takes `hidden size · bytes of a number`.
        folder: Store the cache here, for later runs and for other processes. None: what exceeds the budget goes to
            memory-mapped temporary files.
        disk_gb: Disk budget in GB, including files that the folder already holds; what does not fit is computed
            again.
        warn: Whether to warn if something cannot be skipped; otherwise the message has the level INFO.
        stops: Numbers of lower blocks after which states are also stored when a pass computes them: a sweep over
            layers that starts at the top pays for all of them with one pass.

    Raises:
        ValueError: a budget is negative or not finite.
    """

    def __init__(
        self,
        ram_gb: float = 2.0,
        folder: str | Path | None = None,
        warn: bool = True,
        disk_gb: float = 20.0,
        stops: Collection[int] = (),
    ) -> None:
        self.memo = TensorStore(ram_gb, folder, disk_gb)
        self.level = logging.WARNING if warn else logging.INFO
        self.stops = frozenset(stops)
        self._proven: set[str] = set()

    @property
    def usable(self) -> bool:
        """Whether there is room for anything."""
        return self.memo.limit > 0 or self.memo.kept_for_later

    def shortcut(
        self, model: nn.Module, training: bool = False, notices: Notices | None = None, keep: bool = True
    ) -> CachedPass | None:
        """A `CachedPass` for `model` in its current state; None if it could skip nothing.

        Args:
            model: A transformers model, with or without PEFT.
            training: Whether its trainable parameters will be changed; False for evaluation.
            notices: Reports why something is not skipped; None for the level of this cache, each reason once.
            keep: Whether states of rows are stored. Otherwise, rows only run without padding.
        """
        notices = notices or Notices(self.level)
        try:
            if not self.usable:
                raise NoPrefix("its budget is 0 GB")
            # other processes may have added rows to the folder
            self.memo.refresh()
            return CachedPass(self.memo, model, training, self._proven, notices, self.stops, keep)
        except NoPrefix as error:
            notices.off(error)
        except Exception as error:  # training continues without the cache, whatever failed in it
            notices.failed("looking at the model", in_words(error))
        return None

    @contextmanager
    def on(self, model: nn.Module, labels_only: bool = False, keep: bool = True) -> Iterator[None]:
        """Context in which forward passes of `model`, for evaluation, skip what they can.

        Args:
            model: As for `shortcut`.
            labels_only: Whether the outputs before the last prompt token are not read.
            keep: As for `shortcut`.
        """
        cached_pass = self.shortcut(model, keep=keep)
        with nullcontext() if cached_pass is None else cached_pass.on(labels_only):
            yield

    def reference(self, model: nn.Module, trained: bool = True) -> CachedReference | None:
        """The cache of `at(0)`; with `trained`, parameters that require gradients are not part of the reference."""
        try:
            return CachedReference(self.memo, model, trained) if self.usable else None
        except Exception as error:  # such as weights whose bits cannot be read
            Notices(self.level).failed("the cache of the reference", in_words(error))
            return None


class CachedPrefix:
    """The cached prefix of one trainer.

    The trainer calls `start` at the beginning of every training run and evaluation, `on` around passes that may skip
    something, and `whole` around passes that may not.

    Args:
        setting: The trainer's `frozen_prefix=`. None: on, with one warning if it cannot be used.

    Raises:
        TypeError: the setting is neither a bool, nor None, nor a `FrozenPrefix`.
    """

    def __init__(self, setting: FrozenPrefix | bool | None) -> None:
        if not isinstance(setting, FrozenPrefix | bool | None):
            raise TypeError(f"frozen_prefix={setting!r} must be True, False, None or a FrozenPrefix.")
        # a private cache, unless caching is off or the cache is shared
        private = None if setting is False else FrozenPrefix(warn=setting is True)
        self._prefix = setting if isinstance(setting, FrozenPrefix) else private
        self._by_default = setting is None
        self._notices: Notices | None = None  # of this run
        self._model: nn.Module | None = None  # whose whole passes may be checkpointed
        self.cached_pass: CachedPass | None = None
        self.reference: CachedReference | None = None

    def start(self, trainer: Any, training: bool, whole_rows: bool = False) -> None:
        """Determine what is constant in the trainer's model from now on.

        Args:
            trainer: The trainer.
            training: Whether it trains; False for an evaluation.
            whole_rows: Whether every row has to run as it is, with its padding and in one piece.
        """
        self.cached_pass = self.reference = None
        why = _impossible(trainer)
        self._model = None if why else trainer.model
        if self._prefix is None:
            return
        # an evaluation within a run does not repeat the run's messages
        if training or self._notices is None:
            self._notices = Notices(self._prefix.level, visible=self._by_default)
        if why:
            self._notices.off(why)
            return
        if trainer.loss is not None and trainer.loss.needs.states:
            self._notices.off("the loss reads hidden states, which skipped layers do not return")
        with nullcontext() if training else evaluating(trainer.model):  # as evaluation loops will run it
            self.cached_pass = self._prefix.shortcut(trainer.model, training, self._notices)
        if whole_rows and self.cached_pass is not None:
            self.cached_pass.run_whole_rows()
        # the reference is the model itself without its adapter, or a separate model
        separate = getattr(trainer, "ref_model", None)
        loss = trainer.loss_at_work
        if loss is not None and loss.needs.reference and _rounds_finely(trainer):
            self.reference = self._prefix.reference(
                trainer.model if separate is None else separate, trained=separate is None
            )
        if trainer.views is not None:
            trainer.views.remember(self._prefix)

    def elsewhere(self, model: nn.Module) -> CachedPass | None:
        """A `CachedPass` for training passes of another model on the same weights; None if it could skip nothing."""
        return None if self._prefix is None else self._prefix.shortcut(model, training=True)

    def on(self, labels_only: bool = False) -> AbstractContextManager[None]:
        """Context in which forward passes skip what they can (see `CachedPass.on`)."""
        return self.whole() if self.cached_pass is None else self.cached_pass.on(labels_only)

    def whole(self) -> AbstractContextManager[None]:
        """Context in which forward passes skip nothing; checkpointed layers are recomputed as they ran."""
        if self._model is None or not self._model.training:
            return nullcontext()
        try:
            base = base_model(self._model)
            stack, blocks = find_stack(base), [block for _, block in find_blocks(base)]
        except ValueError:  # a model whose blocks are unknown
            return nullcontext()
        return run_again_alike(stack, blocks)


def _rounds_finely(trainer: Trainer) -> bool:
    """Whether two ways to compute log-probabilities agree to 1e-6, as they do in 32 bits.

    In half precision the reference takes the policy's own path, batch by batch. If it were cached from another path,
    it would differ by rounding, and an untrained adapter would have a margin.
    """
    model: Any = trainer.model
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
    return trainer.accelerator.mixed_precision == "no" and not dtypes & {torch.bfloat16, torch.float16}


def _impossible(trainer: Trainer) -> str | None:
    """The reason why this trainer's set-up rules out a cached prefix; None if it does not."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.torch_compile:
        return "a compiled graph runs all layers. Set torch_compile=False to skip them instead"
    if args.n_gpu > 1:
        return "nn.DataParallel copies the model at every step; use accelerate launch"
    # processes that hold parts of the weights must run the same layers at the same time
    kind = accelerator.distributed_type
    stage = getattr(accelerator.state.deepspeed_plugin, "zero_stage", 0) if kind == DistributedType.DEEPSPEED else 0
    # from_pretrained(distributed_config=) makes DTensors, which accelerate reports as DDP
    model: Any = trainer.model
    at_load = any(hasattr(p, "device_mesh") for p in model.parameters())
    if kind == DistributedType.FSDP or stage == 3 or at_load:
        return "sharded weights: all processes must run the same layers. DDP or ZeRO-2 leave the weights whole"
    return None
