"""Fit monitors of transcripts, and choose layer, method, pooling and threshold.

All choices are made on the training rows by cross-fitting: these are divided into folds, near-duplicates together, and
every fold is scored by monitors fitted on the other folds. So threshold and calibration come from scores of rows that
the direction was not fitted on, and no choice depends on the held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from steertune.adapters.monitors import (
    Monitor,
    PooledStates,
    Pooling,
    Tokens,
    calibrate,
    choose_threshold,
    identity,
    make_monitor,
    pooled_states,
    token_scores,
)
from steertune.adapters.types import Site
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.progress import step, track
from steertune.recipes.lab.similarity import By, Frame, near_texts, told_apart_by
from steertune.recipes.lab.similarity import texts as texts_by

BATCH = 8
FOLDS = 5
LAYERS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""The default candidates for the layer, as fractions of the depth."""
_CENTRAL = 0.5


@dataclass(frozen=True)
class Choice:
    """One way of making a monitor."""

    method: str
    pooling: Pooling
    layer: int


@dataclass(frozen=True)
class Settings:
    """How monitors are made.

    Attributes:
        rate: False-positive rate of the threshold.
        layers: Indices of the candidate blocks, from which one is chosen on the training rows.
        methods: Files of `adapters/monitors/fits/`.
        poolings: How scores of tokens are combined into scores of rows.
        site: The site whose states are read.
        tokens: Which tokens are read.
    """

    rate: float
    layers: Sequence[int]
    methods: Sequence[str]
    poolings: Sequence[Pooling]
    site: Site = "block"
    tokens: Tokens = "answer"


@dataclass(frozen=True)
class Task:
    """The model, rows and settings for fitting monitors.

    Attributes:
        model: The model that is read, with its adapters as they are.
        tokenizer: Its tokenizer.
        rows: Training rows, with `prompt` and `completion`.
        bad: Whether each is bad, `(rows,)`.
        settings: How monitors are made.
    """

    model: Any
    tokenizer: Any
    rows: Dataset
    bad: NDArray[np.bool_]
    settings: Settings

    def make(
        self, choice: Choice, states: PooledStates, known: Mapping[str, Any], kept: NDArray[np.bool_] | None = None
    ) -> Monitor:
        """A monitor of the training rows, or of those in `kept`; `known` identifies model and tokenizer."""
        return make_monitor(
            choice.method, choice.pooling, self.model, self.tokenizer, choice.layer,
            _sides(states, choice, self.bad, kept), self.settings.site, self.settings.tokens, known,
        )  # fmt: skip


def read_batches(tokenizer: Any, rows: Dataset) -> list[dict[str, Any]]:
    """Rows with `prompt` and `completion` as batches for monitors, in the order of the rows.

    The token that ends an answer is not read, since generation stops there; so a text has the same scores as when it
    was generated.
    """
    return [
        {**batch.inputs, "labels": _without_end(batch.labels, tokenizer.eos_token_id)}
        for batch in batches(tokenizer, rows, BATCH)
    ]


def _without_end(labels_BT: torch.Tensor, end: int | None) -> torch.Tensor:
    """Labels without the token that ends an answer and what the chat template adds after it; it is kept if the answer
    is that token alone."""
    shortened_BT = labels_BT.clone()
    for labels_T in shortened_BT:
        places = (labels_T != -100).nonzero()[:, 0]
        ends = (labels_T[places] == end).nonzero()[:, 0].tolist() if end is not None else []
        if ends and ends[-1] > 0:
            labels_T[places[ends[-1] :]] = -100
    return shortened_BT


def scores_of(monitors: Sequence[Monitor], model: Any, tokenizer: Any, rows: Dataset) -> list[list[float]]:
    """The score of every row by each of the monitors, all computed in one pass.

    Args:
        monitors: The monitors.
        model: The model that is read, with its adapters as they are.
        tokenizer: Its tokenizer.
        rows: With `prompt` and `completion`.
    """
    if not len(rows):
        return []
    passes = token_scores(monitors, model, track(read_batches(tokenizer, rows), "batch"))
    return [[m.pool(scores_T) for m, scores_T in zip(monitors, row, strict=True)] for row in passes]


def fit_monitors(task: Task) -> list[tuple[Monitor, NDArray[np.float64]]]:
    """Fit a monitor for every method and pooling, at the layer that the training rows choose.

    Returns:
        The monitors, with threshold and calibration, and the cross-fitted scores of the training rows; the monitor
        that ranks these best comes first.

    Raises:
        MonitorError: the innocent rows cannot resolve the false-positive rate, or there are no bad or innocent rows.
    """
    settings = task.settings
    batches = read_batches(task.tokenizer, task.rows)
    with step("states"):
        states = pooled_states(task.model, track(batches, "batch"), settings.layers, settings.site, settings.tokens)
    folds = folds_of(task.rows, task.bad)
    known = identity(task.model, task.tokenizer)
    fitted = _cross_fitted(task, states, folds, known, batches)
    made: list[tuple[Monitor, NDArray[np.float64]]] = []
    for method in settings.methods:
        for pooling in settings.poolings:
            choices = [Choice(method, pooling, layer) for layer in settings.layers]
            best = max(choices, key=lambda choice: _rank(fitted[choice], task.bad, choice, settings.layers))
            monitor = task.make(best, states, known)
            made.append((with_threshold(monitor, fitted[best], task.bad, settings.rate), fitted[best]))
    order = sorted(range(len(made)), key=lambda i: quality(made[i][1], task.bad), reverse=True)
    return [made[i] for i in order]


def with_threshold(monitor: Monitor, scores: NDArray[np.float64], bad: NDArray[np.bool_], rate: float) -> Monitor:
    """The monitor with a threshold and a calibration, from scores of rows that it was not fitted on (NaN: no score).

    Raises:
        MonitorError: the innocent rows cannot resolve the false-positive rate.
    """
    scored = ~np.isnan(scores)
    threshold = choose_threshold(scores[scored & ~bad].tolist(), rate)
    calibration = calibrate(scores[scored].tolist(), bad[scored].tolist())
    return replace(monitor, threshold=threshold, calibration=calibration)


def folds_of(rows: Dataset, bad: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The fold whose fit leaves each row out, `(rows,)`; -1 if none does. Near-duplicates share a fold. If all bad
    rows are near-duplicates of each other, or there is only one, no fit leaves them out, since it would be impossible
    without them.
    """
    listed = rows.to_list()
    groups = groups_of(listed, told_apart_by(listed))
    with_bad = [*dict.fromkeys(groups[bad].tolist())]
    others = [group for group in dict.fromkeys(groups.tolist()) if group not in {*with_bad}]
    folds = np.full(len(listed), -1)
    parts = [with_bad, others] if len(with_bad) > 1 else [others]
    count = min(FOLDS, len(parts[0]))
    if count > 1:
        # in turn, so that every fold leaves out some bad rows and keeps others
        for part in parts:
            for number, group in enumerate(part):
                folds[groups == group] = number % count
    return folds


def groups_of(rows: Sequence[dict[str, Any]], by: By) -> NDArray[np.int64]:
    """A number for every row, the same for near-duplicates, `(rows,)`."""
    row_texts = texts_by(rows, by)
    parent = [*range(len(rows))]

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, j in near_texts(row_texts, row_texts, Frame.of(row_texts)):
        parent[root(max(i, j))] = root(min(i, j))
    return np.array([root(i) for i in range(len(rows))])


def _cross_fitted(
    task: Task, states: PooledStates, folds: NDArray[np.int64], known: Mapping[str, Any], batches: Sequence[Any]
) -> dict[Choice, NDArray[np.float64]]:
    """The scores of the training rows by monitors that were not fitted on them; NaN without such a monitor."""
    settings = task.settings
    numbers = sorted({*folds.tolist()} - {-1})
    # poolings that are fitted on the same states share their directions
    kinds = {pooling.fitted_on: pooling for pooling in settings.poolings}
    monitors: list[Monitor] = []
    places: dict[tuple[int, str, str, int], int] = {}
    with step("fit"):
        for fold, method in track([(fold, method) for fold in numbers for method in settings.methods]):
            for kind, pooling in kinds.items():
                for layer in settings.layers:
                    places[fold, method, kind, layer] = len(monitors)
                    monitors.append(task.make(Choice(method, pooling, layer), states, known, folds != fold))
    choices = [Choice(*parts) for parts in product(settings.methods, settings.poolings, settings.layers)]
    scores = {choice: np.full(len(task.rows), np.nan) for choice in choices}
    if not monitors:
        return scores
    with step("scores"):
        for i, row in enumerate(token_scores(monitors, task.model, track(batches, "batch"))):
            for choice, values in scores.items():
                place = places.get((int(folds[i]), choice.method, choice.pooling.fitted_on, choice.layer))
                if place is not None:
                    values[i] = float(choice.pooling(row[place]))
    return scores


def _sides(
    states: PooledStates, choice: Choice, bad: NDArray[np.bool_], kept: NDArray[np.bool_] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of the bad and of the innocent rows in a fit."""
    of_layer = getattr(states, choice.pooling.fitted_on)[choice.layer]
    used = np.ones(len(bad), dtype=bool) if kept is None else kept
    return of_layer[torch.from_numpy(bad & used)], of_layer[torch.from_numpy(~bad & used)]


def _rank(
    scores: NDArray[np.float64], bad: NDArray[np.bool_], choice: Choice, layers: Sequence[int]
) -> tuple[float, float, float]:
    """The quality of a layer, by which candidates are ranked; ties go to the layer closest to their middle."""
    middle = layers[0] + _CENTRAL * (layers[-1] - layers[0])
    return (*quality(scores, bad), -abs(choice.layer - middle))


def quality(scores: NDArray[np.float64], bad: NDArray[np.bool_]) -> tuple[float, float]:
    """Area under the ROC curve, and the difference of the means in standard deviations, which breaks ties at an area
    of 1; zeros if no bad row was left out."""
    scored = ~np.isnan(scores)
    if not has_both(bad[scored]):
        return 0.0, 0.0
    first, second = scores[scored & bad], scores[scored & ~bad]
    spread = float(np.sqrt((first.var() + second.var()) / 2)) or 1.0
    return round(float(roc_auc_score(bad[scored], scores[scored])), 6), float(first.mean() - second.mean()) / spread


def has_both(bad: NDArray[np.bool_]) -> bool:
    """Whether some rows are bad and some are not."""
    return bool(len(bad)) and bool(bad.any()) and not bool(bad.all())
