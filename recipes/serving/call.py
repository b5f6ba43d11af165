"""One running request of OpenAI's protocol: its jobs, and their events for the event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from steertune.adapters.monitors import Monitor
from steertune.adapters.rows import RowVector
from steertune.recipes.serving.gating import Attempts, Gate, LiveWatch
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
        steering: The request's vectors.
        finished: Called once, on the engine's thread, when all answers have ended.
        gate: What happens to answers that a monitor flags.

    Raises:
        ArmError: the request names an unknown vector, or a strength that is too large.
    """

    def __init__(
        self,
        vectors: Vectors,
        steering: Sequence[Steering],
        finished: Callable[[], None],
        gate: tuple[Gate, Monitor] | None = None,
    ) -> None:
        remedy = [] if gate is None else gate[0].steering
        for one in (*steering, *remedy):
            vectors.check(one.vector, one.strength)
        self.jobs: list[Job] = []
        self.held: list[Vector] = vectors.hold([one.vector for one in (*steering, *remedy)])
        rows = [
            RowVector(vector.adapter, one.strength, one.positions)
            for vector, one in zip(self.held, (*steering, *remedy), strict=True)
        ]
        self.row, self._remedy = tuple(rows[: len(steering)]), tuple(rows[len(steering) :])
        self._gate = gate
        self._cancelled = False
        self._vectors, self._finished = vectors, finished
        self._open = self.choices = 0
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def start(self, worker: Worker, jobs: Sequence[dict[str, Any]]) -> None:
        """Submit the jobs to the engine.

        Args:
            worker: The worker of the engine.
            jobs: Arguments of each answer's `Job`, without listener and vectors.

        Raises:
            QueueFull: there is no room for all of them.
        """
        self.jobs = [self._job(worker, partial(self._hear, i), job) for i, job in enumerate(jobs)]
        self._open = self.choices = len(self.jobs)
        try:
            worker.submit(self.jobs)
        except BaseException:
            self.close()
            raise

    def _job(self, worker: Worker, listener: Callable[[Event], None], job: dict[str, Any]) -> Job:
        """The job of a choice, watched if there is a gate."""
        made = Job(**job, listener=listener, vectors=self.row)
        if self._gate is None:
            return made
        gate, monitor = self._gate
        if gate.action in ("stop", "steer"):
            made.watch = LiveWatch(gate, monitor, self._remedy)
            return made

        def submit(again: Job) -> None:  # on the engine's thread
            self.jobs.append(again)
            again.cancelled = self._cancelled
            worker.engine.submit(again)

        return Attempts(gate, monitor, self._remedy, listener, submit).first(made)

    def close(self) -> None:
        """Release the vectors of a call that was never started."""
        self._vectors.release(self.held)
        self._finished()

    def cancel(self) -> None:
        """Cancel all answers, since the client no longer waits for them."""
        self._cancelled = True
        for job in [*self.jobs]:
            job.cancelled = True

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of every answer, with its number, until all are complete."""
        remaining = self.choices
        while remaining:
            number, event = await self._events.get()
            yield number, event
            remaining -= isinstance(event, Done | Failed)

    def _hear(self, number: int, event: Event) -> None:
        """Pass an event of the engine to the event loop; called on the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
        if isinstance(event, Done | Failed):
            self._open -= 1
            if not self._open:
                self.close()


def samplings(body: GenerationRequest) -> list[Sampling]:
    """The sampling parameters of each of `n` answers; the first one uses the seed of the request."""
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
