"""Measure a model on held-out examples; every recipe uses this.

    held_out = HeldOut(base, tokenizer, pairs=test, neutral=neutral_rows())
    observations = evaluate(steered, held_out, ["accuracy", "kl"], {"1": 1.0, "2": 2.0})

What measures share is computed once: the model sees each kind of example once per strength, however many measures use
it, and the base model's results are kept in `held_out`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steertune.recipes.lab import measures
from steertune.recipes.lab.generation import check_strength
from steertune.recipes.lab.observe import OBSERVERS, HeldOut, Observations, Strengths
from steertune.recipes.lab.progress import Bar
from steertune.recipes.lab.rows import BASE, label
from steertune.trainers import NonFiniteError, scaled


def evaluate(
    model: Any,
    held_out: HeldOut,
    names: Iterable[str] | None = None,
    strengths: Strengths | Sequence[float] = (1.0,),
) -> dict[str, Observations]:
    """The observations that the measures need (all measures without `names`). `strengths` are numbers, or a mapping
    from labels to numbers; equal ones are computed once.

    Returns:
        Label of a strength -> observations, for a `Record`.

    Raises:
        NonFiniteError: the model computes NaN or infinity at one of the strengths.
    """
    labels = dict(strengths) if isinstance(strengths, Mapping) else {label(value): value for value in strengths}
    chosen = [measures.get(name) for name in (measures.names() if names is None else names)]
    # several labels can stand for one strength, such as "tuned" and "1", which is then computed once
    different = {repr(value): float(value) for value in labels.values()}
    for value in different.values():
        check_strength(model, value)
    observed: dict[str, Observations] = {key: {} for key in different}
    # every kind of example that some measure needs is seen once per strength; the states below the adapter are kept
    with held_out.remember(model):
        observers = dict.fromkeys(need for measure in chosen for need in measure.needs)
        bar = Bar(len(observers))
        for observer in observers:
            with bar.step(OBSERVERS[observer].step):
                for key, values in OBSERVERS[observer].look(model, held_out, different).items():
                    _check_finite(values, observer, key)
                    observed[key] |= values
        # a measure without an observer computes its own values, at one strength at a time
        observing = [(measure.name, measure.observe) for measure in chosen if measure.observe is not None]
        for name, observe in observing:
            for key, strength in different.items():
                with scaled(model, strength):
                    observed[key][name] = [*observe(model, held_out)]
    return {name: observed[repr(value)] for name, value in labels.items()}


def _check_finite(observations: Observations, observer: str, strength: str) -> None:
    """Refuse observations that are NaN or infinite.

    Raises:
        NonFiniteError: a number is NaN or infinite.
    """
    for name, values in observations.items():
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise NonFiniteError(
                f"{name} of {observer} is NaN or infinite at strength {float(strength):g}: the strength is too large "
                "for the vector and the number format. Use a smaller one, or float32."
            )


def evaluate_base(held_out: HeldOut, names: Iterable[str] | None = None) -> dict[str, Observations]:
    """The observations of the base model, under the label of strength 0. Computed once for the same `held_out`."""
    names = tuple(measures.names() if names is None else names)
    by_names: dict[tuple[str, ...], dict[str, Observations]] = held_out.shared.setdefault("base", {})
    # plain rows if these have a prompt in front: the base is what a model is compared with, not what it imitates
    if names not in by_names:
        by_names[names] = evaluate(held_out.model, held_out.plain or held_out, names, {BASE: 1.0})
    return by_names[names]
