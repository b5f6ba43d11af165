"""Read the constant vectors of an adapter, and make an adapter from constant vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import SteeringVectorConfig
from ..description import FORMAT
from ..layer import SteeringVectorLayer
from ..model import CHILD
from ..norms import cap
from ..types import CONSTANT_FORMS, Site


class ExportError(ValueError):
    """Raised when something cannot be exported; the message says why, and what works instead."""


@dataclass(frozen=True)
class ConstantVectors:
    """The vectors that an adapter adds, independent of the input.

    Attributes:
        vectors: Full name of the steered module in the base model -> `(d,)`, fp32.
        layers: The same name -> index of the block.
        site: The steered site, as in `SteeringVectorConfig`.
        base: Name of the base model, and its fingerprint.
    """

    vectors: dict[str, Tensor]
    layers: dict[str, int]
    site: Site
    base: dict[str, Any]

    @property
    def by_layer(self) -> dict[int, Tensor]:
        """Index of the block -> vector."""
        return {self.layers[name]: vector for name, vector in self.vectors.items()}

    @property
    def description(self) -> dict[str, Any]:
        """The description of these vectors (see `description.py`). The strength is baked in, so 1 is recommended."""
        return {
            "format": FORMAT,
            "operation": "add",
            "formula": "h + s v",
            "form": "bias",
            "hook": "output of the module",
            "site": self.site,
            "modules": self.layers,
            "width": len(next(iter(self.vectors.values()))),
            "positions": "all",
            "norm": {"rule": "free", "value": None, "residual_norms": None},
            "strength": {"recommended": 1.0, "chosen_by": "baked into the vectors", "measured": {}},
            "base": self.base,
            "data": None,
            "monitor": None,
            "weights": None,
        }


def constant_vectors(model: PeftModel, strength: float = 1.0) -> ConstantVectors:
    """The vectors that the active adapter adds at a strength, with the length set by `norm`.

    Args:
        model: A model with one active steering vector and no other adapter.
        strength: Multiplies the vectors.

    Raises:
        ExportError: there is another adapter, several are active, or this one does not add a constant at every token.
    """
    if not isinstance(model, PeftModel):
        raise ExportError(
            f"{type(model).__name__} has no adapter. Load one with PeftModel.from_pretrained(base, folder)."
        )
    name, config = _only_adapter(model)
    reasons = {
        f"form={config.form!r} depends on the state": config.form not in CONSTANT_FORMS,
        "norm='preserve' depends on the state": config.norm == "preserve",
        f"positions={config.positions!r} skips tokens, and other tools steer every position": (
            config.positions != "all"
        ),
        f"modules_to_save={config.modules_to_save} are trained too": bool(config.modules_to_save),
    }
    if applying := [reason for reason, applies in reasons.items() if applies]:
        raise ExportError(
            f"Adapter {name!r} is not a constant vector: {'; '.join(applying)}. Exports support form='bias' with "
            "positions='all'. Train that, or share this adapter as a PEFT folder."
        )
    base = model.get_base_model()
    vectors, layers = {}, {}
    for path, layer in base.named_modules():
        if isinstance(layer, SteeringVectorLayer) and name in layer.config:
            vector = layer.written(name).detach().float().cpu()
            if config.norm == "capped" and config.norm_value is not None:
                vector = cap(vector, config.norm_value)
            module = path.removesuffix(f".{CHILD}")
            vectors[module], layers[module] = strength * vector, layer.layer_index
    if not all(v.isfinite().all() for v in vectors.values()) or not any(v.any() for v in vectors.values()):
        raise ExportError(
            f"Adapter {name!r} at strength {strength:g} is zero or not finite, so nothing can be exported."
        )
    base_facts = {"name": config.base_model_name_or_path, "fingerprint": config.base_fingerprint}
    return ConstantVectors(vectors, layers, config.site, base_facts)


def _only_adapter(model: PeftModel) -> tuple[str, SteeringVectorConfig]:
    active = list(model.active_adapters)
    configs = {name: model.peft_config[name] for name in active}
    if len(active) != 1:
        raise ExportError(
            f"{len(active)} adapters are active ({active}). Export one at a time: model.set_adapter(name)."
        )
    [(name, config)] = configs.items()
    if not isinstance(config, SteeringVectorConfig):
        raise ExportError(f"Adapter {name!r} is {config.peft_type}: only steering vectors can be exported.")
    others = {
        type(module).__name__
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SteeringVectorLayer)
    }
    if others:
        raise ExportError(f"The model also has another adapter ({sorted(others)}). Load the steering vector alone.")
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ExportError(
            "The base is quantised, so the export cannot be verified. Load the base without quantisation."
        )
    return name, config


def _fits(vector: Any, width: int) -> bool:
    right = isinstance(vector, Tensor) and vector.is_floating_point() and tuple(vector.shape) == (width,)
    return right and bool(vector.isfinite().all())


def _form(vector: object) -> str:
    return f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__


def adapter_of(model: nn.Module, vectors: Mapping[int, Tensor], adapter_name: str = "default") -> PeftModel:
    """Steer a model by given vectors, as an ordinary adapter that can be saved, scaled and trained further.

    Args:
        model: The base model.
        vectors: Index of the block -> `(d,)`, added to that block's output.
        adapter_name: Name of the new adapter.

    Raises:
        ExportError: `vectors` is empty, or one has another width, is not finite, or belongs to a missing block.
    """
    width = model.get_input_embeddings().weight.shape[1]  # pyright: ignore
    bad = {i: _form(v) for i, v in vectors.items() if not _fits(v, width)}
    if not vectors or bad:
        raise ExportError(f"This model needs finite vectors of width {width}, got {bad}.")
    config = SteeringVectorConfig(layers=sorted(vectors))
    try:
        steered = get_peft_model(model, config, adapter_name)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ExportError(str(error)) from error
    for layer in steered.modules():
        if isinstance(layer, SteeringVectorLayer) and adapter_name in layer.config:
            layer.initialise(adapter_name, vectors[layer.layer_index].to(torch.float32))
    return steered
