"""The page of a map: main effects with their first-order estimates, interactions, and the test of the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Drawing
from scipy.stats import spearmanr

from steertune.recipes.lab.intervals import Interval
from steertune.recipes.lab.pages import Figure, Page, Section, Table, Text, escape
from steertune.recipes.mapping.effects import FALSE_DISCOVERIES, Effect, Interaction, Prediction


@dataclass(frozen=True)
class Spread:
    """One layer against several at the same KL, on rows on which neither was chosen.

    Attributes:
        layer: The layer whose vector alone has the largest effect.
        layers: The three layers with the largest effects, scaled together.
        scale: Factor of their unit vectors.
        single: Mean effect of the one, in nats per token.
        several: Mean effect of the three.
        difference: `several - single`, with its interval over pairs.
    """

    layer: int
    layers: list[int]
    scale: float
    single: float
    several: float
    difference: Interval


@dataclass(frozen=True)
class MapResult:
    """Everything on the page.

    Attributes:
        task: The task that was mapped.
        direction: The kind of the vectors.
        kl: KL of every unit vector alone, in nats per token.
        rows: Number of test pairs.
        strengths: Layer -> length of the unit vector, relative to the direction.
        effects: Main effects.
        gradient: Layer -> first-order estimate of the added vector's mean effect.
        interactions: Interactions of all pairs of layers.
        prediction: Prediction of sets that the map was not made from.
        spread: One layer against several.
        command: The command line.
        notes: Notes on the rows.
    """

    task: str
    direction: str
    kl: float
    rows: int
    strengths: Mapping[int, float]
    effects: Sequence[Effect]
    gradient: Mapping[int, float]
    interactions: Sequence[Interaction]
    prediction: Prediction
    spread: Spread
    command: str
    notes: Sequence[str] = ()

    @property
    def added(self) -> dict[int, Effect]:
        """Layer -> main effect of the added vector."""
        return {effect.layer: effect for effect in self.effects if effect.sign > 0}


def page_of(result: MapResult) -> Page:
    """The page."""
    return Page(
        f"Map of interventions: {escape(result.task)}",
        [
            Section(
                "", [Text(_answer(result)), Figure(main_effects(result), "effects", "Main effect of every layer")]
            ),
            Section("Main effects", [Text(_about_gradient(result)), Table(_effects(result), "effects")]),
            Section(
                "Pairs",
                [
                    Figure(triangle(result), "interactions", "Interaction of every pair of layers"),
                    Text(_about_pairs(result)),
                ],
            ),
            Section(
                "Does the map predict?",
                [
                    Figure(predicted(result), "prediction", "Predicted and observed effects of other sets"),
                    Text(_about_prediction(result)),
                ],
            ),
            Section("Use", [Text(_use(result))]),
            Section("How it was made", [Text(_method(result))]),
        ],
    )


def _answer(result: MapResult) -> str:
    flagged = [one for one in result.interactions if one.flagged]
    best = max(result.added.values(), key=lambda effect: effect.mean)
    pairs = f"{len(flagged)} of {len(result.interactions)} pairs of layers interact more than random directions do"
    gain = result.prediction.gain
    verdict = (
        "Interactions improve the prediction of other sets"
        if gain.low > 0
        else "Interactions make the prediction of other sets worse"
        if gain.high < 0
        else "Whether interactions improve the prediction of other sets is undecided"
    )
    return (
        f"At a KL of {result.kl:g} alone, the vector at layer {best.layer} does most: {best.interval} nats per token. "
        f"{pairs}. {verdict}: R² {result.prediction.main:.2f} with main effects, {result.prediction.pairs:.2f} with "
        f"pairs, a gain of {gain}."
    )


def _about_gradient(result: MapResult) -> str:
    added = result.added
    layers = sorted(added)
    ranks: Any = spearmanr([added[i].mean for i in layers], [result.gradient[i] for i in layers])
    return (
        f"Mean effect of each unit vector on the margin (chosen minus rejected, nats per token) over {result.rows} "
        "test pairs, with 95 % intervals over pairs; the dots are the estimate of one backward pass. Rank correlation "
        f"of the estimate with the effect: {ranks.statistic:+.2f} over {len(layers)} layers. Where the two differ, "
        "the effect is not linear in the vector, although it is small."
    )


def _effects(result: MapResult) -> pd.DataFrame:
    by_place = {(effect.layer, effect.sign): effect for effect in result.effects}
    rows = [
        {
            "layer": layer,
            "length of the unit vector": f"{result.strengths[layer]:.2f}",
            "added": str(by_place[layer, 1].interval),
            "subtracted": str(by_place[layer, -1].interval),
            "gradient": f"{result.gradient[layer]:+.3f}",
        }
        for layer in sorted(result.strengths)
    ]
    return pd.DataFrame(rows)


def _about_pairs(result: MapResult) -> str:
    flagged = [one for one in result.interactions if one.flagged]
    means = [one.mean - one.control for one in result.interactions]
    listed = "; ".join(f"{one.first} and {one.second}: {one.mean:+.3f} (p {one.p:.2g})" for one in flagged)
    below = sum(mean < 0 for mean in means)
    return (
        "Interaction: what two vectors do together minus what each does alone, in nats per token. Framed pairs differ "
        "from random directions of the same KL at these layers, over pairs of answers and among the controls of all "
        f"layers (corrected p below {FALSE_DISCOVERIES:g}). "
        + (f"Flagged: {listed}. " if flagged else "None is flagged. ")
        + f"Of {len(means)} pairs, {below} are below their control (less than additive)."
    )


def _about_prediction(result: MapResult) -> str:
    prediction = result.prediction
    return (
        f"{len(prediction.observed)} random sets of 3 to 5 layers with random signs, none of which the map was made "
        f"from. R² of the sum of main effects: {prediction.main:.3f}; with interactions of pairs: "
        f"{prediction.pairs:.3f}. Gain: {prediction.gain}, over sets. R² is below 0 where the mean of all sets would "
        "predict better."
    )


def _use(result: MapResult) -> str:
    spread = result.spread
    better = (
        "Spread the vector over these layers"
        if spread.difference.low > 0
        else f"Keep to layer {spread.layer}"
        if spread.difference.high < 0
        else "Neither is clearly better"
    )
    return (
        f"On other pairs, at a KL of {result.kl:g} for each choice: layer {spread.layer} alone {spread.single:+.3f}, "
        f"layers {', '.join(map(str, spread.layers))} together, each at {spread.scale:.2f} of its unit vector, "
        f"{spread.several:+.3f} nats per token. Difference: {spread.difference}. {better}."
    )


def _method(result: MapResult) -> str:
    notes = " ".join(result.notes)
    return (
        f"Vectors: {escape(result.direction)}, one per layer, each scaled to a KL of {result.kl:g} nats per token on "
        "neutral text; controls are random directions, scaled likewise. Main effects, pairs and controls are measured "
        f"on the same {result.rows} pairs. Not measured: how a change persists from layer to layer, and through which "
        f"attention or MLP it goes. {notes} Made by `{escape(result.command)}`."
    )


def main_effects(result: MapResult) -> Drawing:
    """Bars with intervals, and the first-order estimate as dots."""
    added, layers = result.added, sorted(result.added)
    figure = Drawing(figsize=(7.5, 3.2), layout="constrained")
    axis = figure.subplots()
    means = np.array([added[layer].mean for layer in layers])
    ends = np.array([(added[layer].interval.low, added[layer].interval.high) for layer in layers]).T
    places = np.arange(len(layers))
    errors = np.nan_to_num(np.abs(ends - means), posinf=0.0)
    axis.bar(places, means, yerr=errors, color="#88aacc", capsize=3, label="effect")
    axis.plot(places, [result.gradient[layer] for layer in layers], "o", color="#bb4422", label="gradient's estimate")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(places, [str(layer) for layer in layers])
    axis.set_xlabel("layer")
    axis.set_ylabel("margin, nats per token")
    axis.legend(frameon=False)
    return figure


def triangle(result: MapResult) -> Drawing:
    """A heat map of interactions; significant pairs are framed."""
    layers = sorted(result.strengths)
    grid = np.full((len(layers), len(layers)), np.nan)
    for one in result.interactions:
        grid[layers.index(one.second), layers.index(one.first)] = one.mean
    largest = float(np.nanmax(np.abs(grid))) or 1.0
    figure = Drawing(figsize=(6.0, 4.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid, cmap="RdBu_r", vmin=-largest, vmax=largest)
    for one in result.interactions:
        if one.flagged:
            x, y = layers.index(one.first), layers.index(one.second)
            axis.plot(
                [x - 0.5, x + 0.5, x + 0.5, x - 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5, y - 0.5], "k"
            )
    axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axis.set_xlabel("lower layer")
    axis.set_ylabel("higher layer")
    figure.colorbar(image, ax=axis, label="interaction, nats per token")
    return figure


def predicted(result: MapResult) -> Drawing:
    """Observed effects of sets against both predictions."""
    prediction = result.prediction
    figure = Drawing(figsize=(5.6, 4.4), layout="constrained")
    axis = figure.subplots()
    both = (
        ("main effects", prediction.by_main, "o", prediction.main),
        ("and pairs", prediction.by_pairs, "x", prediction.pairs),
    )
    for name, values, marker, share in both:
        axis.plot(values, prediction.observed, marker, label=f"{name} (R² {share:.2f})")
    ends = [min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])]
    axis.plot(ends, ends, color="grey", linewidth=0.8)
    axis.set_xlabel("predicted effect, nats per token")
    axis.set_ylabel("observed effect")
    axis.legend(frameon=False)
    return figure
