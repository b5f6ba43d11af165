"""Errors in the format of OpenAI's protocol, which its clients turn into their own exceptions."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: HTTP status.
        code: A machine-readable code, or None.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The error as an answer to a request."""
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse(self.body, self.status, headers)
