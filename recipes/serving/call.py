"""One running request of OpenAI's protocol: its jobs, and their events for the event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from steertune.adapters.rows import RowVector
from steertune.recipes.serving.jobs import Done, Event, Failed, Job, Sampling
from steertune.recipes.serving.names import Steering
from steertune.recipes.serving.schema import GenerationRequest
from steertune.recipes.serving.vectors import Vector, Vectors
from steertune.recipes.serving.worker import Worker

_STRIDE = 0x9E3779B97F4A7C15  # distance between the seeds of one request's choices


class Call:
    """The answers to one request.

    Args:
        vectors: Holds the versions that the request names.
        steering: Its vectors.
        finished: Called once, on the engine's thread, when all answers have ended.

    Raises:
        ArmError: it names an unknown vector, or a strength that is too large.
    """

    def __init__(self, vectors: Vectors, steering: Sequence[Steering], finished: Callable[[], None]) -> None:
        for one in steering:
            vectors.check(one.vector, one.strength)
        self.jobs: list[Job] = []
        self.held: list[Vector] = vectors.hold([one.vector for one in steering])
        self.row = tuple(
            RowVector(vector.adapter, one.strength, one.positions)
            for vector, one in zip(self.held, steering, strict=True)
        )
        self._vectors, self._finished = vectors, finished
        self._open = 0
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def start(self, worker: Worker, jobs: Sequence[dict[str, Any]]) -> None:
        """Submit the jobs to the engine.

        Args:
            worker: Of the engine.
            jobs: Arguments of each answer's `Job`, without listener and vectors.

        Raises:
            QueueFull: there is no room for all of them.
        """
        self.jobs = [Job(**job, listener=partial(self._hear, i), vectors=self.row) for i, job in enumerate(jobs)]
        self._open = len(self.jobs)
        try:
            worker.submit(self.jobs)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the vectors of a call that was never started."""
        self._vectors.release(self.held)
        self._finished()

    def cancel(self) -> None:
        """Cancel the answers: the client no longer waits for them."""
        for job in self.jobs:
            job.cancelled = True

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of every answer, with the answer's number, until all are complete."""
        remaining = len(self.jobs)
        while remaining:
            number, event = await self._events.get()
            yield number, event
            remaining -= isinstance(event, Done | Failed)

    def _hear(self, number: int, event: Event) -> None:
        """Called on the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
        if isinstance(event, Done | Failed):
            self._open -= 1
            if not self._open:
                self.close()


def samplings(body: GenerationRequest) -> list[Sampling]:
    """How the tokens of each of `n` answers are drawn; the first one with the seed of the request."""
    seed = random.SystemRandom().getrandbits(63) if body.seed is None else body.seed
    return [
        Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=seed if number == 0 else (seed + number * _STRIDE) % 2**63,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            logit_bias=body.logit_bias or {},
        )
        for number in range(body.n or 1)
    ]
