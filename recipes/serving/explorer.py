"""The page for browsers: a prompt, sliders for the vectors' strengths, and the answers of both models.

It is one static page that calls the service like any other client. It loads nothing from other servers; its parts are
in `page/` and are joined when the service starts.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from steertune.recipes.serving.service import Service

_PARTS = Path(__file__).parent / "page"
_SCRIPTS = ("curves", "sliders", "answers", "effects", "labels")  # in the order in which they run


def explorer_route(service: Service) -> APIRouter:
    """`GET /`."""
    page = whole_page()
    rules = policy(page)
    router = APIRouter()

    @router.get("/")
    async def explorer() -> HTMLResponse:
        frames = f"frame-ancestors {' '.join(service.frames)}"
        headers = {"Content-Security-Policy": f"{rules}; {frames}", "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page, headers=headers)

    return router


def whole_page() -> str:
    """The page with its scripts."""
    scripts = [(_PARTS / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    page = (_PARTS / "page.html").read_text(encoding="utf-8")
    return page.replace("/* script */", '"use strict";\n' + "\n".join([*scripts, "start();"]))


def policy(page: str) -> str:
    """The content security policy of the page itself: it can only run its inline script, and call this service."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    )
