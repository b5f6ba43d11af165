"""The thread that runs the engine, and the queue in front of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from steertune.recipes.serving.defaults import QUEUE
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.jobs import Job
from steertune.recipes.serving.vectors import Vectors

T = TypeVar("T")


class QueueFull(Exception):
    """More answers are waiting than the queue allows."""


class Stopped(Exception):
    """The engine's thread has ended, or is ending."""


class Worker:
    """Runs an engine on a separate thread. Its methods can be called from any other thread.

    Args:
        engine: The engine; from now on only this thread can use it.
        queue: Maximum number of waiting answers.
    """

    def __init__(self, engine: Engine, queue: int = QUEUE) -> None:
        self.engine, self.queue = engine, queue
        self.error: BaseException | None = None
        """The unexpected error that ended the thread, if there was one."""
        self._inbox: deque[Callable[[], None]] = deque()
        self._submitted = 0  # jobs in the inbox
        self._news = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def vectors(self) -> Vectors:
        """The vectors of the engine."""
        return self.engine.vectors

    @property
    def waiting(self) -> int:
        """Number of waiting answers."""
        return self.engine.waiting + self._submitted

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of these jobs, or none of them.

        Raises:
            QueueFull: there is no room.
            Stopped: the service has stopped.
        """
        with self._news:
            if self._stopping or self.error is not None:
                raise Stopped("The server has stopped. Start it again.")
            if self.waiting + len(jobs) > self.queue:
                raise QueueFull(
                    f"{self.waiting} answers are waiting, but the queue takes {self.queue} (--queue). Try again later."
                )
            self._submitted += len(jobs)
            self._inbox.append(lambda: self._take(jobs))
            self._news.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two steps, when it can change the model."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._news:
            if self._stopping or self.error is not None:
                future.set_exception(Stopped("The server has stopped. Start it again."))
                return future
            self._inbox.append(run)
            self._news.notify()
        return future

    def stop(self) -> None:
        """End the thread after its current step; incomplete answers fail."""
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join()

    def _take(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._submitted -= 1
            try:
                self.engine.submit(job)
            except Exception as error:  # a bad job must not end the thread
                job.fail(f"It cannot be answered: {type(error).__name__}: {error}")

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self.engine.give_up("The server is stopping.")
        except BaseException as error:
            self.error = error
            self.engine.give_up(f"The server failed: {type(error).__name__}: {error}")
            raise

    def _turn(self) -> None:
        """Run the waiting calls, then one step."""
        with self._news:
            while not (self._inbox or self._stopping or self.engine.busy):
                self._news.wait()
            calls: list[Callable[[], Any]] = [*self._inbox]
            self._inbox.clear()
        for call in calls:
            call()
        if self.engine.busy and not self._stopping:
            self.engine.step()
        if self.vectors.unused:
            self.vectors.sweep()
