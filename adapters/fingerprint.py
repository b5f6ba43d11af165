"""A few numbers that identify the base model a vector was made for.

A vector loads on any model of the same width, where it would steer in no particular direction. The fingerprint makes
that an error. It compares 64 entries of the input embedding within 1 %, and a sample of every block's weights (see
`weights`). It detects a merged LoRA, and accepts another dtype or a quantised copy of the same base. Fingerprints of
earlier versions have no sample of weights, so only the rest is compared.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import nn

from .blocks import text_config
from .weights import difference_of_weights, sample_weights

SAMPLES = 64  # numbers of the embedding in a fingerprint
_TOLERANCE = 0.01
_NUMBERS = re.compile(r"(?:(?:\?|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?: |$))*")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """`model_type`, `hidden_size`, `num_layers`, and samples of the weights, unless they are sharded or on meta."""
    config = text_config(model)
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "embedding": _embedding_sample(model),
        "weights": sample_weights(model),
    }


def check_fingerprint(expected: dict[str, Any], model: nn.Module) -> None:
    """Raise a ValueError when `model` is not the base that `expected` describes."""
    if (what := difference(expected, fingerprint(model))) is not None:
        raise ValueError(
            f"This is not the adapter's base model: {what}. Load the right base, or, to transfer the vector on "
            "purpose, read the config with SteeringVectorConfig.from_pretrained, set base_fingerprint=None (on "
            "another architecture target_modules=None too) and pass it as config=."
        )


def check_fingerprint_form(given: Any) -> None:
    """Raise a ValueError unless `given` has the form of a fingerprint."""
    whole = isinstance(given, dict) and all(
        isinstance(given.get(name), int) and not isinstance(given[name], bool) and given[name] > 0
        for name in ("hidden_size", "num_layers")
    )
    sample: Any = given.get("embedding", []) if whole else None
    numbers = isinstance(sample, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max for x in sample
    )
    named = numbers and isinstance(given.get("model_type"), str) and _is_weight_sample(given.get("weights"))
    if not named or len(sample) not in (0, SAMPLES):
        raise ValueError(
            f"base_fingerprint={given!r:.200} is not a fingerprint. It has model_type, hidden_size, num_layers, and "
            f"{SAMPLES} numbers of the embedding (or none). Set it to None to transfer the vector on purpose."
        )


def _is_weight_sample(given: Any) -> bool:
    """Whether it has the form that `weights.sample_weights` returns, or is None, as in earlier versions."""
    if given is None:
        return True
    if not isinstance(given, dict) or given.keys() != {"values", "quantised"}:
        return False
    values, quantised = given["values"], given["quantised"]
    return (
        isinstance(quantised, list)
        and all(isinstance(name, str) for name in quantised)
        and isinstance(values, dict)
        and all(isinstance(line, str) and _NUMBERS.fullmatch(line) for line in values.values())
    )


def difference(expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    """The first difference between two fingerprints, as part of an error message; None if they match."""
    for name in ("model_type", "hidden_size", "num_layers"):
        if expected.get(name) != actual.get(name):
            return f"{name} is {actual.get(name)!r}, the adapter was made for {expected.get(name)!r}"
    old, new = (torch.tensor(one.get("embedding") or []) for one in (expected, actual))
    if old.numel() and new.numel():
        distance = float((old - new).norm() / old.norm().clamp_min(1e-12))
        if not distance <= _TOLERANCE:
            most = f"at most {_TOLERANCE:.0%}"
            return f"its embeddings differ by {distance:.1%} from those of the adapter's base ({most})"
    if expected.get("weights") and actual.get("weights"):
        worst = difference_of_weights(expected["weights"], actual["weights"])
        if worst is not None:
            name, distance = worst
            return f"its weights {name} differ by {distance:.2g} of their length from those of the adapter's base"
    return None


def _embedding_sample(model: nn.Module) -> list[float]:
    weight = getattr(model.get_input_embeddings(), "weight", None)  # pyright: ignore[reportCallIssue]
    if weight is None or weight.ndim != 2 or weight.is_meta or weight.numel() == 0:
        return []
    if hasattr(weight, "device_mesh"):  # reading a DTensor would gather the whole matrix
        return []
    # Low rows survive a resized vocabulary, and both strides cover the whole width.
    index = torch.arange(SAMPLES, device=weight.device)
    rows, columns = (index * 3) % min(weight.shape[0], 256), (index * 7) % weight.shape[1]
    return [round(x, 6) for x in weight.detach()[rows, columns].float().tolist()]
