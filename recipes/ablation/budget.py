"""The budget for choosing settings: every arm gets the same number of trials, on validation rows only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, field_validator, model_validator
from scipy.stats import loguniform
from sklearn.model_selection import ParameterSampler

from steertune.recipes.lab.tables import Strength


class BudgetTable(BaseModel, extra="forbid", strict=True):
    """`[budget]`.

    A trial is a learning rate, a number of steps (after which training stops) and, for arms that write into one layer,
    one of `layers`. If `learning_rate` is a list, it holds multiples of the arm's own rate, and each is tried with
    every number of `steps` and every layer. If it is one number, the first trial uses the arm's own rate, and the
    others are drawn log-uniformly within that factor of it, so a few draws can miss much of the range. Arms without a
    layer to choose try more rates instead, in the same range.
    Every trial is trained, and measured on the validation rows: at each of `strengths`, or with "matched" at the
    strength with the grid's KL to the base, where arms are compared (arms without a strength: at 1). If arms were
    tuned for accuracy alone at any strength, every arm would trade fluency for it.
    With `halving` k, all trials first train a fraction of their steps and only the best 1 in k continues, rung by
    rung.
    """

    trials: int = Field(default=4, ge=1)
    learning_rate: float | list[float] = 4.0
    steps: list[int] = [16]
    layers: list[float] = []
    """Fractions of the depth. If empty, the arm's own layer."""
    landings: int = Field(default=1, ge=0)
    """With "matched" strengths: how many trials are added for an arm whose best trial has to be used at other
    strengths than those it was trained at. Each repeats the best trial with its learning rate multiplied by its
    strength."""
    strengths: list[Strength] | Literal["matched"] = "matched"
    halving: int = Field(default=1, ge=1)
    per: Literal["cell", "arm", "grid"] = "arm"
    """How often settings are chosen: for every `cell`; once per `arm`, task and number of examples, on the first
    seed's training set; or once per arm for the whole `grid`, on the first task and the middle number of examples."""

    @field_validator("steps")
    @classmethod
    def _some_steps(cls, steps: list[int]) -> list[int]:
        if not steps or min(steps) < 1:
            raise ValueError(f"must list one number of steps or more, each at least 1 (got {steps})")
        return steps

    @field_validator("layers")
    @classmethod
    def _some_layers(cls, layers: list[float]) -> list[float]:
        if any(not 0 < layer < 1 for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"must list fractions of the depth between 0 and 1, each only once (got {layers})")
        return layers

    @field_validator("learning_rate")
    @classmethod
    def _some_rates(cls, rate: float | list[float]) -> float | list[float]:
        if isinstance(rate, list):
            if not rate or min(rate) <= 0 or not all(map(math.isfinite, rate)) or len(set(rate)) < len(rate):
                raise ValueError(
                    f"must list one multiple of the arm's own rate or more, each above 0 and only once (got {rate})"
                )
        elif not 1 <= rate < math.inf:
            raise ValueError(f"must be a factor of at least 1, or a list of multiples of the arm's rate (got {rate})")
        return rate

    @field_validator("strengths")
    @classmethod
    def _some_strengths(cls, strengths: list[float] | Literal["matched"]) -> list[float] | Literal["matched"]:
        if strengths == "matched":
            return strengths
        if not strengths or min(strengths) <= 0:
            raise ValueError(f"must be 'matched', or list one strength or more, each above 0 (got {strengths})")
        return strengths

    @model_validator(mode="after")
    def _enough_settings(self) -> Self:
        rates, others = self.learning_rate, len(self.steps) * max(1, len(self.layers))
        if isinstance(rates, list) and self.trials != len(rates) * others:
            layers = f" and layers={self.layers}" if self.layers else ""
            raise ValueError(
                f"trials={self.trials}, but learning_rate={rates} with steps={self.steps}{layers} makes "
                f"{len(rates) * others}: set trials to {len(rates) * others}"
            )
        if rates == 1 and self.trials > others:
            raise ValueError(
                f"trials={self.trials}, but with learning_rate=1 there are only {others} settings to try: "
                "raise learning_rate, or lower trials"
            )
        return self

    @property
    def rungs(self) -> list[tuple[int, float]]:
        """`(trials, fraction of their steps)` from the first rung to the last; one rung without halving."""
        counts = [self.trials]
        while self.halving > 1 and counts[-1] > 1:
            counts.append(math.ceil(counts[-1] / self.halving))
        return [(count, self.halving ** (i - len(counts) + 1.0)) for i, count in enumerate(counts)]

    @property
    def measured_at(self) -> int:
        """The number of strengths at which a trial is measured."""
        return 1 if self.strengths == "matched" else len(self.strengths)

    def steps_spent(self) -> float:
        """Mean number of training steps that the tuning costs, at most."""
        return float(np.mean(self.steps)) * (sum(count * fraction for count, fraction in self.rungs) + self.landed)

    @property
    def landed(self) -> int:
        """The largest number of trials that can be added."""
        return self.landings if self.strengths == "matched" else 0


@dataclass(frozen=True)
class Setting:
    """The settings of one trial.

    Attributes:
        rate: Multiplies the arm's own learning rate.
        steps: Training steps.
        layer: Fraction of the depth at which the arm writes; None for the arm's own layer.
        strength: The strength at which the trained adapter is used.
        prompt: Index of the task's instruction that a prompting arm gives.
    """

    rate: float = 1.0
    steps: int = 0
    layer: float | None = None
    strength: float = 1.0
    prompt: int = 0

    def part(self, fraction: float) -> Self:
        """The setting with a fraction of its steps."""
        return replace(self, steps=max(1, round(self.steps * fraction)) if self.steps else 0)

    def trainer(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The training arguments that this setting changes, from all `arguments` of the arm."""
        rate = {"learning_rate": arguments["learning_rate"] * self.rate} if "learning_rate" in arguments else {}
        return {"max_steps": self.steps, **rate}


def draw(budget: BudgetTable, seed: int, layered: bool = True) -> list[Setting]:
    """The settings of all trials: one for every listed multiple, or random draws, of which the first has the arm's own
    learning rate. An arm without a layer to choose (`layered` is False) has the same number of trials, with more
    learning rates."""
    layers: list[float | None] = [*budget.layers] if layered and budget.layers else [None]
    if isinstance(budget.learning_rate, list):
        rates = budget.learning_rate
        if not layered and budget.layers and len(rates) > 1:
            rates = np.geomspace(min(rates), max(rates), len(rates) * len(budget.layers)).tolist()
        return [
            Setting(rate=rate, steps=steps, layer=layer)
            for layer in layers
            for steps in budget.steps
            for rate in rates
        ]
    space: dict[str, Any] = {"steps": budget.steps}
    if layers != [None]:
        space["layer"] = layers
    if budget.learning_rate > 1:
        space["rate"] = loguniform(1 / budget.learning_rate, budget.learning_rate)
    count = min(budget.trials, math.inf if "rate" in space else len(budget.steps) * len(layers))
    drawn = [Setting(**{k: v.item() if isinstance(v, np.generic) else v for k, v in d.items()})
             for d in ParameterSampler(space, int(count), random_state=seed)]  # fmt: skip
    return [replace(drawn[0], rate=1.0), *drawn[1:]]


def untrained_strengths(budget: BudgetTable, layers: int = 1) -> list[float] | Literal["matched"]:
    """Strengths for an arm that is not trained, which spends its trials on strengths: as many as the trials of a
    trained arm measure. Each is tried at all `layers`."""
    if budget.strengths == "matched":
        return "matched"
    low, high = min(budget.strengths), max(budget.strengths)
    count = budget.trials * len(budget.strengths) // layers
    return [float(s) for s in np.geomspace(low, max(high, 8 * low), count)] if count > 1 else [low]
