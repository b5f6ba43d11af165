"""Monitors: directions that are read while a model runs, with a threshold for a given false-positive rate.

    monitor = monitors.load("my-monitor", model, tokenizer)     # refuses another base model, layer or tokenizer
    scores = monitors.row_scores(monitor, model, batches)       # one for every answer
    flagged = [monitor.flags(score) for score in scores]

A monitor is one direction (`fits/`: mean difference, LDA, logistic regression, SGD) at one site of one layer, whose
scores of single tokens are pooled into a score of the row (`pooling/`: mean, max, last, rolling mean, softmax). It is
fitted on bad and innocent rows, and reads a model as it runs, alongside steering vectors and other adapters.
`steertune monitor` fits, compares and tests monitors; `steertune watch` scores traffic with one.
"""

from __future__ import annotations

from . import fits, pooling
from .live import LiveScores, check_live
from .monitor import Calibration, Monitor, calibrate, fit_direction, identity, make_monitor, module_at
from .pooling import Pooling
from .reading import PooledStates, Tokens, pooled_states, read_mask
from .saved import load, read, save
from .scoring import row_scores, token_scores
from .threshold import MonitorError, Threshold, check_rate, choose_threshold, rows_needed

__all__ = [
    "Calibration",
    "LiveScores",
    "Monitor",
    "MonitorError",
    "PooledStates",
    "Pooling",
    "Threshold",
    "Tokens",
    "calibrate",
    "check_live",
    "check_rate",
    "choose_threshold",
    "fit_direction",
    "fits",
    "identity",
    "load",
    "make_monitor",
    "module_at",
    "pooled_states",
    "pooling",
    "read",
    "read_mask",
    "row_scores",
    "rows_needed",
    "save",
    "token_scores",
]
