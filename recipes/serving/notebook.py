"""The explorer inside a notebook: a frame around the page of a server that runs in the notebook's own process."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

FRAMES = ("'self'", "http://localhost:*", "http://127.0.0.1:*", "https://localhost:*", "vscode-webview:")
"""Pages that may frame the explorer once it is shown in a notebook: those of this machine, and Visual Studio Code."""


@dataclass(frozen=True)
class Explorer:
    """What a cell of a notebook shows as the explorer; printed, it is the page's address.

    Attributes:
        url: Of the page, with prompt and strengths.
        height: Of the frame, in pixels.
    """

    url: str
    height: int = 720

    def _repr_html_(self) -> str:
        """What notebooks ask a value for."""
        size = f'width="100%" height="{self.height:d}"'
        return f'<iframe src="{escape(self.url)}" {size} style="border: 0" title="Explorer"></iframe>'

    def __str__(self) -> str:
        return self.url
