"""A tiny model behind the HTTP service, on a port of this machine, while a test runs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_data
import uvicorn
from tiny_models import steered, tiny

from steertune.recipes.serving.app import create_app
from steertune.recipes.serving.loading import load_vectors
from steertune.recipes.serving.service import Service, Settings

SIZES = dict(max_position_embeddings=128, vocab_size=len(tiny_data.SPECIAL + tiny_data.WORDS))


def save_home(home: Path) -> Path:
    """Save a base with a tokenizer and the vectors `careful` and `warm`."""
    base = tiny(**SIZES)
    base.save_pretrained(home / "base")
    tiny_data.tokenizer().save_pretrained(home / "base")
    for name, switches in (("careful", dict(layers=[1, 2])), ("warm", dict(layers=3, norm="capped", norm_value=4.0))):
        save_vector(home, name, len(name), **switches)
    return home


def save_vector(home: Path, name: str, seed: int, **switches: Any) -> Path:
    """Save one more vector of that base."""
    model = steered(tiny(**SIZES), seed=seed, **switches)
    model.peft_config["default"].base_model_name_or_path = str(home / "base")
    model.save_pretrained(home / name)
    return home / name


@dataclass
class Running:
    """A service that answers.

    Attributes:
        url: Of it, without `/v1`.
        service: What answers.
    """

    url: str
    service: Service


@contextmanager
def running(home: Path, **settings: Any) -> Iterator[Running]:
    """Serve the vectors `careful` and `warm`."""
    vectors, tokenizer = load_vectors({name: home / name for name in ("careful", "warm")})
    service = Service(vectors, tokenizer, Settings(**{"name": "tiny", "batch": 4, **settings}))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(create_app(service), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service)
        finally:
            server.should_exit = True
            thread.join()
