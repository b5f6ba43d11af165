"""Training losses. Each file is one loss, named by the file; a new file is a new loss."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from dataclasses import fields, is_dataclass
from typing import Any

from ._base import At, Loss, Outputs
from ._capped import Capped
from ._contrast import Contrast, Contrasted
from ._needs import Needs, Strength
from ._regularised import Average, Regularised
from ._staged import Staged
from ._states import Where
from ._wrapped import parts

__all__ = ["At", "Loss", "Needs", "Outputs", "Staged", "Strength", "get_loss", "names", "options_of", "parts"]


def names() -> list[str]:
    """The names of all losses: the files of this folder that do not start with an underscore."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get_loss(
    loss: str | Loss,
    *,
    contrast: Contrast = "paired",
    neutral_kl: float = 0.0,
    neutral_average: Average | None = None,
    change_cap: float = 0.0,
    cap_layers: Where | list[int | float] | None = None,
    cap_weight: float | None = None,
    then: str | Loss | None = None,
    then_after: float | None = None,
    **options: Any,
) -> Loss:
    """Make a loss from its name and hyperparameters, and add terms to it.

    Args:
        loss: The name of a file of this folder, or a `Loss` object.
        contrast: What a loss on pairs contrasts the chosen answer with: `paired`, `unpaired` or `none`. `difference`
            turns a loss on single answers into a loss on pairs. See `steertune.losses.Contrasted`.
        neutral_kl: Weight of a KL divergence from the base model on neutral text.
        neutral_average: How it is averaged over tokens: `mean` (the default), or `rms`, which gives more weight to
            tokens that change a lot.
        change_cap: Changes of the residual stream that are longer than this are penalised.
        cap_layers: The layers where they are penalised (0.67 by default).
        cap_weight: The weight of that penalty (1 by default).
        then: The loss that takes over later, a name (with its defaults) or an object.
        then_after: The share of all steps after which `then` takes over (0.5 by default).
        options: Hyperparameters of the loss, if it is given by name.

    Raises:
        ValueError: an unknown name or option (the message suggests the nearest one), hyperparameters for an object,
            `then` together with `neutral_kl` or `change_cap`, or an option of a term that is not used.
    """
    if change_cap == 0:
        _refuse_without("change_cap", cap_layers=cap_layers, cap_weight=cap_weight)
    if neutral_kl == 0:
        _refuse_without("neutral_kl", neutral_average=neutral_average)
    if then is None:
        _refuse_without("then", then_after=then_after)
    elif change_cap or neutral_kl:
        raise ValueError(
            "then= cannot be combined with change_cap or neutral_kl. Add these to the two losses, and pass them as "
            "objects."
        )
    if isinstance(loss, Loss) and options:
        raise ValueError(f"Options {sorted(options)} go with a loss name, not with an object.")
    result = loss if isinstance(loss, Loss) else _by_name(loss, options)

    # Each term wraps the loss; options that are None keep the defaults of the term.
    if contrast != "paired":
        result = Contrasted(result, contrast)
    if then is not None:
        result = Staged(result, get_loss(then), **_without_none(share=then_after))
    if change_cap != 0:
        result = Capped(result, change_cap, **_without_none(layers=cap_layers, weight=cap_weight))
    return result if neutral_kl == 0 else Regularised(result, neutral_kl, **_without_none(average=neutral_average))


def options_of(loss: str) -> list[str]:
    """The options that `get_loss` takes for a loss: its hyperparameters, and the terms that any loss can have.

    Raises:
        ValueError: the loss is unknown.
    """
    terms = [p.name for p in inspect.signature(get_loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [*(field.name for field in fields(_kind(loss))), *terms]


def _refuse_without(term: str, **options: Any) -> None:
    """Refuse options of a term that is not used, which would be silently ignored."""
    for option, value in _without_none(**options).items():
        raise ValueError(f"{option}={value!r} has no effect without {term}. Set {term} too, or leave it out.")


def _without_none(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _by_name(loss: str, options: dict[str, Any]) -> Loss:
    """Make a loss from its name and options."""
    kind = _kind(loss)
    for option in options:
        _check_choice(f"option of loss {loss!r}", option, [field.name for field in fields(kind)])
    return kind(**options)


def _kind(loss: str) -> Any:
    """The dataclass that the file of a loss defines."""
    _check_choice("loss", loss, names())
    module = importlib.import_module(f"{__name__}.{loss}")
    # Helper classes and imported losses may be in the same file.
    classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    [kind] = [x for x in classes if issubclass(x, Loss) and is_dataclass(x)]
    return kind


def _check_choice(what: str, value: object, allowed: list[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown {what} {value!r}. Available: {', '.join(map(repr, allowed)) or 'none'}.{hint}")
