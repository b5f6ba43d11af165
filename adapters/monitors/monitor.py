"""A monitor: a direction that is read while a model runs, how token scores are pooled, and when to flag a row.

Shapes: T tokens of a row, D width of the residual stream.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ..blocks import find_blocks, resolve_layers, site_name
from ..fingerprint import fingerprint
from ..observing import base_model
from ..types import Site
from . import fits
from .pooling import Pooling
from .reading import Tokens
from .threshold import MonitorError, Threshold


@dataclass(frozen=True)
class Calibration:
    """Map a score to a probability: `σ(slope · score + intercept)` (Platt scaling).

    Attributes:
        slope: The factor of the score.
        intercept: The logit at score 0.
        share: The share of bad rows it was fitted on, which is the prior of the probability.
    """

    slope: float
    intercept: float
    share: float

    def __call__(self, score: float, share: float | None = None) -> float:
        """The probability that a row is bad.

        Args:
            score: Its score.
            share: The share of bad rows in the traffic; None for that of the rows that it was fitted on.
        """
        odds = self.slope * score + self.intercept
        if share is not None:
            odds += math.log(share / (1 - share)) - math.log(self.share / (1 - self.share))
        return float(torch.tensor(odds).sigmoid())


@dataclass(frozen=True)
class Monitor:
    """A linear monitor of one place in a model.

    The score of a token with state h is `h · weight + bias`. The innocent rows of the fit have mean 0 and standard
    deviation 1. The score of a row is pooled over the tokens that are read.

    Attributes:
        method: How the direction was fitted: a file of `fits/`.
        pooling: How the scores of tokens are combined into that of a row.
        layer: Index of the block.
        site: The site that is read, as in `SteeringVectorConfig`.
        module: Full name of the module whose output is read.
        tokens: Which tokens of a row are read.
        weight: `(d,)`, fp32.
        bias: Added to every token's score.
        base: Fingerprint of the base model.
        base_name: Name of the base model.
        tokenizer: The identity of the tokenizer (`tokenizer_print`).
        threshold: The score above which a row is flagged; None if none was chosen.
        calibration: Maps a score to a probability; None if it was not fitted.
        fitted_on: How many `bad` and `innocent` rows it was fitted on.
    """

    method: str
    pooling: Pooling
    layer: int
    site: Site
    module: str
    tokens: Tokens
    weight: Tensor
    bias: float
    base: dict[str, Any]
    base_name: str
    tokenizer: dict[str, str]
    threshold: Threshold | None = None
    calibration: Calibration | None = None
    fitted_on: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight.ndim != 1 or not torch.isfinite(self.weight).all() or not self.weight.any():
            raise MonitorError(
                f"The direction of a monitor must be a finite vector other than zero (got shape "
                f"{tuple(self.weight.shape)}, length {float(self.weight.norm()):g}). Are all rows the same?"
            )

    def token_scores(self, h_BTD: Tensor) -> Tensor:
        """The score of every token of these states, `(rows, tokens)`, fp32, on the CPU."""
        return (h_BTD.float() @ self.weight.to(h_BTD.device) + self.bias).cpu()

    def pool(self, scores: Tensor) -> float:
        """The score of a row, from the scores of its tokens `(tokens,)`.

        Raises:
            MonitorError: the row has no token that is read.
        """
        if not len(scores):
            raise MonitorError("A row has no token to read, so it has no score. Drop empty rows.")
        return float(self.pooling(scores))

    def flags(self, score: float) -> bool:
        """Whether a row with this score is flagged.

        Raises:
            MonitorError: the monitor has no threshold.
        """
        if self.threshold is None:
            raise MonitorError("This monitor has no threshold. Choose one on innocent rows: `choose_threshold`.")
        return score > self.threshold.value


def tokenizer_print(tokenizer: Any) -> dict[str, str]:
    """The identity of a tokenizer: its name, and digests of its vocabulary and of its chat template."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    texts = {"vocabulary": vocabulary, "chat_template": json.dumps(tokenizer.chat_template)}
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}
    return {"name": str(tokenizer.name_or_path), **digests}


def standardised(direction: Tensor, innocent: Tensor) -> tuple[Tensor, float]:
    """Weight `(d,)` and bias of the score along a direction that has mean 0 and standard deviation 1 on the innocent
    states `(rows, d)`. A single row, or equal rows, have no spread; then the direction keeps its length."""
    direction = direction.double()
    along_N = innocent.double() @ direction
    spread = float(along_N.std()) if len(along_N) > 1 else 0.0
    spread = spread if spread > 1e-9 * float(along_N.abs().mean() + direction.norm()) else 1.0
    return (direction / spread).float(), -float(along_N.mean()) / spread


def fit_direction(method: str, bad: Tensor, innocent: Tensor) -> tuple[Tensor, float]:
    """Weight `(d,)` and bias of a monitor, from states `(bad rows, d)` and `(innocent rows, d)`.

    Raises:
        MonitorError: one of the two is empty.
        ValueError: there is no such method.
    """
    if not len(bad) or not len(innocent):
        raise MonitorError(
            f"A monitor is fitted on bad and on innocent rows (got {len(bad)} and {len(innocent)}). Innocent rows are "
            "ordinary traffic: give as many as there are."
        )
    return standardised(fits.get(method).fit(bad, innocent), innocent)


def make_monitor(
    method: str,
    pooling: Pooling,
    model: nn.Module,
    tokenizer: Any,
    layer: int,
    states: tuple[Tensor, Tensor],
    site: Site = "block",
    tokens: Tokens = "answer",
    known: Mapping[str, Any] | None = None,
) -> Monitor:
    """Fit a monitor; it has no threshold yet.

    Args:
        method: A file of `fits/`.
        pooling: How the scores of tokens are combined into that of a row.
        model: The model whose states these are, with or without adapters.
        tokenizer: Its tokenizer.
        layer: Index of the block.
        states: The states of bad rows `(rows, d)` and of innocent rows `(rows, d)`, pooled as `pooling.fitted_on`.
        site: The site that was read.
        tokens: Which tokens were read.
        known: The result of `identity`, if many monitors are made for one model and tokenizer.

    Raises:
        MonitorError: there is no bad or no innocent row, or they do not differ.
    """
    weight, bias = fit_direction(method, *states)
    return Monitor(
        method=method,
        pooling=pooling,
        layer=layer,
        site=site,
        module=module_at(model, layer, site),
        tokens=tokens,
        weight=weight,
        bias=bias,
        fitted_on={"bad": len(states[0]), "innocent": len(states[1])},
        **(identity(model, tokenizer) if known is None else known),
    )


def identity(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """The attributes of a monitor that identify its base model and its tokenizer."""
    base = base_model(model)
    name = str(getattr(base, "name_or_path", "") or type(base).__name__)
    return {"base": fingerprint(base), "base_name": name, "tokenizer": tokenizer_print(tokenizer)}


def module_at(model: nn.Module, layer: int, site: Site) -> str:
    """The full name, in the base model, of the module whose output is read.

    Raises:
        ValueError: the model has no such layer or site.
    """
    blocks = find_blocks(base_model(model))
    [index] = resolve_layers(layer, len(blocks))
    return site_name(*blocks[index], site)


def calibrate(scores: Sequence[float], bad: Sequence[bool]) -> Calibration | None:
    """Platt scaling: a logistic regression of badness on the score, for rows that the monitor was not fitted on.

    Returns:
        The calibration; None if all rows are bad, or none is.
    """
    values_N, labels_N = np.asarray(scores, dtype=float), np.asarray(bad, dtype=bool)
    if labels_N.all() or not labels_N.any():
        return None
    model = LogisticRegression().fit(values_N[:, None], labels_N)
    slope, intercept = float(np.asarray(model.coef_)[0, 0]), float(np.asarray(model.intercept_)[0])
    return Calibration(slope, intercept, float(labels_N.mean()))
