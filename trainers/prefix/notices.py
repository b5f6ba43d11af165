"""Say why something is not left out: each reason once, on one process."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)
_SILENCE = "This costs time only. frozen_prefix=False trains in the same way without this line"


class Notices:
    """What a `FrozenPrefix` has to say in one run.

    Args:
        level: Level of the messages.
        visible: Whether the first message that the prefix is off is a warning, whatever the level.
    """

    def __init__(self, level: int, visible: bool = False) -> None:
        self._level, self._visible = level, visible
        self._told: set[str] = set()

    def off(self, why: object) -> None:
        """The lower layers are run in every pass, because of `why`."""
        level = logging.WARNING if self._visible else self._level
        self._visible = False
        self._tell(level, f"The frozen prefix is off: {why}. {_SILENCE}")

    def failed(self, what: str, error: str) -> None:
        """`what` raised an `error` that the plain path did not: that is a fault of ours, and always a warning."""
        self._visible = False
        self._tell(logging.WARNING, f"The frozen prefix is off: {what} failed with {error}. {_SILENCE}")

    def less(self, why: object) -> None:
        """A part of what can be left out is not, because of `why`."""
        self._tell(self._level, f"The frozen prefix: {why}")

    def _tell(self, level: int, text: str) -> None:
        elsewhere = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        if text not in self._told and not elsewhere:
            self._told.add(text)
            logger.log(level, "%s.", text)


def in_words(error: BaseException) -> str:
    """An error without its traceback, which would hold the tensors of the pass that failed."""
    return f"{type(error).__name__}: {error}".removesuffix(".")
