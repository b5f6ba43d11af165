"""Main effects of interventions, interactions of pairs, and whether these predict the effects of other sets.

m(S) is the margin of a test pair, in nats per token, with the set S of interventions on:

    E(S)    = m(S) - m({})                      effect
    I(a, b) = E({a, b}) - E({a}) - E({b})       interaction of a pair

An intervention is a layer and a sign, since a vector can be subtracted. To second order, I(-a, b) = -I(a, b), so the
interactions of positive pairs also predict sets with negative members.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, t, ttest_1samp

from steertune.recipes.lab.intervals import Interval, interval

Values: TypeAlias = NDArray[np.float64]
Intervention: TypeAlias = tuple[int, int]
"""A layer, and +1 or -1."""
Set: TypeAlias = frozenset[Intervention]
Margins: TypeAlias = Mapping[Set, Values]
"""Set -> margins of the test pairs, `(pairs,)`."""

NOTHING: Set = frozenset()
FALSE_DISCOVERIES = 0.05


@dataclass(frozen=True)
class Effect:
    """The effect of one intervention alone.

    Attributes:
        layer: The layer of the vector.
        sign: Whether the vector is added or subtracted.
        mean: Mean effect, in nats per token.
        interval: Interval of the mean, over pairs.
    """

    layer: int
    sign: int
    mean: float
    interval: Interval


@dataclass(frozen=True)
class Interaction:
    """The effect of two vectors together beyond the sum of their separate effects.

    Attributes:
        first: The lower layer.
        second: The higher layer.
        mean: Mean interaction, in nats per token.
        control: The same for random directions at these layers, at the same KL.
        p: Corrected p-value of the difference from the controls.
        flagged: Whether it is significant.
    """

    first: int
    second: int
    mean: float
    control: float
    p: float
    flagged: bool


@dataclass(frozen=True)
class Prediction:
    """How well a map predicts sets that it was not made from.

    Attributes:
        main: R² of the sum of main effects.
        pairs: R² when the interactions of pairs are added.
        gain: `pairs - main`, with its interval over sets.
        observed: Mean effect of every set.
        by_main: Its prediction by main effects.
        by_pairs: Its prediction with interactions.
    """

    main: float
    pairs: float
    gain: Interval
    observed: Values
    by_main: Values
    by_pairs: Values


def effect(margins: Margins, of: Set) -> Values:
    """`E(S)` of every pair, `(pairs,)`."""
    return margins[of] - margins[NOTHING]


def main_effects(margins: Margins, layers: Sequence[int]) -> list[Effect]:
    """The effect of every vector alone, added and subtracted."""
    effects = []
    for layer, sign in itertools.product(layers, (1, -1)):
        values = effect(margins, frozenset({(layer, sign)}))
        effects.append(Effect(layer, sign, float(values.mean()), interval(values)))
    return effects


def interaction(margins: Margins, first: int, second: int) -> Values:
    """`I(a, b)` of every pair of answers, `(pairs,)`."""
    a, b = (first, 1), (second, 1)
    alone = effect(margins, frozenset({a})) + effect(margins, frozenset({b}))
    return effect(margins, frozenset({a, b})) - alone


def interactions(margins: Margins, controls: Margins, layers: Sequence[int]) -> list[Interaction]:
    """Find the pairs of layers that interact more than random directions of the same KL at these layers.

    Two tests have to agree, each corrected for the number of pairs (Benjamini and Hochberg, at 5 %): over pairs of
    answers, the difference from the control of the same layers is not 0 (a t test); and over pairs of layers, the
    interaction lies outside what controls show (a prediction interval from their spread).

    Args:
        margins: Margins with the vectors, alone and in pairs.
        controls: Margins with random directions, likewise.
        layers: The layers, in order.
    """
    pairs = list(itertools.combinations(layers, 2))
    ours = {pair: interaction(margins, *pair) for pair in pairs}
    random = {pair: interaction(controls, *pair) for pair in pairs}
    over_answers = [_p_of_mean(ours[pair] - random[pair]) for pair in pairs]
    spread = np.array([random[pair].mean() for pair in pairs])
    over_layers = [_p_outside(float(ours[pair].mean()), spread) for pair in pairs]
    both = np.maximum(false_discovery_control(over_answers), false_discovery_control(over_layers))
    return [
        Interaction(*pair, float(ours[pair].mean()), float(random[pair].mean()), float(p), bool(p < FALSE_DISCOVERIES))
        for pair, p in zip(pairs, both, strict=True)
    ]


def prediction(margins: Margins, layers: Sequence[int], sets: Sequence[Set], draws: int = 2000) -> Prediction:
    """Compare the effects of sets with what main effects and interactions predict.

    Args:
        margins: Margins with single vectors, with pairs, and with these sets.
        layers: The layers that were mapped.
        sets: Other sets of three or more.
        draws: Bootstrap draws over sets.

    Raises:
        ValueError: fewer than three sets, whose variance cannot be estimated.
    """
    if len(sets) < 3:
        raise ValueError(f"{len(sets)} sets are too few for an R². Give at least 3.")
    alone = {(one.layer, one.sign): one.mean for one in main_effects(margins, layers)}
    pairs = {pair: float(interaction(margins, *pair).mean()) for pair in itertools.combinations(layers, 2)}
    observed = np.array([effect(margins, of).mean() for of in sets])
    by_main = np.array([sum(alone[one] for one in of) for of in sets])
    more = np.array(
        [
            sum(s * t * pairs[first, second] for (first, s), (second, t) in itertools.combinations(sorted(of), 2))
            for of in sets
        ]
    )
    by_pairs = by_main + more
    # bootstrap over sets, with the same draws for both predictions
    generator = np.random.default_rng(0)
    gains = []
    for _ in range(draws):
        drawn = generator.integers(len(sets), size=len(sets))
        if np.ptp(observed[drawn]) > 0:
            gains.append(_r2(observed[drawn], by_pairs[drawn]) - _r2(observed[drawn], by_main[drawn]))
    main, with_pairs = _r2(observed, by_main), _r2(observed, by_pairs)
    low, high = np.quantile(gains, [0.025, 0.975])
    gain = Interval(with_pairs - main, float(low), float(high), len(sets), "percentile")
    return Prediction(main, with_pairs, gain, observed, by_main, by_pairs)


def _r2(observed: Values, predicted: Values) -> float:
    return float(1 - ((observed - predicted) ** 2).sum() / ((observed - observed.mean()) ** 2).sum())


def _p_of_mean(values: Values) -> float:
    """p-value of a mean of 0; exactly equal values have no spread to compare with."""
    if np.ptp(values) == 0:
        return 1.0 if values[0] == 0 else 0.0
    test: Any = ttest_1samp(values, 0.0)
    return float(test.pvalue)


def _p_outside(value: float, controls: Values) -> float:
    """p-value of a further control being as far from the controls' mean as `value` is."""
    count, spread = len(controls), float(controls.std(ddof=1)) if len(controls) > 1 else 0.0
    if spread == 0:
        return 1.0 if value == controls.mean() else 0.0
    distance = abs(value - float(controls.mean())) / (spread * np.sqrt(1 + 1 / count))
    return float(2 * t.sf(distance, df=count - 1))
