"""One row of the engine's batch, its scores, and the tokens that end it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from steertune.adapters.monitors import Monitor
from steertune.recipes.serving.jobs import Job, Watched
from steertune.recipes.serving.sampling import Sampler
from steertune.recipes.serving.text import Text


class Row:
    """A job with the text and random numbers of its answer, which are kept when the job is read again."""

    def __init__(self, job: Job, tokenizer: Any) -> None:
        self.job = job
        self.text = Text(tokenizer, job.prompt, job.stops)
        self.sampler = Sampler(job.sampling)
        self.alone = False  # whether a batch with this row has failed


def score_rows(monitors: Mapping[str, Monitor], rows: Sequence[Row], states: Mapping[str, Tensor]) -> None:
    """Score the tokens of answers that were just read, and call the watch of each job.

    Args:
        monitors: The monitors by name.
        rows: The rows of the pass.
        states: The states that each monitor reads, `(rows, tokens, d)`.
    """
    new: list[dict[str, tuple[float, ...]]] = [{} for _ in rows]
    for name, monitor in monitors.items():
        if not any(name in row.job.monitors for row in rows):
            continue
        for i, scores_T in enumerate(monitor.token_scores(states[name])):
            job = rows[i].job
            scores = job.token_scores.setdefault(name, [])
            # a whole row is read at first and after a failure, otherwise its last token
            count = len(job.tokens) - len(scores)
            if name in job.monitors and count:
                new[i][name] = tuple(scores_T[-count:].tolist())
                scores += new[i][name]
    for row, scores in zip(rows, new, strict=True):
        if scores:
            row.job.listener(Watched(scores))
            if row.job.watch is not None:
                row.job.watch.look(row.job)
