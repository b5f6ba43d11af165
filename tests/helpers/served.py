"""A tiny model behind the HTTP service, on a port of this machine, while a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny_data
from live_monitors import monitor_of
from tiny_models import steered, tiny

from steertune.recipes.serving.http import HttpServer
from steertune.recipes.serving.loading import load_vectors

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


@contextmanager
def running(home: Path, **settings: Any) -> Iterator[HttpServer]:
    """Serve the vectors `careful` and `warm`, with the monitors `odd`, which reads below them, and `late`."""
    vectors, tokenizer = load_vectors({name: home / name for name in ("careful", "warm")})
    readers = {"odd": monitor_of(vectors.model, tokenizer), "late": monitor_of(vectors.model, tokenizer, layer=2)}
    with HttpServer(vectors, tokenizer, monitors=readers, **{"name": "tiny", "batch": 4, **settings}) as server:
        yield server
