"""The model of a tuning's best trial, kept so that its cell need not train it or find its strength again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from steertune.recipes.ablation.kl_search import MeasuredKLs
from steertune.recipes.ablation.trials import Trial, best_first


@dataclass
class Trained:
    """A trained model.

    Attributes:
        model: The model.
        cost: What training it cost.
        kls: Its KLs to the base on neutral text, as far as they were measured.
    """

    model: Any
    cost: dict[str, Any]
    kls: MeasuredKLs = field(default_factory=dict)


class Winner:
    """The best trial of a tuning so far. It holds one model at most."""

    def __init__(self) -> None:
        self._place: Hashable = None
        self._trials: list[Trial] = []
        self._trained: Trained | None = None

    def offer(self, place: Hashable, trials: Sequence[Trial], trained: Trained) -> None:
        """Keep a trial if it is the best one so far.

        Args:
            place: On which rows, from which seed and with which setting it was trained.
            trials: The trial at every strength.
            trained: Its model.
        """
        ranked = best_first([*self._trials, *trials])
        if ranked and any(trial is ranked[0] for trial in trials):
            self._place, self._trials, self._trained = place, [*trials], trained

    @property
    def kls(self) -> list[tuple[float, int, float]]:
        """Every measured KL of the model: strength, number of rows, KL."""
        return [] if self._trained is None else [(*at, kl) for at, kl in self._trained.kls.items()]

    def take(self, place: Hashable) -> Trained | None:
        """Return the kept model if it was trained at this place, else None. Either way it is no longer kept."""
        trained = self._trained if place == self._place else None
        self.clear()
        return trained

    def clear(self) -> None:
        """Drop the model, which may be large."""
        self._place, self._trials, self._trained = None, [], None
