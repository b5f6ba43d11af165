"""Requests of the line-based service: they are validated, and answered in batches, each with its own vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, Field

from steertune.adapters.monitors import Monitor
from steertune.adapters.rows import RowVector
from steertune.recipes.lab.files import ArmError
from steertune.recipes.serving.defaults import BATCH, LONGEST, SECONDS
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.jobs import Event, Failed, Job, Piece, Sampling
from steertune.recipes.serving.limits import Limits, read_prompt
from steertune.recipes.serving.names import Steering, combined
from steertune.recipes.serving.remedies import Answer, Remedy
from steertune.recipes.serving.vectors import Vectors

_MONITOR = "monitor"  # its name in the engine


class Request(BaseModel, extra="forbid", strict=True):
    """One request.

    Attributes:
        prompt: Text to continue, or messages, which the chat template formats.
        vector: Name of a vector; None: the base model answers, unless `steering` names vectors.
        strength: Strength of the vector.
        steering: Further vectors, each with a strength and optionally positions.
        new_tokens: Maximum length of the answer.
        temperature: 0 is greedy.
        seed: Seed of this request's random numbers.
        id: Id of the request.
    """

    prompt: str | list[dict[str, str]] = Field(min_length=1)
    vector: str | None = None
    strength: float = Field(default=1.0, allow_inf_nan=False)
    steering: list[Steering] = Field(default=[], max_length=32)
    new_tokens: int = Field(default=60, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)
    id: int | str | None = None

    @property
    def vectors(self) -> list[Steering]:
        """All vectors that steer it.

        Raises:
            ArmError: one of them is named twice.
        """
        first = [] if self.vector is None else [Steering(vector=self.vector, strength=self.strength)]
        return combined(first, self.steering)


class Server:
    """Answers requests with one model and several steering vectors.

    Args:
        vectors: The model and its vectors (see `load_vectors`).
        tokenizer: The model's tokenizer.
        batch: Number of requests at a time.
        longest: Largest `new_tokens` that a request can have.
        seconds: Time limit of one answer.
        monitor: Scores every answer; None: answers are not scored.
        remedy: How to replace answers that it flags; None: they are kept.
    """

    def __init__(
        self,
        vectors: Vectors,
        tokenizer: Any,
        batch: int = BATCH,
        longest: int = LONGEST,
        seconds: float = SECONDS,
        monitor: Monitor | None = None,
        remedy: Remedy | None = None,
    ) -> None:
        self.vectors, self.tokenizer, self.seconds = vectors, tokenizer, seconds
        self.monitor, self.remedy = monitor, remedy
        self.engine = Engine(vectors, tokenizer, batch, monitors={} if monitor is None else {_MONITOR: monitor})
        self.limits = Limits.of(self.engine.base, tokenizer, longest)

    def check(self, request: Request) -> None:
        """Raise an ArmError for a request that cannot be answered."""
        self.limits.check_length(request.new_tokens, "new_tokens")
        for one in request.vectors:
            self.vectors.check(one.vector, one.strength)
        self.limits.check(read_prompt(self.tokenizer, request.prompt), request.new_tokens, "new_tokens")

    def answers(self, requests: Sequence[Request]) -> list[str]:
        """One answer for each request, in order.

        Raises:
            ArmError: a request cannot be answered.
        """
        for request in requests:
            self.check(request)
        replies = self.replies(requests)
        for reply in replies:
            if isinstance(reply, ArmError):
                raise reply
        return [str(reply) for reply in replies]

    def replies(self, requests: Sequence[Request]) -> list[str | ArmError]:
        """Answers to checked requests, and the errors of those that failed. Flagged answers are replaced, if there is
        a remedy."""
        replies = self._replies(requests)
        flagged = [i for i, reply in enumerate(replies) if isinstance(reply, Answer) and reply.flagged]
        if self.remedy is None or not flagged:
            return replies
        for changes in self.remedy.changes:
            again = [requests[i].model_copy(update=changes(requests[i])) for i in flagged]
            for i, other in zip(flagged, self._replies(again), strict=True):
                replies[i] = self.remedy.choose(replies[i], other)
        return replies

    def _replies(self, requests: Sequence[Request]) -> list[str | ArmError]:
        """The answers before any remedy."""
        texts = [""] * len(requests)
        errors: dict[int, ArmError] = {}

        def hear(row: int, event: Event) -> None:
            if isinstance(event, Piece):
                texts[row] += event.text
            elif isinstance(event, Failed):
                errors[row] = ArmError(event.message)

        prompts = [read_prompt(self.tokenizer, request.prompt) for request in requests]
        jobs = [
            self._job(request, prompt, partial(hear, row))
            for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]
        for job in sorted(jobs, key=lambda job: len(job.prompt)):  # prompts of similar length need little padding
            self.engine.submit(job)
        self.engine.run()
        answers: list[str] = [text.strip() for text in texts]
        if self.monitor is not None:
            scored = zip(answers, jobs, strict=True)
            answers = [
                Answer.scored(text, self.monitor, torch.tensor(job.token_scores.get(_MONITOR, [])))
                for text, job in scored
            ]
        return [errors.get(row, answer) for row, answer in enumerate(answers)]

    def _job(self, request: Request, prompt: list[int], listener: Any) -> Job:
        named = self.vectors.named
        return Job(
            prompt,
            request.new_tokens,
            listener,
            vectors=tuple(
                RowVector(named[one.vector].adapter, one.strength, one.positions) for one in request.vectors
            ),
            sampling=Sampling(temperature=request.temperature, seed=request.seed),
            seconds=self.seconds,
            monitors=() if self.monitor is None else (_MONITOR,),
        )
