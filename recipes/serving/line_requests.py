"""Requests of the line-based service: checked, answered in batches, each with its own vector and strength."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel, Field

from steertune.adapters.rows import RowVector
from steertune.recipes.lab.files import ArmError
from steertune.recipes.serving.defaults import BATCH, LONGEST, SECONDS
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.jobs import Event, Failed, Job, Piece, Sampling
from steertune.recipes.serving.limits import Limits, read_prompt
from steertune.recipes.serving.vectors import Vectors


class Request(BaseModel, extra="forbid", strict=True):
    """What is asked.

    Attributes:
        prompt: Text, which is continued, or messages, which are asked through the chat template.
        vector: Name of a vector; None: the base model answers.
        strength: Of the vector.
        new_tokens: Longest answer.
        temperature: 0 is greedy.
        seed: Of this request's random numbers.
        id: Of the request.
    """

    prompt: str | list[dict[str, str]] = Field(min_length=1)
    vector: str | None = None
    strength: float = Field(default=1.0, allow_inf_nan=False)
    new_tokens: int = Field(default=60, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)
    id: int | str | None = None


class Server:
    """Answers of one model with several steering vectors.

    Args:
        vectors: The model and its vectors (see `load_vectors`).
        tokenizer: Of the model.
        batch: Requests at a time.
        longest: Largest `new_tokens` of a request.
        seconds: Time for one answer.
    """

    def __init__(
        self,
        vectors: Vectors,
        tokenizer: Any,
        batch: int = BATCH,
        longest: int = LONGEST,
        seconds: float = SECONDS,
    ) -> None:
        self.vectors, self.tokenizer, self.seconds = vectors, tokenizer, seconds
        self.engine = Engine(vectors, tokenizer, batch)
        self.limits = Limits.of(self.engine.base, tokenizer, longest)

    def check(self, request: Request) -> None:
        """Raise an ArmError for what cannot be answered."""
        self.limits.check_length(request.new_tokens, "new_tokens")
        if request.vector is not None:
            self.vectors.check(request.vector, request.strength)
        self.limits.check(read_prompt(self.tokenizer, request.prompt), request.new_tokens, "new_tokens")

    def answers(self, requests: Sequence[Request]) -> list[str]:
        """One answer a request, in their order.

        Raises:
            ArmError: a request that cannot be answered.
        """
        for request in requests:
            self.check(request)
        replies = self.replies(requests)
        for reply in replies:
            if isinstance(reply, ArmError):
                raise reply
        return [str(reply) for reply in replies]

    def replies(self, requests: Sequence[Request]) -> list[str | ArmError]:
        """The same of requests that were checked, with the error of each that has no answer."""
        texts = [""] * len(requests)
        errors: dict[int, ArmError] = {}

        def hear(row: int, event: Event) -> None:
            if isinstance(event, Piece):
                texts[row] += event.text
            elif isinstance(event, Failed):
                errors[row] = ArmError(event.message)

        prompts = [read_prompt(self.tokenizer, request.prompt) for request in requests]
        for row in sorted(range(len(requests)), key=lambda i: len(prompts[i])):  # like lengths need little padding
            self.engine.submit(self._job(requests[row], prompts[row], partial(hear, row)))
        self.engine.run()
        return [errors.get(row, text.strip()) for row, text in enumerate(texts)]

    def _job(self, request: Request, prompt: list[int], listener: Any) -> Job:
        names = [] if request.vector is None else [request.vector]
        adapters = [self.vectors.named[name].adapter for name in names]
        return Job(
            prompt,
            request.new_tokens,
            listener,
            vectors=tuple(RowVector(adapter, request.strength) for adapter in adapters),
            sampling=Sampling(temperature=request.temperature, seed=request.seed),
            seconds=self.seconds,
        )
