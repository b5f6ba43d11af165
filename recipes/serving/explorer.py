"""The page for browsers: a prompt, sliders for the vectors' strengths, and the answers of both models.

It is one static page that calls the service like any other client. It loads nothing from other servers; its parts are
in `page/` and are joined when the service starts.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from steertune.recipes.serving.service import Service

_PARTS = Path(__file__).parent / "page"
NONE = "'none'"
_SCRIPTS = ("curves", "sliders", "answers", "effects", "labels")  # in the order in which they run


def explorer_route(service: Service) -> APIRouter:
    """`GET /`."""
    page = whole_page()
    router = APIRouter()

    @router.get("/")
    async def explorer() -> HTMLResponse:
        rules = policy(page, service.frames)
        return HTMLResponse(page, headers={"Content-Security-Policy": rules, "X-Content-Type-Options": "nosniff"})

    return router


def whole_page() -> str:
    """The page with its scripts."""
    scripts = [(_PARTS / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    page = (_PARTS / "page.html").read_text(encoding="utf-8")
    return page.replace("/* script */", '"use strict";\n' + "\n".join([*scripts, "start();"]))


def policy(page: str, frames: Sequence[str] = ()) -> str:
    """The content security policy: the page can only run its inline script and call this service, and only the pages
    in `frames` can embed it (by default none: another page could make a visitor click on what it covers)."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        f"base-uri 'none'; form-action 'none'; frame-ancestors {' '.join(frames) or NONE}"
    )
