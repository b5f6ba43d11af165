"""How much harm is too much: a sweep recommends nothing beyond it, and no claim of a grid is won beyond it."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Limits(BaseModel, extra="forbid", strict=True):
    """What a setting may do to neutral text and still be recommended."""

    kl: float = Field(default=0.3, gt=0)
    """KL to the base model, in nats per token."""
    perplexity: float = Field(default=1.25, ge=1)
    """Times the base model's perplexity."""
    repetition: float = Field(default=0.1, ge=0)
    """Share of repeated word triples above that of the base model."""
