"""Start the HTTP service on a port of this machine."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from steertune.recipes.lab.files import ArmError
from steertune.recipes.serving.vectors import Vectors

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


def listen(host: str, port: int) -> closing[socket.socket]:
    """Take the port, before anything long is loaded.

    Raises:
        ArmError: a package is missing, or the port cannot be taken.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ArmError(f"--port needs {', '.join(missing)}: pip install 'steertune[serve]'")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return closing(socket.create_server((host, port), family=family))
    except (OSError, OverflowError, UnicodeError) as error:
        raise ArmError(f"--host {host} --port {port} cannot be listened on: {error}. Choose another.") from error


def serve_http(
    vectors: Vectors, tokenizer: Any, listening: socket.socket, host: str, key: str | None, settings: dict[str, Any]
) -> int:
    """Serve until the process is interrupted.

    Args:
        vectors: The model and its vectors.
        tokenizer: Of the model.
        listening: Where requests come from.
        host: The address of it as it was given.
        key: What requests have to know; None or empty: nothing.
        settings: Further fields of `Settings`.
    """
    import uvicorn

    from steertune.recipes.serving.app import create_app
    from steertune.recipes.serving.service import Service, Settings

    local = is_loopback(host)
    hosts = (*_LOCAL, host) if local else None
    service = Service(
        vectors, tokenizer, Settings(name=model_name(vectors.model), key=key or None, hosts=hosts, **settings)
    )
    port = listening.getsockname()[1]
    shown_host = f"[{host}]" if ":" in host else host
    names = ", ".join(vectors.named) or "none yet"
    print(f"{service.settings.name} at http://{shown_host}:{port}/v1, vectors: {names}", file=sys.stderr, flush=True)
    if not local and not key:
        print("Other machines can ask it, without a key. Set STEERTUNE_API_KEY to require one.", file=sys.stderr)
    config = uvicorn.Config(create_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def model_name(model: Any) -> str:
    """What a base model is called: its name on the Hub, or that of its folder."""
    path = str(model.config.name_or_path or "model")
    return Path(path).resolve().name if Path(path).is_dir() else path
