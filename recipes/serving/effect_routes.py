"""Monitors and the effects of steering over HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from steertune.adapters.monitors import Monitor
from steertune.adapters.rows import RowVector
from steertune.recipes.lab.files import ArmError
from steertune.recipes.serving.bodies import read_body
from steertune.recipes.serving.effects import Effect, TokenRow, effects, neutral_rows, summary
from steertune.recipes.serving.errors import ApiError
from steertune.recipes.serving.limits import read_prompt
from steertune.recipes.serving.names import BASE, Steering, combined, read_model_name
from steertune.recipes.serving.schema import ChatMessage
from steertune.recipes.serving.service import Service


class EffectRequest(BaseModel, extra="forbid"):
    """`POST /v1/effects`: the effect of steering on an answer, or without one on neutral text.

    Attributes:
        model: As in completions.
        steering: As in completions.
        messages: The prompt for a chat model.
        prompt: The prompt as text, instead of `messages`.
        answer: The text that follows the prompt.
        monitors: Names of monitors that score its tokens.
    """

    model: str = BASE
    steering: list[Steering] = Field(default=[], max_length=32)
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    prompt: str | None = None
    answer: str | None = Field(default=None, min_length=1)
    monitors: list[str] = Field(default=[], max_length=32)


def effect_routes(service: Service) -> APIRouter:
    """`/v1/effects` and `/v1/monitors`."""
    router = APIRouter(prefix="/v1")

    @router.get("/monitors")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [facts(name, one) for name, one in service.monitors.items()]}

    @router.post("/effects")
    async def measured(request: Request) -> dict[str, Any]:
        body = await read_body(request, service, EffectRequest)
        try:
            steering = combined(
                read_model_name(body.model, service.settings.name, [*service.vectors.named]), body.steering
            )
            service.watching(body.monitors)
            rows = await service.in_reader(lambda: _rows(service, body))
            measurements = await _measure(service, rows, steering, body.monitors)
        except ArmError as error:
            raise ApiError(400, str(error)) from error
        tokens = {} if body.answer is None else _tokens(service, measurements[0])
        return {"object": "effect", **summary(measurements)} | tokens

    return router


def facts(name: str, monitor: Monitor) -> dict[str, Any]:
    """The description of a monitor."""
    threshold = None if monitor.threshold is None else asdict(monitor.threshold)
    place = {"layer": monitor.layer, "site": monitor.site, "tokens": monitor.tokens}
    how = {"method": monitor.method, "pooling": monitor.pooling.name, "threshold": threshold}
    return {"id": name, "object": "monitor", **how, **place}


def _rows(service: Service, body: EffectRequest) -> list[TokenRow]:
    """The texts to read.

    Raises:
        ArmError: the request has no single prompt with an answer, or the text exceeds the model's context.
    """
    given = [name for name in ("messages", "prompt", "answer") if getattr(body, name) is not None]
    if not given:
        return neutral_rows(service.tokenizer)
    if body.answer is None or len(given) != 2:
        raise ArmError(
            f"Got {' and '.join(given)}. Give messages or prompt, and answer; or none of them, for neutral text."
        )
    prompt = body.prompt if body.messages is None else [message.as_text() for message in body.messages]
    ids = read_prompt(service.tokenizer, prompt)
    answer = service.tokenizer(body.answer, add_special_tokens=False)["input_ids"]
    if not answer:
        raise ArmError("answer has no tokens, so nothing can be measured.")
    service.limits.check(ids, len(answer), "answer")
    return [(ids, answer)]


async def _measure(
    service: Service, rows: list[TokenRow], steering: list[Steering], monitors: list[str]
) -> list[Effect]:
    for one in steering:
        service.vectors.check(one.vector, one.strength)
    held = service.vectors.hold([one.vector for one in steering])
    vectors = [
        RowVector(vector.adapter, one.strength, one.positions) for vector, one in zip(held, steering, strict=True)
    ]
    engine = service.worker.engine
    try:
        return await asyncio.wrap_future(service.worker.call(lambda: effects(engine, rows, vectors, monitors)))
    finally:
        service.vectors.release(held)


def _tokens(service: Service, effect: Effect) -> dict[str, Any]:
    """The text of each token, with its measurements."""
    tokens = []
    for i in range(len(effect.tokens)):
        before = service.tokenizer.decode(effect.tokens[:i])
        text = service.tokenizer.decode(effect.tokens[: i + 1])[len(before) :]
        tokens.append({"token": text, "base": effect.base[i], "steered": effect.steered[i], "kl": effect.kl[i]})
        tokens[-1]["monitors"] = {name: scores[i] for name, scores in effect.scores.items()}
    return {"answer": tokens}
