"""The highest mean over a window of tokens (McKenzie et al. 2506.10805: max of rolling means)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._base import Pooling


@dataclass(frozen=True)
class RollingMean(Pooling):
    """`max over t of mean(s_t ... s_(t+window-1))`: a bad passage is enough, a single odd token is not.

    Args:
        window: Tokens of a window; a row with fewer has one window.

    Raises:
        ValueError: `window` is below 1.
    """

    window: int = 10

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1.")

    def __call__(self, scores_T: Tensor) -> Tensor:
        """`(tokens,)` -> `()`."""
        width = min(self.window, len(scores_T))
        return scores_T.unfold(0, width, 1).mean(dim=1).max()
