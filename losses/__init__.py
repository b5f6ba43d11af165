"""What is minimised. Each file is one loss, named by the file; a new file is a new loss."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import fields, is_dataclass
from typing import Any

from ._base import At, Loss, Outputs
from ._capped import Capped
from ._contrast import Contrast, Contrasted
from ._needs import Needs, Strength
from ._regularised import Regularised
from ._staged import Staged
from ._states import Where
from ._wrapped import parts

__all__ = ["At", "Loss", "Needs", "Outputs", "Staged", "Strength", "get_loss", "names", "parts"]


def names() -> list[str]:
    """The losses: the files of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get_loss(
    loss: str | Loss,
    *,
    contrast: Contrast = "paired",
    neutral_kl: float = 0.0,
    change_cap: float = 0.0,
    cap_layers: Where | list[int | float] | None = None,
    cap_weight: float | None = None,
    then: str | Loss | None = None,
    then_after: float | None = None,
    **options: Any,
) -> Loss:
    """A loss by name (its file), with its hyperparameters; a `Loss` object is returned as it is.

    Args:
        loss: The loss, or its name.
        contrast: What a pair loss contrasts the chosen answer with: `paired`, `unpaired` or `none`; a loss of one
            answer, on pairs, becomes the `difference` of its two.
        neutral_kl: Weight of a KL to the base model on neutral text.
        change_cap: Longest change of the residual stream at `cap_layers` that costs nothing; 0: no cap.
        cap_layers: Where `change_cap` applies (0.67).
        cap_weight: Price of a longer change (1).
        then: The loss, with its defaults, that takes over after `then_after` of all steps.
        then_after: Share of all steps before `then` takes over (0.5).
        options: Hyperparameters of the named loss.

    Raises:
        ValueError: an unknown name or option (the message names the nearest), options for an object, `then` with a
            term that would go around both, an option of a term that is not there.
    """
    for option, value, of, missing in (
        ("cap_layers", cap_layers, "change_cap", change_cap == 0),
        ("cap_weight", cap_weight, "change_cap", change_cap == 0),
        ("then_after", then_after, "then", then is None),
    ):
        if value is not None and missing:
            raise ValueError(f"{option}={value!r} says how {of} works, which is not given: it would change nothing.")
    if then is not None and (change_cap or neutral_kl):
        raise ValueError("then= with change_cap or neutral_kl: put those on the two losses, and give objects.")
    if isinstance(loss, Loss):
        if options:
            raise ValueError(f"Options {sorted(options)} go with a loss name, not with an object.")
        made = loss
    else:
        made = _by_name(loss, options)
    if contrast != "paired":
        made = Contrasted(made, contrast)
    if then is not None:
        made = Staged(made, get_loss(then), **_given(share=then_after))
    if change_cap != 0:
        made = Capped(made, change_cap, **_given(layers=cap_layers, weight=cap_weight))
    return made if neutral_kl == 0 else Regularised(made, neutral_kl)


def _given(**options: Any) -> dict[str, Any]:
    """Options that are there; the others keep the defaults of what they go to."""
    return {name: value for name, value in options.items() if value is not None}


def _by_name(loss: str, options: dict[str, Any]) -> Loss:
    _choose("loss", loss, names())
    module = importlib.import_module(f"{__name__}.{loss}")
    classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    [kind] = [x for x in classes if issubclass(x, Loss) and is_dataclass(x)]
    for option in options:
        _choose(f"option of loss {loss!r}", option, [field.name for field in fields(kind)])
    return kind(**options)


def _choose(what: str, value: object, allowed: list[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown {what} {value!r}; there are {allowed}.{hint}")
