"""What the engine works on: jobs, one for each answer, and the events that they report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from steertune.adapters.rows import RowVector

Reason = Literal["stop", "length"]
FailureKind = Literal["late", "request", "server"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: Only the most probable tokens that together have this probability are drawn from.
        seed: Seed of this answer's random numbers.
        frequency_penalty: Subtracted from a token's logit for every time it occurs in the answer.
        presence_penalty: Subtracted from the logit of every token that the answer holds.
        logit_bias: Token -> what is added to its logit.
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
class Done:
    """The answer is complete.

    Attributes:
        reason: "stop" (the model or a stop text ended it) or "length".
        tokens: Number of tokens generated.
    """

    reason: Reason
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The answer has failed.

    Attributes:
        message: Why.
        kind: "late": it timed out; "request": the request itself cannot be answered; "server": anything else.
    """

    message: str
    kind: FailureKind = "server"


Event = Prompt | Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """One answer.

    Attributes:
        prompt: Token ids.
        new_tokens: Length of the longest answer; 0 only reads the prompt.
        listener: Called by the engine with every event, of which `Done` or `Failed` is the last.
        vectors: What steers it, under the model's own adapter names.
        sampling: How tokens are drawn.
        stops: Texts that end the answer and are not part of it.
        top: How many of the most probable tokens are scored beside each token; None: tokens are not scored.
        echo: Whether the tokens of the prompt are scored.
        seconds: Time limit, counted from when it starts.
        deadline: The same limit as a time of `time.monotonic()`; set when the job starts, unless it was given.
        tokens: The answer so far.
        token_scores: A monitor's scores of its tokens; the last token of an answer that is cut off is never read.
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
    token_scores: list[float] = field(default_factory=list)
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
        """Report that it has failed."""
        self.listener(Failed(message, kind))
