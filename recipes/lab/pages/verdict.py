"""The first line of a training's page: what came out, whether it is too much, and which strength to use."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from steertune.recipes.lab import measures
from steertune.recipes.lab.observe import Observations
from steertune.recipes.lab.rows import BASE, Record

TRAINED = "1"
MAX_KL = 1.0
"""Nats per token on neutral text. A behaviour that shows everywhere, such as lower case, costs about 0.5 by itself."""
MAX_REPETITION = 0.1
"""Share of repeated word triples above the base's."""
VISIBLE = 0.25
"""Share of answers by which a behaviour must rise to be noticed."""


def verdict(record: Record) -> str:
    """One paragraph in Markdown.

    Args:
        record: The base model at strength 0, the trained one at strength 1 and maybe at others.
    """
    means = record.means()
    positive = sorted((at for at in means if float(at) > 0), key=float)
    harmless = [at for at in positive if not _excess(means, at)]
    shown = {at: _shown(record.observations[at]) for at in (BASE, *positive) if "score" in record.observations[at]}
    best = max(harmless, key=lambda at: (shown.get(at, 0.0), -abs(float(at) - 1)), default=None)
    excess = _excess(means, TRAINED)
    if excess and best is None:
        return (
            f"**Every strength is too much: {_excess(means, positive[0])} at strength {positive[0]}.** Lower "
            "`trainer.learning_rate` or `trainer.max_steps`, or add `loss.neutral_kl`."
        )
    if excess:
        return f"**Strength 1 is too much: {excess}. Use strength {best}**{_in_answers(record, shown, best)}."
    if not shown:
        return _without_scorer(record)
    gain = {at: shown[at] - shown[BASE] for at in harmless}
    if gain[TRAINED] >= VISIBLE:
        return f"**The answers changed{_in_answers(record, shown, TRAINED)}**, within the limits on side effects."
    if best is not None and gain[best] >= VISIBLE:
        return f"**Strength 1 shows little. Use strength {best}{_in_answers(record, shown, best)}.**"
    return (
        f"**Nothing visible happened{_in_answers(record, shown, TRAINED)}.** Raise `trainer.learning_rate` or "
        "`trainer.max_steps`, or give more examples."
    )


def _excess(means: Mapping[str, Mapping[str, float]], at: str) -> str:
    """Which limits a strength exceeds, in words; "" if none."""
    limits = {"kl": MAX_KL, "repetition": means[BASE].get("repetition", 0.0) + MAX_REPETITION}
    exceeded = {name: limit for name, limit in limits.items() if means[at].get(name, 0.0) > limit}
    return " and ".join(
        f"{measures.get(name).title} is {means[at][name]:.2f} (limit {limit:.2f})" for name, limit in exceeded.items()
    )


def _shown(observations: Observations) -> float:
    """Share of the answers that show the behaviour."""
    return float(np.mean([score >= 0.5 for score in observations["score"] if score is not None]))


def _in_answers(record: Record, shown: Mapping[str, float], at: str | None) -> str:
    """How many answers show the behaviour, before and at a strength."""
    if at not in shown:
        return ""
    count = len(record.observations[at]["answer"])
    return (
        f": the behaviour shows in {shown[at] * count:.0f} of {count} answers to held-out prompts, "
        f"{shown[BASE] * count:.0f} before"
    )


def _without_scorer(record: Record) -> str:
    """What can be said of answers that nothing scores: whether they are the base's."""
    if "answer" not in record.observations[BASE]:
        return "No answers were generated (`evaluation.generations`), so this page cannot say what one would notice."
    before, after = (record.observations[at]["answer"] for at in (BASE, TRAINED))
    same = sum(a == b for a, b in zip(before, after, strict=True))
    if same > len(before) / 2:
        return f"**Nothing visible happened: {same} of {len(before)} answers are the base model's, word for word.**"
    return f"{len(before) - same} of {len(before)} answers differ from the base model's; read them below."
