"""Scale steering vectors while a model runs."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from .layer import steering_layers
from .registry import did_you_mean
from .types import CONSTANT_FORMS, Strength


class set_strength:  # lower case: called like a function, and a context manager like `torch.no_grad`
    """Multiply the vectors by `strength`: 1 as trained, 0 the base model, negative the opposite.

    "null" removes the vector's direction from the states that point along it: `h - relu(h·v) v / |v|²`.

    `set_strength(model, 2.0)` holds until the next call; `with set_strength(model, 2.0):` restores the old strength.
    The strength is a setting of the running model and is not saved with the adapter.

    With gradient checkpointing the backward pass runs `attention` and `mlp` sites again (before transformers 5.23
    `block` too): keep the strength until the backward pass is done.

    Args:
        model: A model with steering vectors.
        strength: Any finite number, or "null".
        adapter_name: The adapter to scale; None for all.

    Raises:
        ValueError: the model has no such steering vector, the strength is not finite, or it is "null" for a form
            other than `bias`, which has no single direction.
    """

    def __init__(self, model: nn.Module, strength: Strength, adapter_name: str | None = None) -> None:
        if strength != "null":
            try:
                strength = float(strength)
            except (TypeError, ValueError):
                raise ValueError(f"strength={strength!r} is neither a finite number nor 'null'.") from None
        if strength in (float("inf"), float("-inf")) or strength != strength:
            raise ValueError(f"strength={strength} is not a finite number.")
        layers = steering_layers(model)
        names = {name for layer in layers for name in layer.config}
        if not names or (adapter_name is not None and adapter_name not in names):
            which = "" if adapter_name is None else f" {adapter_name!r}"
            hint = did_you_mean(adapter_name, names)
            raise ValueError(f"No steering vector{which} to scale; the model has {sorted(names)}.{hint}")
        forms = {name: c.form for layer in layers for name, c in layer.config.items() if adapter_name in (None, name)}
        if strength == "null" and not set(forms.values()) <= {*CONSTANT_FORMS}:
            raise ValueError(f"strength='null' removes the one direction of form='bias', got {forms}. Use a number.")
        self._before = [(layer, dict(layer.strength)) for layer in layers]
        for layer in layers:
            for name in layer.config:
                if adapter_name in (None, name):
                    layer.strength[name] = strength

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for layer, strength in self._before:
            layer.strength.update(strength)
