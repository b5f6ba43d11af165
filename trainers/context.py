"""The context length of a model, from its configuration and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_LIMIT = 10**6  # tokenizers without a maximum length report 10**30


def context_length(config: Any, tokenizer: Any = None) -> int | None:
    """The smaller of the context lengths of a model and its tokenizer; None if neither has a limit.

    Args:
        config: Configuration of the model: `max_position_embeddings` of its text decoder. With a RoPE that stretches
            an original context (YaRN), the stretched length is used if it is larger.
        tokenizer: Its `model_max_length` is used, unless that is the placeholder for no limit.
    """
    limits = []
    if config is not None:
        config = config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and longest > 0:
            limits.append(max(longest, _stretched(getattr(config, "rope_parameters", None) or {})))
    tokens = getattr(tokenizer, "model_max_length", None)
    if isinstance(tokens, int) and 0 < tokens < _NO_LIMIT:
        limits.append(tokens)
    return min(limits, default=None)


def _stretched(rope: Mapping[str, Any]) -> int:
    """The context length of a stretched RoPE; 0 if it is not stretched, or its original context is unknown."""
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, Mapping)]
    contexts = [
        int(kind["original_max_position_embeddings"] * kind["factor"])
        for kind in kinds
        if kind.get("original_max_position_embeddings") and kind.get("factor")
    ]
    return min(contexts, default=0)
