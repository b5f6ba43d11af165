"""RePS, reference-free preference steering (Wu et al. 2505.20809, equations 4 to 7).

`-log σ(D⁺) - log σ(D⁻)`: the vector at a drawn strength `a` prefers the chosen answer, and the model without it the
rejected one:

    D⁺ = β⁺ log π(y⁺; a)/|y⁺| - log π(y⁻; a)/|y⁻|         β⁺ = max(log π₀(y⁻) - log π₀(y⁺), 1)
    D⁻ = β⁻ log π(y⁻; null)/|y⁻| - log π(y⁺; null)/|y⁺|   β⁻ = max(log π₀(y⁺) - log π₀(y⁻), 1)

`null` removes the direction of the vector from the states that point along it. Adapters without a direction (LoRA)
need `suppress="negative"`, which uses a negative strength instead. The βs need the reference, although the method is
called reference-free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._base import At, Loss, Outputs, positive
from ._needs import Strength


@dataclass(frozen=True)
class RePS(Loss):
    """Preference at drawn strengths in one direction, and the opposite preference without it.

    Args:
        factors: The strengths that `a` is drawn from, once per batch. They should lie around 1, the strength at which
            the vector is used later (the paper draws from {2, 4, ..., 20} and searches for the strength afterwards).
        suppress: What the second term uses: the model with the direction removed (`null`, for steering vectors of
            form `bias`), strength `-a` (`negative`), or nothing (`none`).

    Raises:
        ValueError: `factors` is empty, or one of them is not greater than 0.
    """

    factors: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    suppress: Literal["null", "negative", "none"] = "null"

    def __post_init__(self) -> None:
        if not isinstance(self.factors, list | tuple):
            raise ValueError(f"factors={self.factors!r} must be a list of strengths.")
        object.__setattr__(self, "factors", tuple(self.factors))  # TOML has lists
        if not self.factors:
            raise ValueError("factors=() is empty. Give at least one strength.")
        positive(**{f"factors[{i}]": factor for i, factor in enumerate(self.factors)})
        if self.suppress not in ("null", "negative", "none"):
            raise ValueError(f"suppress={self.suppress!r} must be one of 'null', 'negative', 'none'.")
        suppressed: dict[str, tuple[Strength, ...]] = {"null": ("null",), "negative": tuple(-a for a in self.factors)}
        strengths = (*self.factors, *suppressed.get(self.suppress, ()))
        object.__setattr__(self, "needs", replace(self.needs, reference=True, strengths=strengths))

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(pairs,)`."""
        a = self.factors[int(torch.randint(len(self.factors), (), generator=generator))]
        base = at(0.0)
        ahead = base.rejected.logps - base.chosen.logps
        value = -logsigmoid(_difference(at(a).chosen, at(a).rejected, ahead))
        if self.suppress == "none":
            return value
        without = at("null" if self.suppress == "null" else -a)
        return value - logsigmoid(_difference(without.rejected, without.chosen, -ahead))


def _difference(better: Outputs, worse: Outputs, ahead: Tensor) -> Tensor:
    return ahead.clamp_min(1) * better.mean_logps - worse.mean_logps
