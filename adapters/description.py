"""What a vector file must say so that no tool silently loads it wrong: `steering_vector.json` beside the weights.

PEFT's configuration contains most of this, but only this library understands it. The description contains all of it,
for any tool: the operation, the module whose output is changed, how layers are counted, positions, the length, the
strength and its cost, the base model and the data. The page "What a vector file must say" specifies it.

A description identifies its weights by their digest, so a stale description next to other weights is rejected.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .config import SteeringVectorConfig
from .fingerprint import check_fingerprint
from .saved import KEY, module_names, read_tensors, sha256_of

FILE = "steering_vector.json"
FORMAT = "steering-vector/1"
_FORMULAS = {
    "bias": "h + s v",
    "span": "h + s sum_k c_k b_k",
    "gated": "h + s relu(w.h + b) v",
    "linear": "h + s (w.h + b) v",
    "low_rank": "h + s V^T (W h + b)",
    "project": "h - s (h.u) u, u = v / |v|",
}
_LARGEST = 10**7  # bytes


@dataclass(frozen=True)
class Strength:
    """The recommended strength of a vector, and what it costs.

    Attributes:
        recommended: Multiplies the saved vectors.
        chosen_by: How it was chosen.
        measured: Strength -> measure -> mean; "0" is the base model.
    """

    recommended: float = 1.0
    chosen_by: str = "as it was trained; no measurement chose it"
    measured: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingData:
    """The data that a vector was made from.

    Attributes:
        sha256: Digest of the rows.
        examples: Number of rows.
        name: Name of the data set.
    """

    sha256: str
    examples: int
    name: str | None = None


def describe(
    config: SteeringVectorConfig, weights: Path, strength: Strength | None = None, data: TrainingData | None = None
) -> dict[str, Any]:
    """The description of a saved adapter.

    Args:
        config: Its configuration.
        weights: Its weights file.
        strength: Its strength; None if nothing was measured.
        data: Its training data; None if unknown.
    """
    tensors = read_tensors(weights)
    matches = [(key, match) for key in sorted(tensors) if (match := KEY.fullmatch(key)) is not None]
    named: dict[str, dict[str, str]] = {}
    for key, match in matches:
        named.setdefault(match["module"], {})[match["name"]] = key
    modules = module_names(config.target_modules or "")
    layers = config.layers if isinstance(config.layers, list) else []
    rescaled = ", rescaled to the length of h" if config.norm == "preserve" else ""
    return {
        "format": FORMAT,
        "operation": "project" if config.form == "project" else "add",
        "formula": _FORMULAS[config.form] + rescaled,
        "form": config.form,
        "hook": "output of the module",
        "site": config.site,
        "modules": dict(zip(modules, layers, strict=True)),
        "tied": config.tied,
        "tensors": named,
        "width": max(tensors[key].shape[-1] for key, _ in matches),
        "positions": config.positions,
        "norm": {"rule": config.norm, "value": config.norm_value, "residual_norms": config.residual_norms},
        "strength": None if strength is None else vars(strength),
        "base": {"name": config.base_model_name_or_path, "fingerprint": config.base_fingerprint},
        "data": None if data is None else vars(data),
        "monitor": None,
        "weights": {"file": weights.name, "sha256": sha256_of(weights)},
    }


def write_description(
    folder: str | Path, strength: Strength | None = None, data: TrainingData | None = None
) -> Path | None:
    """Write the description of a saved adapter beside it.

    Returns:
        The file; None if the folder holds no steering vector.
    """
    home = Path(folder)
    config = home / "adapter_config.json"
    weights = home / SAFETENSORS_WEIGHTS_NAME
    if not config.is_file() or not weights.is_file():
        return None
    if json.loads(config.read_text(encoding="utf-8")).get("peft_type") != "STEERING_VECTOR":
        return None
    values = describe(SteeringVectorConfig.from_pretrained(str(home)), weights, strength, data)
    return write_json(home / FILE, values)


def write_json(file: Path, values: dict[str, Any]) -> Path:
    """Write a description."""
    file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def read_description(folder: str | Path) -> dict[str, Any] | None:
    """The description of an adapter folder; None if it has none.

    Raises:
        ValueError: the file is not a description, or describes other weights than those beside it.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    values = parse(file.read_bytes(), str(file))
    named = values["weights"]
    if named is not None and sha256_of(Path(folder) / SAFETENSORS_WEIGHTS_NAME) != named.get("sha256"):
        raise ValueError(f"{file} describes other weights than those beside it. Delete it or write it again.")
    return values


def parse(text: bytes | str, where: str) -> dict[str, Any]:
    """Parse a description from JSON.

    Raises:
        ValueError: it has another format, or a key is missing.
    """
    try:
        if len(text) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not the description of a vector: {error}.") from error
    if values.get("format") != FORMAT:
        raise ValueError(f"{where}: format {values.get('format')!r:.80} is not supported, only {FORMAT!r} is.")
    if missing := [key for key in REQUIRED if key not in values]:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}, so it could be loaded wrong. Ask its author for a complete file."
        )
    return values


REQUIRED = (
    "operation", "formula", "hook", "site", "modules", "positions", "norm", "strength", "base", "data", "monitor",
    "weights",
)  # fmt: skip
"""Keys that every description must have; the value is null if unknown."""


def check_constant(values: dict[str, Any], model: Any, where: str) -> None:
    """Check that a description is of plain vectors that are added to the output of blocks at every token.

    Args:
        values: The description.
        model: The base model to steer.
        where: The source of the description, for the message.

    Raises:
        ValueError: it has another operation, form, site, positions or base model.
    """
    expected = {"operation": "add", "form": "bias", "site": "block", "positions": "all"}
    for key, value in expected.items():
        if values.get(key, value) != value:
            raise ValueError(
                f"{where}: {key} is {values[key]!r:.80}, but only {value!r} can be read from this format."
            )
    fingerprint = (values["base"] or {}).get("fingerprint")
    if fingerprint is not None:
        check_fingerprint(fingerprint, model)


def embedded_in(file: str | Path) -> dict[str, Any] | None:
    """The description in the metadata of a safetensors file; None if it has none.

    Raises:
        ValueError: see `parse`.
    """
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("steering_vector")
    return None if text is None else parse(text, str(file))
