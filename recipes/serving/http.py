"""Start the HTTP service on a port, as a command or in the background of a Python program."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

from steertune.adapters.monitors import Monitor
from steertune.recipes.lab.files import ArmError
from steertune.recipes.serving.defaults import LOOPBACK
from steertune.recipes.serving.notebook import FRAMES, Explorer
from steertune.recipes.serving.vectors import Vectors

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_LOCAL = ("localhost", LOOPBACK, "[::1]")


def listen(host: str, port: int) -> socket.socket:
    """Bind the port before the model is loaded.

    Raises:
        ArmError: a package is missing, or the port cannot be bound.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ArmError(f"--port needs {', '.join(missing)}: pip install 'steertune[serve]'")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ArmError(f"--host {host} --port {port} is not available: {error}. Choose another.") from error


class HttpServer:
    """A service with its address.

    Args:
        vectors: The model and its vectors (see `load_vectors`).
        tokenizer: The model's tokenizer.
        listening: The socket to listen on, made by `listen`; None: a free port of this machine.
        host: The address of the socket as it was given.
        monitors: Name -> a monitor that requests can use.
        settings: Fields of `Settings`.
    """

    def __init__(
        self,
        vectors: Vectors,
        tokenizer: Any,
        listening: socket.socket | None = None,
        host: str = LOOPBACK,
        monitors: Mapping[str, Monitor] | None = None,
        **settings: Any,
    ) -> None:
        self._listening = listening or listen(host, 0)
        import uvicorn

        from steertune.recipes.serving.app import create_app
        from steertune.recipes.serving.service import Service, Settings

        given = Settings(**{"name": model_name(vectors.model), **settings})
        # a website can make a browser call this machine, but not under one of these names
        self.service = Service(
            vectors, tokenizer, replace(given, hosts=(*_LOCAL, host) if is_loopback(host) else None), monitors
        )
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._listening.getsockname()[1]}"
        """The service's URL; OpenAI's clients need it with `/v1` appended."""
        config = uvicorn.Config(
            create_app(self.service), log_level="warning", access_log=False, timeout_graceful_shutdown=5
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.run, name="http", daemon=True)

    def run(self) -> None:
        """Serve until the process is interrupted, or `stop` is called."""
        with self._listening:
            self._server.run(sockets=[self._listening])

    def start(self) -> HttpServer:
        """Serve on a separate thread, and return once requests are accepted."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop the thread of `start`; running answers have five seconds to complete."""
        self._server.should_exit = True
        self._thread.join()

    def explorer(self, prompt: str = "", strengths: Mapping[str, float] | None = None, height: int = 720) -> Explorer:
        """The page for a cell of a notebook; from now on, pages of this machine may frame it.

        Args:
            prompt: Answered at once.
            strengths: Name of a vector -> where its slider stands.
            height: Of the frame, in pixels.

        Raises:
            ArmError: there is no such vector.
        """
        for name in strengths or {}:
            if name not in self.service.vectors.named:
                raise ArmError(f"vector {name!r:.80} is none of {sorted(self.service.vectors.named)}.")
        self.service.frames = FRAMES
        words = urlencode({"prompt": prompt, **(strengths or {})} if prompt or strengths else {})
        return Explorer(f"{self.url}/#{words}" if words else self.url, height)

    def __enter__(self) -> HttpServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()


def serve_http(
    vectors: Vectors,
    tokenizer: Any,
    listening: socket.socket,
    host: str,
    key: str | None,
    monitors: Mapping[str, Monitor],
    settings: dict[str, Any],
) -> int:
    """Print the service's URL, and serve until the process is interrupted.

    Args:
        vectors: The model and its vectors.
        tokenizer: The model's tokenizer.
        listening: The socket to listen on.
        host: The address of the socket as it was given.
        key: The key that requests must send; None or empty: no key is needed.
        monitors: The monitors that requests can name.
        settings: Further fields of `Settings`.
    """
    server = HttpServer(vectors, tokenizer, listening, host, monitors, key=key or None, **settings)
    names = ", ".join(vectors.named) or "none yet"
    print(f"{server.service.settings.name} at {server.url}/v1, vectors: {names}", file=sys.stderr, flush=True)
    print(f"In a browser: {server.url}", file=sys.stderr, flush=True)
    if not is_loopback(host) and not key:
        print(
            "Other machines can reach it, and no key is required. Set STEERTUNE_API_KEY to require one.",
            file=sys.stderr,
        )
    server.run()
    return 0


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def model_name(model: Any) -> str:
    """The name of a base model: its name on the Hub, or that of its folder."""
    path = str(model.config.name_or_path or "model")
    return Path(path).resolve().name if Path(path).is_dir() else path
