"""The three jobs of a direction at a layer.

read      area under the ROC curve, and d' (the gap of the means in standard deviations), of held-out answers
control   by how much a test pair's margin grows, in nats per token, with the direction added at the study's KL
silence   the share of an instruction's effect on the margin that is gone when the direction is projected out there
          and at all later layers
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from steertune.adapters.blocks import find_blocks
from steertune.recipes.ablation.kl_search import strengths_at
from steertune.recipes.lab.evaluate import evaluate
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.observe import HeldOut, behind
from steertune.recipes.studies.reading.directions import projected, with_vectors
from steertune.trainers import get_view

Pairs = tuple[Tensor, Tensor]
"""States of chosen and of rejected answers at one layer, `(pairs, d)` each."""
_LARGEST = 4096.0  # times a unit vector; residual streams have norms of some hundreds


def read(direction_D: Tensor, pairs: Pairs) -> dict[str, float]:
    """How well a direction tells chosen from rejected answers; d' still differs where the area is 1."""
    chosen_N, rejected_N = ((side @ direction_D).double().numpy() for side in pairs)
    truth = np.repeat([True, False], [len(chosen_N), len(rejected_N)])
    spread = float(np.sqrt((chosen_N.var() + rejected_N.var()) / 2)) or 1.0
    return {
        "auroc": float(roc_auc_score(truth, np.concatenate([chosen_N, rejected_N]))),
        "d_prime": float(chosen_N.mean() - rejected_N.mean()) / spread,
    }


@dataclass
class Bench:
    """The test pairs, the neutral rows to match the KL on, and the instruction, if the task has one.

    Attributes:
        held_out: The test pairs, with the neutral rows.
        kl: The KL at which directions are compared, in nats per token.
        instruction: Asks for the behaviour; "" if the task has none.
    """

    held_out: HeldOut
    kl: float
    instruction: str

    @cached_property
    def depth(self) -> int:
        """Layers of the model."""
        return len(find_blocks(self.held_out.model))

    @cached_property
    def margins(self) -> NDArray[np.float64]:
        """Margins of the base model."""
        return _margins(self.held_out.model, self.held_out)

    @cached_property
    def instructed(self) -> HeldOut:
        """The test pairs, with the instruction in their prompts."""
        return self.held_out.behind(partial(behind, get_view("instruction", text=self.instruction)))

    @cached_property
    def effect(self) -> float:
        """The effect of the instruction on the base model's mean margin."""
        return float((_margins(self.held_out.model, self.instructed) - self.margins).mean())

    def control(self, direction_D: Tensor, layer: int, written: Any = "all") -> dict[str, Any]:
        """Margins with the direction added at a layer, at the positions `written`."""
        model = with_vectors(self.held_out.model, {layer: direction_D}, positions=written)
        with self.held_out.remember(model):
            [point], _ = strengths_at(model, self.held_out, [self.kl], _LARGEST)
            gains = _margins(model, self.held_out, point.strength) - self.margins
        return {"control": float(gains.mean()), "strength": point.strength, "reached": point.reached}

    def silence(self, direction_D: Tensor, layer: int) -> float | None:
        """The share of the instruction's effect that is gone; None if there is no instruction or it has no effect."""
        if not self.instruction or abs(self.effect) < 1e-6:
            return None
        model = projected(self.held_out.model, direction_D, layer, self.depth)
        left = float((_margins(model, self.instructed) - _margins(model, self.held_out)).mean())
        return 1 - left / self.effect


def _margins(model: Any, held_out: HeldOut, strength: float = 1.0) -> NDArray[np.float64]:
    """Margins of the test pairs, in nats per token."""
    [observed] = evaluate(model, held_out, ["margin_per_token"], [strength]).values()
    return np.asarray(Seen(observed)["margin_per_token"], dtype=float)
