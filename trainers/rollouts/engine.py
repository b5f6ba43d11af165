"""The interface of engines that sample completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One completion to sample.

    Attributes:
        prompt: Token ids.
        vectors: Index of a decoder block -> vector that is added to its output at every token, `(d,)`, fp32.
    """

    prompt: list[int]
    vectors: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled; the fields have the names and meanings of transformers' `GenerationConfig`.

    Attributes:
        max_new_tokens: The longest completion.
        eos_token_id: Tokens that end a completion.
        pad_token_id: Token for padding.
        temperature: Divides the logits.
        top_p: Share of probability that tokens are sampled from.
        top_k: Number of the most likely tokens that are sampled from; 0 for all.
        min_p: Smallest probability relative to the largest; None for 0.
        repetition_penalty: Penalty on repeated tokens; 1.0 for none.
        more: Additional fields of `GenerationConfig`.
    """

    max_new_tokens: int
    eos_token_id: list[int]
    pad_token_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """A sampled completion.

    Attributes:
        tokens: Token ids, including the token that ended it.
        logps: Log-probability of each, in nats, under `softmax(logits / temperature)` of the model that sampled it.
    """

    tokens: list[int]
    logps: list[float]


class Engine(Protocol):
    """Anything that samples one completion per request, in their order."""

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Sample the completions."""
        ...
