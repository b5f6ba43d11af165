"""HTTP routes to list, add, replace and remove vectors while the service runs."""

from __future__ import annotations

import asyncio
import base64
import binascii
import tempfile
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import BaseModel

from steertune.recipes.lab.files import ArmError, shown
from steertune.recipes.serving.bodies import read_body
from steertune.recipes.serving.errors import ApiError
from steertune.recipes.serving.pair_training import PairTraining, train_vector
from steertune.recipes.serving.service import Service
from steertune.recipes.serving.vectors import Vector

_LARGEST = 2**27
_SWITCHES = ("form", "layers", "site", "norm", "positions")


class NewVector(BaseModel, extra="forbid"):
    """`PUT /v1/vectors/NAME`: a folder below that of `--vectors-in`, or the files in base64."""

    folder: str | None = None
    files: dict[Literal["adapter_config.json", "adapter_model.safetensors"], str] | None = None


def vector_routes(service: Service) -> APIRouter:
    """The routes under `/v1/vectors`."""
    router = APIRouter(prefix="/v1/vectors")

    @router.get("")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [facts(vector) for vector in service.vectors.named.values()]}

    @router.put("/{name}")
    async def put(name: str, request: Request) -> dict[str, Any]:
        new = await read_body(request, service, NewVector, _LARGEST)
        if (new.folder is None) == (new.files is None):
            raise ApiError(400, "Give either folder or files.")
        try:
            if new.folder is not None:
                vector = await _add(service, name, _inside(service, new.folder))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    _write(Path(folder), new.files or {})
                    vector = await _add(service, name, Path(folder))
        except ArmError as error:
            raise ApiError(400, str(error)) from error
        return facts(vector)

    @router.post("/{name}/train")
    async def train(name: str, request: Request) -> dict[str, Any]:
        body = await read_body(request, service, PairTraining)
        vectors, tokenizer = service.vectors, service.worker.engine.tokenizer
        try:
            vector, seconds = await asyncio.wrap_future(
                service.worker.call(lambda: train_vector(vectors, tokenizer, name, body))
            )
        except ArmError as error:
            raise ApiError(400, str(error)) from error
        return {**facts(vector), "seconds": seconds}

    @router.delete("/{name}")
    async def delete(name: str) -> dict[str, Any]:
        try:
            await asyncio.wrap_future(service.worker.call(lambda: service.vectors.remove(name)))
        except ArmError as error:
            raise ApiError(404, str(error)) from error
        return {"id": name, "object": "vector", "deleted": True}

    return router


def facts(vector: Vector) -> dict[str, Any]:
    """The description of a vector."""
    switches = {name: getattr(vector.config, name) for name in _SWITCHES}
    named = {"id": vector.name, "object": "vector", "digest": vector.digest}
    return {**named, "strength": vector.strength, **switches}


async def _add(service: Service, name: str, folder: Path) -> Vector:
    return await asyncio.wrap_future(service.worker.call(lambda: service.vectors.add(name, folder)))


def _inside(service: Service, folder: str) -> Path:
    """The path of a folder that a request wants to load.

    Raises:
        ApiError: it is not below the folder of `--vectors-in`.
    """
    root = service.settings.folder
    if root is None:
        raise ApiError(
            403, "Folders on the server are not read. Send the files, or start the server with --vectors-in FOLDER."
        )
    try:
        path = (root / folder).resolve()
    except (OSError, ValueError) as error:
        raise ApiError(400, f"folder={shown(folder)} is not a path: {error}") from error
    if not path.is_relative_to(root.resolve()):
        raise ApiError(403, f"folder={shown(folder)} must lie below the folder of --vectors-in.")
    return path


def _write(folder: Path, files: dict[Any, str]) -> None:
    """Write the files of an adapter.

    Raises:
        ArmError: one is missing, or not in base64.
    """
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if name not in files:
            raise ArmError(f"files lacks {name!r}.")
        try:
            (folder / name).write_bytes(base64.b64decode(files[name], validate=True))
        except (binascii.Error, ValueError) as error:
            raise ArmError(f"files: {name} is not in base64: {error}") from error
