"""Scored answers, and two ways to replace those that a monitor flags: sample again, or answer with a vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from steertune.adapters import monitors
from steertune.adapters.monitors import Monitor
from steertune.adapters.types import finite_strength
from steertune.recipes.lab.files import ArmError, nearest, shown

TEMPERATURE = 1.0
"""Temperature of greedy requests when they are sampled again."""


class Answer(str):
    """A text with a monitor's judgement.

    Attributes:
        score: None for an empty answer, which has no token to read.
        flagged: Whether the score is above the monitor's threshold.
        first: The flagged answer that this one replaces.
    """

    score: float | None
    flagged: bool
    first: Answer | None

    @classmethod
    def scored(cls, text: str, monitor: Monitor, scores: Tensor) -> Answer:
        """An answer with its score, from the scores of its tokens `(tokens,)`."""
        answer = cls(text)
        answer.score = monitor.pool(scores) if len(scores) else None
        answer.flagged = answer.score is not None and monitor.flags(answer.score)
        answer.first = None
        return answer

    def details(self) -> dict[str, Any]:
        """The fields that a line of answers has besides the text."""
        score = None if self.score is None else round(self.score, 4)
        more = {} if self.first is None else {"first": {"answer": str(self.first), **self.first.details()}}
        return {"score": score, "flagged": self.flagged, **more}


@dataclass(frozen=True)
class Remedy:
    """How flagged requests are answered again.

    Attributes:
        changes: One function for each new answer, from a request to the fields to change.
        steered: Whether the new answer is used whatever its score; otherwise the one with the lowest score is used.
    """

    changes: Sequence[Callable[[Any], dict[str, Any]]]
    steered: bool

    def choose(self, before: Any, other: Any) -> Any:
        """The better of the current answer and a new one; a failed one is never chosen."""
        if not isinstance(other, Answer):
            return before
        if not self.steered and not _rank(other) < _rank(before):
            return before
        other.first = before if before.first is None else before.first
        return other


def check_monitors(folders: Mapping[str, Path], remedy: Remedy | None) -> None:
    """Refuse folders without a monitor of answers that has a threshold, and a remedy without a monitor. Nothing is
    loaded.

    Raises:
        ArmError: there is no threshold, or no monitor for the remedy.
        MonitorError: a folder holds no monitor, or one that reads other tokens.
    """
    if not folders and remedy is not None:
        raise ArmError("--resample and --steer replace answers that a monitor flags. Give --monitor FOLDER.")
    for folder in folders.values():
        monitor = monitors.read(folder)
        if monitor.threshold is None:
            raise ArmError(f"--monitor {folder} has no threshold, so it flags nothing. Fit one: steertune monitor.")
        monitors.check_live([monitor])


def remedy_of(resample: int | None, steer: str | None, vectors: Sequence[str]) -> Remedy | None:
    """The remedy for flagged answers.

    Args:
        resample: How many times to sample a flagged answer again.
        steer: `NAME@STRENGTH` of the vector that answers again.
        vectors: Names of the vectors.

    Raises:
        ArmError: both are given, the vector is unknown, or the strength is not finite.
    """
    if resample is not None and steer is not None:
        raise ArmError("A flagged answer is sampled again or answered with a vector. Give --resample or --steer.")
    if resample is not None:
        return Remedy([_sampled(number) for number in range(1, resample + 1)], steered=False)
    if steer is None:
        return None
    name, _, number = steer.partition("@")
    strength = finite_strength(number or "1")
    if name not in vectors or strength is None:
        raise ArmError(
            f"--steer {shown(steer)} must be NAME@STRENGTH with one of the vectors {[*vectors]} and a finite number."
            f"{nearest(name, vectors)}"
        )
    return Remedy([_steered(name, strength)], steered=True)


def _sampled(number: int) -> Callable[[Any], dict[str, Any]]:
    """The request with other random numbers; a greedy one becomes a sampled one."""
    return lambda request: {
        "seed": (request.seed + number) % 2**63,
        "temperature": request.temperature or TEMPERATURE,
    }


def _steered(name: str, strength: float) -> Callable[[Any], dict[str, Any]]:
    """The request with this vector instead of its first one."""
    return lambda request: {
        "vector": name,
        "strength": strength,
        "steering": [one for one in request.steering if one.vector != name],
    }


def _rank(answer: Answer) -> float:
    """The score; an empty answer counts as the most suspicious, since it does not answer."""
    return math.inf if answer.score is None else answer.score
