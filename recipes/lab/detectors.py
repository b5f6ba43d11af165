"""Detectors of bad rows: monitors and, for comparison, text classifiers, tested on rows they were not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from steertune.adapters.monitors import Monitor, calibrate, choose_threshold
from steertune.recipes.lab.detection import Detection, detection
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.generation import check_context
from steertune.recipes.lab.monitor_data import Samples
from steertune.recipes.lab.monitoring import Settings, Task, fit_monitors, folds_of, has_both, quality, scores_of
from steertune.recipes.lab.progress import Bar
from steertune.recipes.lab.text_baseline import FEATURES, TextFeatures, text_scores, texts_of


@dataclass(frozen=True)
class Detector:
    """A detector that scores rows, and its result on held-out rows.

    Attributes:
        name: Its name on pages.
        monitor: None for a text classifier.
        fitted: Cross-fitted scores of the training rows; NaN for rows that are in the fit of every fold.
        scores: Scores of the held-out rows.
        threshold: Rows with a higher score are flagged.
        result: Measured on the held-out rows; None if these are all bad or all innocent.
    """

    name: str
    monitor: Monitor | None
    fitted: NDArray[np.float64]
    scores: list[float]
    threshold: float
    result: Detection | None


def fit_and_test(samples: Samples, model: Any, tokenizer: Any, settings: Settings) -> list[Detector]:
    """Monitors and text classifiers, fitted and chosen on the training rows and tested on the others.

    Args:
        samples: The rows.
        model: The model that monitors read, with its adapters as they are.
        tokenizer: Its tokenizer.
        settings: How monitors are made.

    Returns:
        The monitors, then the classifiers; within each kind, the one that ranks the training rows best comes first.

    Raises:
        ArmError: a row is longer than the model's context.
        MonitorError: the innocent training rows cannot resolve the false-positive rate.
    """
    bar = Bar(9)
    train, test = (
        readable(part.dataset(), tokenizer) if part.rows else None for part in (samples.train, samples.test)
    )
    assert train is not None
    for rows, what in ((train, "The rows to fit on"), (test, "The rows to test on")):
        if rows is not None:
            check_context(model, tokenizer, rows, 0, what, "Shorten or remove such rows.")
    with bar.step("monitors", 6):
        made = fit_monitors(Task(model, tokenizer, train, samples.train.bad, settings))
    with bar.step("held-out rows", 2):
        tested = detectors(made, model, tokenizer, test, samples.test.bad)
    with bar.step("TF-IDF of the text"):
        folds = folds_of(train, samples.train.bad)
        texts, bad = (texts_of(samples.train.rows), texts_of(samples.test.rows)), (samples.train.bad, samples.test.bad)
        of_text = [text_detector(features, texts, bad, folds, settings.rate) for features in FEATURES]
    return [*tested, *sorted(of_text, key=lambda one: quality(one.fitted, samples.train.bad), reverse=True)]


def text_detector(
    features: TextFeatures,
    texts: tuple[Sequence[str], Sequence[str]],
    bad: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    folds: NDArray[np.int64],
    rate: float,
) -> Detector:
    """The baseline, treated like a monitor: cross-fitted on the training rows, tested on the others.

    Args:
        features: The features of a text that are counted.
        texts: The texts of the training rows, and of the held-out rows.
        bad: Whether each of these rows is bad.
        folds: The fold of each training row, from `folds_of`.
        rate: False-positive rate of the threshold.
    """
    (train, test), (bad_train, bad_test) = texts, bad
    fitted = np.full(len(train), np.nan)
    for fold in sorted({*folds.tolist()} - {-1}):
        out = np.flatnonzero(folds == fold).tolist()
        rest = np.flatnonzero(folds != fold).tolist()
        fitted[out] = text_scores(
            features, [train[i] for i in rest], bad_train[rest].tolist(), [train[i] for i in out]
        )
    scored = ~np.isnan(fitted)
    threshold = choose_threshold(fitted[scored & ~bad_train].tolist(), rate).value
    scores = text_scores(features, train, bad_train.tolist(), test)
    probability = calibrate(fitted[scored].tolist(), bad_train[scored].tolist())
    result = detection(scores, bad_test.tolist(), threshold, probability) if has_both(bad_test) else None
    return Detector(f"TF-IDF of {features}", None, fitted, scores, threshold, result)


def detectors(
    made: Sequence[tuple[Monitor, NDArray[np.float64]]], model: Any, tokenizer: Any, rows: Dataset | None,
    bad: NDArray[np.bool_],
) -> list[Detector]:  # fmt: skip
    """Test fitted monitors on held-out rows, in one pass for all of them."""
    monitors = [monitor for monitor, _ in made]
    scores_by_row = [] if rows is None else scores_of(monitors, model, tokenizer, rows)
    columns = [*zip(*scores_by_row, strict=True)] or [()] * len(monitors)
    tested = []
    for (monitor, fitted), scores in zip(made, columns, strict=True):
        assert monitor.threshold is not None
        result = None
        if has_both(bad):
            result = detection(scores, bad.tolist(), monitor.threshold.value, monitor.calibration)
        name = f"{monitor.method}, {monitor.pooling.name}, layer {monitor.layer}"
        tested.append(Detector(name, monitor, fitted, [*scores], monitor.threshold.value, result))
    return tested
