"""Training or evaluation mode for a while."""

from ..adapters.observing import evaluating, training

__all__ = ["evaluating", "training"]
