"""One row of the engine's batch, how it is scored, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steertune.adapters.monitors import Monitor
from steertune.recipes.serving.jobs import Job
from steertune.recipes.serving.sampling import Sampler
from steertune.recipes.serving.text import Text


class Row:
    """A job with the text and random numbers of its answer, which are kept when the job is read again."""

    def __init__(self, job: Job, tokenizer: Any) -> None:
        self.job = job
        self.text = Text(tokenizer, job.prompt, job.stops)
        self.sampler = Sampler(job.sampling)
        self.alone = False  # whether a batch with this row has failed


def score_rows(monitor: Monitor, rows: Sequence[Row], h_BTD: Tensor) -> None:
    """Score the answers' tokens that were just read: all tokens so far where prompts were read too, else the last
    one."""
    for row, scores_T in zip(rows, monitor.token_scores(h_BTD), strict=True):
        count = len(row.job.tokens)
        if count <= len(scores_T):
            row.job.token_scores = scores_T[len(scores_T) - count :].tolist()
        else:
            row.job.token_scores.append(float(scores_T[-1]))


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those of the model's generation configuration, else the tokenizer's."""
    config = model.generation_config
    ids = None if config is None else config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return set() if ids is None else {*ids} if isinstance(ids, list) else {ids}
