"""The page for browsers: a prompt, a slider for each vector's strength, and the answers of both models. It is one
static file that calls the service like any other client, and loads nothing from other sites.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_PAGE = Path(__file__).with_suffix(".html")


def explorer_route() -> APIRouter:
    """`GET /`."""
    page = _PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": policy(page), "X-Content-Type-Options": "nosniff"}
    router = APIRouter()

    @router.get("/")
    async def explorer() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return router


def policy(page: str) -> str:
    """What browsers allow the page to do: run its inline script, and call this service."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
