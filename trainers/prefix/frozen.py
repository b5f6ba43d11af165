"""`FrozenPrefix`: pay once for what does not change while an adapter trains."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import nn

from .cut import NoPrefix
from .memo import Memo
from .notices import Notices, in_words
from .reference import ReferenceMemo
from .shortcut import Shortcut


class FrozenPrefix:
    """A memo of what is constant for an example, for any number of trainers, arms, seeds and evaluations.

    Constant are the residual stream at the output of the last block below everything that is trained, and the
    log-probabilities of the example's answer under the reference, `at(0)`. Both are kept by content: the row's tokens,
    mask and positions, and the weights they were computed with. A row is always computed alone, so its value does not
    depend on the batch it was first met in, and a resumed run sees the same bits.

    Args:
        ram_gb: RAM budget in GB (10⁹ bytes), never exceeded. A token takes `hidden size · bytes of a number`.
        folder: Keep the memo here, for later runs and for other processes. None: what exceeds the budget goes to
            memory-mapped temporary files.
        disk_gb: What the files may take, in GB, with those that are in the folder already; what does not fit is
            computed again.
        warn: Warn where something cannot be left out; else an INFO message says so.
        stops: Numbers of lower blocks after which states are kept too, where a pass comes by: a sweep over layers
            that starts at the top pays for all of them with one pass.

    Raises:
        ValueError: a negative or not finite budget.
    """

    def __init__(
        self,
        ram_gb: float = 2.0,
        folder: str | Path | None = None,
        warn: bool = True,
        disk_gb: float = 20.0,
        stops: Collection[int] = (),
    ) -> None:
        self.memo = Memo(ram_gb, folder, disk_gb)
        self.level = logging.WARNING if warn else logging.INFO
        self.stops = frozenset(stops)
        self._proven: set[str] = set()

    @property
    def usable(self) -> bool:
        """Whether there is room for anything."""
        return self.memo.limit > 0 or self.memo.kept_for_later

    def shortcut(self, model: nn.Module, training: bool = False, notices: Notices | None = None) -> Shortcut | None:
        """What a forward pass of `model`, as it stands, can leave out; None if nothing.

        Args:
            model: A transformers model, with or without PEFT.
            training: Whether its trainable parameters will be changed; False for evaluation.
            notices: Who says why something is not left out; None: at the level of this memo, each reason once.
        """
        notices = notices or Notices(self.level)
        try:
            if not self.usable:
                raise NoPrefix("its budget is 0 GB")
            self.memo.refresh()
            return Shortcut(self.memo, model, training, self._proven, notices, self.stops)
        except NoPrefix as error:
            notices.off(error)
        except Exception as error:  # a fault of the memo's own is no reason not to train
            notices.failed("looking at the model", in_words(error))
        return None

    @contextmanager
    def on(self, model: nn.Module, labels_only: bool = False) -> Iterator[None]:
        """Forward passes of `model` inside, for evaluation, leave out what they can.

        Args:
            model: As for `shortcut`.
            labels_only: Whether nothing is read of the outputs before the last prompt token.
        """
        shortcut = self.shortcut(model)
        with nullcontext() if shortcut is None else shortcut.on(labels_only):
            yield

    def reference(self, model: nn.Module, trained: bool = True) -> ReferenceMemo | None:
        """The memo of `at(0)`; `trained`: whether what requires gradients in `model` is no part of it."""
        try:
            return ReferenceMemo(self.memo, model, trained) if self.usable else None
        except Exception as error:  # weights that have no bits to read, say
            Notices(self.level).failed("the memo of the reference", in_words(error))
            return None
