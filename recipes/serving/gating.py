"""What happens to an answer that a monitor flags: it ends, a vector is switched on, or it is generated again.

`stop` and `steer` check after every token, and act on the rest of the answer. An innocent answer then has many chances
to be flagged, so it is flagged more often than at the threshold's rate. `resample` and `restart` check once, at the
end of the answer, for which the threshold was chosen; a streamed answer is held back until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator

from steertune.adapters.monitors import Monitor
from steertune.adapters.rows import RowVector
from steertune.recipes.serving.jobs import Done, Event, Failed, Gated, Job, Piece
from steertune.recipes.serving.names import Steering
from steertune.recipes.serving.remedies import TEMPERATURE

_STEERED = ("steer", "restart")


class Gate(BaseModel, extra="forbid"):
    """The field `gate` of a request.

    Attributes:
        monitor: Name of the monitor that decides.
        action: "stop": the answer ends after the token that was flagged; "steer": from there on `steering` is added;
            "resample": it is sampled again `attempts` times, and the least suspicious answer is returned; "restart":
            it is generated again with `steering`.
        threshold: The score above which it acts; None: the monitor's threshold.
        steering: Vectors for "steer" and "restart"; they replace vectors of the same name.
        attempts: Number of further attempts of "resample".
    """

    monitor: str
    action: Literal["stop", "steer", "resample", "restart"]
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    steering: list[Steering] = Field(default=[], max_length=32)
    attempts: int = Field(default=4, ge=1, le=16)

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Gate:
        if (self.action in _STEERED) != bool(self.steering):
            raise ValueError(
                f"action={self.action!r} with {len(self.steering)} vectors in steering. "
                f"{' and '.join(map(repr, _STEERED))} need one or more, the other actions none"
            )
        return self


@dataclass
class LiveWatch:
    """Checks an answer while it grows, and acts once: `stop` and `steer`.

    Attributes:
        gate: The request's gate.
        monitor: The monitor that decides.
        vectors: The vectors that are switched on.
    """

    gate: Gate
    monitor: Monitor
    vectors: tuple[RowVector, ...] = ()
    acted: bool = field(default=False, init=False)

    def look(self, job: Job) -> None:
        """Act if the score of the answer so far is above the threshold."""
        if self.acted or not is_flagged(self.gate, self.monitor, job):
            return
        self.acted = True
        if self.gate.action == "stop":
            job.halted = True
        else:
            job.vectors = switched_on(job.vectors, self.vectors)
        at = len(job.token_scores[self.gate.monitor])
        job.listener(Gated({"monitor": self.gate.monitor, "action": self.gate.action, "at": at}))


class Attempts:
    """Generates the answer of one choice, and again if it is flagged: `resample` and `restart`. It receives the
    engine's events of every attempt, and forwards those of the attempt that is returned.

    Args:
        gate: The request's gate.
        monitor: The monitor that decides.
        vectors: The vectors with which the answer is generated again.
        listener: The listener of the choice.
        submit: Submits one more job to the engine; called on the engine's thread.
    """

    def __init__(
        self,
        gate: Gate,
        monitor: Monitor,
        vectors: tuple[RowVector, ...],
        listener: Callable[[Event], None],
        submit: Callable[[Job], None],
    ) -> None:
        self.gate, self.monitor, self.vectors = gate, monitor, vectors
        self._listener, self._submit = listener, submit
        self._jobs: list[Job] = []
        self._events: list[list[Event]] = []
        self._open = 0

    def first(self, job: Job) -> Job:
        """The job of the first attempt, which reports here."""
        return self._attempt(job)

    def _attempt(self, job: Job) -> Job:
        events: list[Event] = []
        job.listener = lambda event: self._hear(event, events)
        self._jobs.append(job)
        self._events.append(events)
        self._open += 1
        return job

    def _hear(self, event: Event, events: list[Event]) -> None:
        events.append(event)
        if not isinstance(event, Done | Failed):
            return
        self._open -= 1
        first = self._jobs[0]
        if len(self._jobs) == 1 and isinstance(event, Done) and is_flagged(self.gate, self.monitor, first):
            for job in [self._attempt(job) for job in self._again(first)]:
                self._submit(job)
        elif not self._open:
            self._give()

    def _again(self, first: Job) -> list[Job]:
        """The further attempts."""
        if self.gate.action == "restart":
            return [_copy(first, vectors=switched_on(first.vectors, self.vectors))]
        temperature = first.sampling.temperature or TEMPERATURE
        samplings = [
            replace(first.sampling, seed=(first.sampling.seed + number) % 2**63, temperature=temperature)
            for number in range(1, self.gate.attempts + 1)
        ]
        return [_copy(first, sampling=sampling) for sampling in samplings]

    def _give(self) -> None:
        """Forward the events of the attempt that is returned."""
        complete = [i for i, events in enumerate(self._events) if isinstance(events[-1], Done)]
        if self.gate.action == "restart" and complete:
            chosen = complete[-1]
        else:
            chosen = min(complete, key=self._rank, default=0)
        if len(self._jobs) > 1:
            text = "".join(event.text for event in self._events[0] if isinstance(event, Piece))
            score = score_of(self.monitor, self._jobs[0].token_scores.get(self.gate.monitor, ()))
            details = {"monitor": self.gate.monitor, "action": self.gate.action, "attempts": len(self._jobs) - 1}
            first = {"text": text, "score": score}
            self._listener(Gated({**details, "replaced": chosen != 0, "first": first}))
        for event in self._events[chosen]:
            self._listener(event)

    def _rank(self, number: int) -> float:
        """The score of an attempt; an empty answer counts as the most suspicious, since it does not answer."""
        score = score_of(self.monitor, self._jobs[number].token_scores.get(self.gate.monitor, ()))
        return math.inf if score is None else score


def score_of(monitor: Monitor, scores: Sequence[float]) -> float | None:
    """The score of an answer, from the scores of its tokens; None if there are none."""
    return monitor.pool(torch.tensor(scores)) if len(scores) else None


def is_flagged(gate: Gate, monitor: Monitor, job: Job) -> bool:
    """Whether the answer so far is above the threshold."""
    score = score_of(monitor, job.token_scores.get(gate.monitor, ()))
    if score is None:
        return False
    return monitor.flags(score) if gate.threshold is None else score > gate.threshold


def switched_on(vectors: tuple[RowVector, ...], more: tuple[RowVector, ...]) -> tuple[RowVector, ...]:
    """Vectors together with further ones, which replace those of the same adapter."""
    names = {vector.adapter for vector in more}
    return (*(vector for vector in vectors if vector.adapter not in names), *more)


def _copy(job: Job, **changes: Any) -> Job:
    """A job for the same request, which is answered from its beginning."""
    return replace(job, **{"tokens": [], "token_scores": {}, "halted": False, **changes})
