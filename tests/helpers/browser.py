"""A real browser without a window, driven over its own protocol (Chrome DevTools)."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One page. Needs `CHROMIUM`."""

    def __init__(self, width: int = 1100, height: int = 800) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                *options,
                f"--window-size={width},{height}",
                f"--user-data-dir={self._profile.name}",
                "about:blank",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        port = None
        while port is None and (line := self._process.stderr.readline()):
            port = (re.search(r"ws://127\.0\.0\.1:(\d+)/", line) or [None, None])[1]
        self._loop = asyncio.new_event_loop()
        self._number = 0
        self.messages: list[str] = []
        """What the page wrote to its console, and its errors."""
        self._loop.run_until_complete(self._connect(f"http://127.0.0.1:{port}"))

    async def _connect(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        page = None
        while page is None:
            async with self._session.get(f"{url}/json") as reply:
                page = next((one for one in await reply.json() if one["type"] == "page"), None)
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Log"):
            await self._call(f"{domain}.enable", {})

    async def _call(self, method: str, parameters: dict[str, Any]) -> Any:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(timeout=60)).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.messages.append(json.dumps(message["params"])[:500])

    def call(self, method: str, **parameters: Any) -> Any:
        """A command of the protocol."""
        return self._loop.run_until_complete(self._call(method, parameters))

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, (condition, self.run("document.body.innerText"), self.messages)
            time.sleep(0.05)

    def press(self, key: str, code: int) -> None:
        """A key, where the focus is."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, file: Path) -> None:
        """A picture of the page."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait()
        self._profile.cleanup()
