"""Responses to the client: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request

from steertune.recipes.serving.answers import Choice, usage
from steertune.recipes.serving.errors import ApiError
from steertune.recipes.serving.jobs import Done, Failed, Gated, Piece, Prompt, Watched
from steertune.recipes.serving.service import Started

_LOOK = 0.5  # seconds between checks that the client is still connected


async def whole(started: Started, request: Request) -> dict[str, Any]:
    """The whole answer, once it is complete.

    Raises:
        ApiError: an answer failed, or the client disconnected.
    """
    choices = [Choice() for _ in range(started.call.choices)]
    gathering = asyncio.ensure_future(_gather(started, choices))
    try:
        while not (await asyncio.wait({gathering}, timeout=_LOOK))[0]:
            if await request.is_disconnected():
                raise ApiError(499, "The client closed the connection.")
        gathering.result()
    finally:
        gathering.cancel()
        started.call.cancel()
    for choice in choices:
        if choice.failure is not None:
            raise failure(choice.failure)
    return started.form.answer(choices, usage(started.prompts, choices))


async def stream(started: Started, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a chunk for every piece of text, and `[DONE]`."""
    form, choices = started.form, [Choice() for _ in range(started.call.choices)]
    try:
        for number in range(len(choices)):
            if opening := form.opening(number):
                yield _event(form.part(opening))
        async for number, event in started.call.events():
            choices[number].hear(event)
            if isinstance(event, Failed):
                yield _event(failure(event).body)
                return
            if isinstance(event, Done):
                last = form.delta(number, "", (), event.reason) | form.readings(choices[number], False)
                yield _event(form.part([last]))
            elif isinstance(event, Watched):
                scores = {name: {"tokens": [*new]} for name, new in event.scores.items()}
                yield _event(form.part([form.delta(number, "", ()) | {"monitors": scores}]))
            elif isinstance(event, Gated):
                yield _event(form.part([form.delta(number, "", ()) | {"gate": dict(event.details)}]))
            elif event.scores or (isinstance(event, Piece) and event.text):
                text = "" if isinstance(event, Prompt) else event.text
                yield _event(form.part([form.delta(number, text, event.scores)]))
        if with_usage:
            yield _event(form.part([], usage(started.prompts, choices)))
        yield "data: [DONE]\n\n"
    finally:  # also when the client has disconnected
        started.call.cancel()


def failure(failed: Failed) -> ApiError:
    """The error of a failed answer."""
    status, code = {"late": (504, "timeout"), "request": (400, "no_answer"), "server": (500, "no_answer")}[failed.kind]
    return ApiError(status, failed.message, code)


async def _gather(started: Started, choices: list[Choice]) -> None:
    async for number, event in started.call.events():
        choices[number].hear(event)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
