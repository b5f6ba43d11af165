"""Arithmetic on saved steering vectors. It reads and writes adapter folders; no model is loaded.

    both = combine([read("cautious"), read("warm")], [1, 0.5])
    write(both, "both", Card(title="Cautious and warm"))

A sum is meaningful only for vectors that are added at the same places of the same base model and do not depend on the
state. Anything else is an error that gives the reason and an alternative.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..blocks import index_of
from ..card import Card, write_card
from ..config import SteeringVectorConfig
from ..fingerprint import difference
from ..norms import cap, write_vector
from ..types import CONSTANT_FORMS, Norm, Positions, Site

Missing = Literal["refuse", "zero"]
_PREFIX, _SUFFIX = "base_model.model.", ".steer.steering_vector_v.weight"
_FIXED, _LENGTH = ".steer.steering_vector_w.weight", ".steer.steering_vector_b.weight"
_NEGLIGIBLE = 1e-6
_TOGETHER = (
    "Or use both adapters at once: model.load_adapter(folder, 'second') and "
    "model.base_model.set_adapter(['default', 'second'])."
)


class VectorError(ValueError):
    """Raised when vectors cannot be combined; the message says why and suggests an alternative."""


@dataclass(frozen=True)
class Vectors:
    """The constant vectors of a saved adapter.

    Attributes:
        name: Their name in tables and messages.
        modules: Index of the block -> full name of the steered module.
        vectors: Index of the block -> `(d,)`, fp32, with the length set by `norm`.
        site: The steered site, as in `SteeringVectorConfig`.
        positions: Which tokens are steered.
        norm: `preserve`, or `free`.
        base: Fingerprint of the base model.
        base_name: The name of the base model.
        sha256: Digest of the weights they were read from; "" if they were computed.
    """

    name: str
    modules: dict[int, str]
    vectors: dict[int, Tensor]
    site: Site
    positions: Positions
    norm: Norm
    base: dict[str, Any] | None
    base_name: str | None
    sha256: str = ""

    @property
    def layers(self) -> list[int]:
        """Indices of the blocks, in order."""
        return sorted(self.vectors)


def read(folder: str | Path) -> Vectors:
    """Read the vectors of an adapter folder.

    Raises:
        VectorError: it has no steering vector, or one that depends on the state.
        ValueError: its weights are not usable.
    """
    home = Path(folder)
    if not (home / "adapter_config.json").is_file() or not (home / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise VectorError(f"{folder} is not an adapter folder: it lacks adapter_config.json or safetensors.")
    config = SteeringVectorConfig.from_pretrained(str(home))
    if config.form not in CONSTANT_FORMS:
        raise VectorError(
            f"{folder} has form={config.form!r}: what it adds depends on the state, so vectors cannot be added to it. "
            f"Train form='bias'. {_TOGETHER}"
        )
    if config.modules_to_save:
        raise VectorError(
            f"{folder} also holds whole modules (modules_to_save={config.modules_to_save}), which a vector cannot "
            "represent. Train it without them."
        )
    names, vectors = _by_layer(home, config)
    digest = hashlib.sha256((home / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest()
    norm: Norm = "preserve" if config.norm == "preserve" else "free"
    return Vectors(
        home.name, names, vectors, config.site, config.positions, norm, config.base_fingerprint,
        config.base_model_name_or_path, digest,
    )  # fmt: skip


def write(vectors: Vectors, folder: str | Path, card: Card) -> Path:
    """Save vectors as an ordinary adapter folder.

    Args:
        vectors: The vectors.
        folder: A new folder.
        card: Its model card.

    Raises:
        VectorError: the folder is not empty, or the vectors are zero or not finite.
    """
    home = Path(folder)
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise VectorError(f"{home} is not empty, and files are never overwritten. Choose a new folder.")
    if not all(v.isfinite().all() for v in vectors.vectors.values()) or not any(
        v.any() for v in vectors.vectors.values()
    ):
        raise VectorError(f"{vectors.name} is zero or not finite, so it was not saved.")
    config = SteeringVectorConfig(
        layers=vectors.layers,
        site=vectors.site,
        positions=vectors.positions,
        norm=vectors.norm,
        base_fingerprint=vectors.base,
        base_model_name_or_path=vectors.base_name,
        target_modules="|".join(re.escape(vectors.modules[layer]) for layer in vectors.layers),
        inference_mode=True,
    )
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{home.name}.") as part:
        whole = Path(part) / home.name
        whole.mkdir()
        tensors = {
            f"{_PREFIX}{vectors.modules[i]}{_SUFFIX}": v.float().contiguous() for i, v in vectors.vectors.items()
        }
        save_file(tensors, whole / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        # Saved after the weights, as PEFT does, so that it gets a checksum.
        config.save_pretrained(str(whole), auto_mapping_dict=None)
        write_card(whole, card)
        if home.exists():
            home.rmdir()
        whole.rename(home)
    return home


def combine(sets: Sequence[Vectors], weights: Sequence[float], missing: Missing = "refuse", name: str = "") -> Vectors:
    """The weighted sum `Σ wᵢ vᵢ`, layer by layer: addition, difference, average and scaling.

    Args:
        sets: One or more sets of vectors.
        weights: One weight for each set.
        missing: Whether a layer that some sets do not steer is an error (`refuse`) or counts as zeros (`zero`).
        name: The name of the result.

    Raises:
        VectorError: they are not added at the same places of the same base model.
    """
    if len(sets) != len(weights) or not all(torch.isfinite(torch.tensor(float(w))) for w in weights):
        raise VectorError(f"{len(sets)} vectors need {len(sets)} finite weights, got {[*weights]}.")
    check_alike(sets, missing)
    sums: dict[int, Tensor] = {}
    modules: dict[int, str] = {}
    for one, weight in zip(sets, weights, strict=True):
        modules |= one.modules
        for layer, vector in one.vectors.items():
            sums[layer] = sums.get(layer, torch.zeros_like(vector)) + weight * vector
    return replace(sets[0], name=name, modules=modules, vectors=sums, sha256="")


def project_out(one: Vectors, others: Sequence[Vectors], missing: Missing = "refuse", name: str = "") -> Vectors:
    """Remove the span of other vectors from a vector, layer by layer: `v - Q Qᵀ v`.

    Args:
        one: The vector.
        others: The vectors whose span is removed; they need not be orthogonal to each other.
        missing: Whether a layer of `one` that others do not steer is an error or stays unchanged.
        name: The name of the result.

    Raises:
        VectorError: as in `combine`, or nothing is left.
    """
    check_alike([one, *others], missing)
    rest = {}
    for layer, vector in one.vectors.items():
        span = [other.vectors[layer].double() for other in others if layer in other.vectors]
        rest[layer] = _without(vector.double(), span).float()
    if all(rest[i].norm() <= _NEGLIGIBLE * one.vectors[i].norm() for i in rest):
        raise VectorError(f"Nothing of {one.name} is left: it lies in the span of {[o.name for o in others]}.")
    return replace(one, name=name or one.name, vectors=rest, sha256="")


def orthogonalise(sets: Sequence[Vectors], missing: Missing = "refuse") -> list[Vectors]:
    """Gram-Schmidt without scaling: the first stays unchanged, and each other loses the span of the previous ones.

    Args:
        sets: Two or more sets of vectors, the most important first.
        missing: As in `project_out`.

    Raises:
        VectorError: as in `project_out`.
    """
    check_alike(sets, missing)
    return [one if i == 0 else project_out(one, sets[:i], missing) for i, one in enumerate(sets)]


def similarity(sets: Sequence[Vectors]) -> dict[int, Tensor]:
    """The cosine similarity of every pair of vectors, at every layer that at least two of them steer.

    Returns:
        Layer -> `(sets, sets)`, NaN where one of the two does not steer the layer.

    Raises:
        VectorError: they differ in base model or site, so a cosine would be meaningless, or they share no layer.
    """
    _check_same(sets, "site")
    layers = sorted({i for one in sets for i in one.vectors if sum(i in other.vectors for other in sets) > 1})
    if not layers:
        raise VectorError(f"They share no layer: {_layers_of(sets)}. Vectors can be compared only at the same layer.")
    cosines = {}
    for layer in layers:
        nothing = torch.full_like(next(one.vectors[layer] for one in sets if layer in one.vectors), torch.nan)
        rows = torch.stack([one.vectors.get(layer, nothing).double() for one in sets])
        unit = rows / rows.norm(dim=1, keepdim=True)  # (sets, d)
        cosines[layer] = unit @ unit.T
    return cosines


def check_alike(sets: Sequence[Vectors], missing: Missing = "refuse") -> None:
    """Raise a VectorError unless vectors are added at the same places of the same base model.

    Args:
        sets: One or more sets of vectors.
        missing: Whether different layers are an error.
    """
    if not sets:
        raise VectorError("No vectors were given.")
    _check_same(sets, "site", "positions", "norm")
    if missing == "refuse" and len({tuple(one.layers) for one in sets}) > 1:
        raise VectorError(
            f"They steer different layers: {_layers_of(sets)}. With missing='zero' (--missing zero) a layer that one "
            f"of them does not steer counts as zeros there. {_TOGETHER}"
        )


def _check_same(sets: Sequence[Vectors], *names: str) -> None:
    first = sets[0]
    for one in sets[1:]:
        both_known = first.base is not None and one.base is not None
        if both_known and (what := difference(first.base or {}, one.base or {})) is not None:
            raise VectorError(
                f"{one.name} was made for another base model than {first.name}: {what}. A direction of one model has "
                f"no meaning in another. Train it again on the base of {first.name}."
            )
        for name in names:
            ours, theirs = getattr(first, name), getattr(one, name)
            if ours != theirs:
                raise VectorError(
                    f"{first.name} has {name}={ours!r}, {one.name} {name}={theirs!r}: no single adapter does what "
                    f"both do. Make them with the same {name}. {_TOGETHER}"
                )


def _layers_of(sets: Sequence[Vectors]) -> str:
    return ", ".join(f"{one.name} {one.layers}" for one in sets)


def _by_layer(home: Path, config: SteeringVectorConfig) -> tuple[dict[int, str], dict[int, Tensor]]:
    """The module name and the vector of every layer; tied layers share one vector."""
    saved = {key.removeprefix(_PREFIX): t.float() for key, t in load_file(home / SAFETENSORS_WEIGHTS_NAME).items()}
    named = {key.removesuffix(_SUFFIX): tensor for key, tensor in saved.items() if _SUFFIX in key}
    if config.form == "span":
        named = {name: c_K @ saved[name + _FIXED] for name, c_K in named.items()}
    lengths = {name: saved.get(name + _LENGTH) for name in named}  # of norm="learned"
    if config.tied:
        [vector] = named.values()
        pattern = str(config.target_modules)
        if not isinstance(config.layers, list) or pattern.count("|") + 1 != len(config.layers):
            raise VectorError(f"{home}: tied layers {config.layers!r} cannot be matched to {pattern!r}.")
        [length] = lengths.values()
        named = {name.replace("\\", ""): vector for name in pattern.split("|")}
        lengths = dict.fromkeys(named, length)
    names, vectors = {}, {}
    for name, vector in named.items():
        layer = index_of(name)
        residual = (config.residual_norms or {}).get(str(layer))
        if config.norm == "relative" and residual is None:
            raise VectorError(f"{home}: norm='relative' without the residual norm of layer {layer}.")
        vector = write_vector(config.norm, vector, config.norm_value, residual, lengths[name])
        if config.norm == "capped" and config.norm_value is not None:
            vector = cap(vector, config.norm_value)
        names[layer], vectors[layer] = name, vector
    return names, vectors


def _without(vector: Tensor, span: Sequence[Tensor]) -> Tensor:
    if not span:
        return vector
    u, s, _ = torch.linalg.svd(torch.stack(list(span), dim=1), full_matrices=False)
    basis = u[:, s > s.max() * _NEGLIGIBLE] if s.max() > 0 else u[:, :0]
    return vector - basis @ (basis.T @ vector)
