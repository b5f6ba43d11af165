"""The engine's jobs, one for each answer, and the events that they report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from steertune.adapters.rows import RowVector

Reason = Literal["stop", "length", "content_filter"]
FailureKind = Literal["late", "request", "server"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: The next token is drawn from the most probable tokens that together have this probability.
        seed: Seed of this answer's random numbers.
        frequency_penalty: Subtracted from a token's logit for every time it occurs in the answer.
        presence_penalty: Subtracted from the logit of every token that occurs in the answer.
        logit_bias: Token -> value that is added to its logit.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A token and its log-probability under the steered model, before temperature and penalties.

    Attributes:
        token: Its id.
        logprob: In nats; None for the first token of a prompt, which nothing predicts.
        top: The most probable tokens and their log-probabilities, the highest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The prompt has been read; its tokens, scored if requested."""

    scores: tuple[Scored, ...]


@dataclass(frozen=True)
class Piece:
    """More text of the answer. Scores come with the text of their tokens, if they were requested."""

    text: str
    scores: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Watched:
    """Monitors' scores of the next tokens of the answer, by name. A token is read a step after it is drawn, so the
    last token of an answer that is cut off has no score."""

    scores: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Gated:
    """A gate has acted; `details` is sent to the client."""

    details: Mapping[str, Any]


@dataclass(frozen=True)
class Done:
    """The answer is complete.

    Attributes:
        reason: "stop" (the model or a stop text ended it), "length", or "content_filter" (a gate ended it).
        tokens: Number of tokens generated.
    """

    reason: Reason
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The answer has failed.

    Attributes:
        message: The reason.
        kind: "late": it timed out; "request": the request cannot be answered; "server": anything else.
    """

    message: str
    kind: FailureKind = "server"


Event = Prompt | Piece | Watched | Gated | Done | Failed


class Watch(Protocol):
    """Checks an answer after every token that monitors have scored."""

    def look(self, job: Job) -> None:
        """Check the job's scores; can change its vectors, or halt it."""


@dataclass(eq=False)
class Job:
    """One answer.

    Attributes:
        prompt: Token ids.
        new_tokens: Maximum length of the answer; 0 only reads the prompt.
        listener: Called by the engine with every event, the last of which is `Done` or `Failed`.
        vectors: The vectors that steer it, under their adapter names in the model.
        sampling: How tokens are drawn.
        stops: Texts that end the answer and are not part of it.
        top: How many of the most probable tokens are scored in addition to each token; None: tokens are not scored.
        echo: Whether the tokens of the prompt are scored.
        seconds: Time limit, counted from when it starts.
        deadline: The same limit as a time of `time.monotonic()`; set when the job starts, unless it was given.
        tokens: The answer so far.
        monitors: Names of the monitors that score its tokens.
        token_scores: Their scores by name; the last token of an answer that is cut off is never read.
        watch: Checks these scores while the answer grows.
        halted: Whether the answer ends here, even if the model would continue.
        cancelled: Whether the client no longer waits for it.
    """

    prompt: list[int]
    new_tokens: int
    listener: Callable[[Event], None]
    vectors: tuple[RowVector, ...] = ()
    sampling: Sampling = Sampling()
    stops: tuple[str, ...] = ()
    top: int | None = None
    echo: bool = False
    seconds: float = 600.0
    deadline: float | None = None
    tokens: list[int] = field(default_factory=list)
    monitors: tuple[str, ...] = ()
    token_scores: dict[str, list[float]] = field(default_factory=dict)
    watch: Watch | None = None
    halted: bool = False
    cancelled: bool = False

    @property
    def read(self) -> list[int]:
        """The tokens of the prompt and of the answer so far."""
        return self.prompt + self.tokens

    def begin(self) -> None:
        """Start the clock of its time limit."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self.seconds

    def is_late(self) -> bool:
        """Whether its time limit has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def fail(self, message: str, kind: FailureKind = "server") -> None:
        """Report that the job has failed."""
        self.listener(Failed(message, kind))
