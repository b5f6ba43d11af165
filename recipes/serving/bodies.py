"""Request bodies: JSON of limited size, validated before any work."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from steertune.recipes.lab.files import reasons
from steertune.recipes.serving.errors import ApiError
from steertune.recipes.serving.service import Service

M = TypeVar("M", bound=BaseModel)
LARGEST = 2**24
_LONGEST_MESSAGE = 1000


async def read_body(request: Request, service: Service, model: type[M], largest: int = LARGEST) -> M:
    """The body of a request.

    Raises:
        ApiError: it is too large, not JSON, or fails validation.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # browsers let any website send the simpler content types without a preflight request
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind!r:.80}. Send application/json.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > largest:
            raise ApiError(413, f"The request is larger than {largest} bytes. Send fewer or shorter prompts.")
    try:
        return await service.in_reader(lambda: model.model_validate_json(bytes(body)))
    except ValidationError as error:
        raise ApiError(400, f"{reasons(error):.{_LONGEST_MESSAGE}}") from error
