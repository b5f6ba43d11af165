"""The first line of a training's page: what came out, whether it is too much, and which strength to use."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from steertune.recipes.lab.observe import Observations
from steertune.recipes.lab.rows import BASE, Record

TRAINED = "1"
MAX_KL = 1.5
"""Nats per token on neutral text, where a behaviour that shows everywhere costs 0.5 to 1.3 by itself."""
MAX_REPETITION = 0.1
"""Share of repeated word triples above the base's."""
MAX_CIRCLES = 0.2
"""Share of answers that go in circles above the base's."""
VISIBLE = 0.25
"""Share of answers by which a behaviour must rise to be noticed."""
_CIRCLE = 0.5  # an answer that shrinks below this share of its length says the same again and again


def verdict(record: Record) -> str:
    """One paragraph in Markdown.

    Args:
        record: The base model at strength 0, the trained one at strength 1 and maybe at others.
    """
    strengths = sorted((at for at in record.observations if float(at) > 0), key=float)
    excess = {at: _excess(record, at) for at in strengths}
    harmless = [at for at in strengths if not excess[at]]
    shown = {at: _shown(record.observations[at]) for at in (BASE, *strengths) if "score" in record.observations[at]}
    # of the strengths that show as much, the nearest to the trained one
    best = max(harmless, key=lambda at: (shown.get(at, 0.0), -abs(float(at) - 1)), default=None)
    if best is None:
        return (
            f"**Every strength is too much: at {strengths[0]}, {excess[strengths[0]]}.** Lower "
            "`trainer.learning_rate` or `trainer.max_steps`, or add `loss.neutral_kl`."
        )
    if excess[TRAINED]:
        return f"**Strength 1 is too much: {excess[TRAINED]}. Use strength {best}**{_in_answers(record, shown, best)}."
    if not shown:
        return _without_scorer(record)
    if shown[TRAINED] - shown[BASE] >= VISIBLE:
        return f"**The answers changed**{_in_answers(record, shown, TRAINED)}. Side effects are within the limits."
    if shown[best] - shown[BASE] >= VISIBLE:
        return f"**Strength 1 shows little. Use strength {best}**{_in_answers(record, shown, best)}."
    return (
        f"**Nothing visible happened**{_in_answers(record, shown, TRAINED)}. Raise `trainer.learning_rate` or "
        "`trainer.max_steps`, or give more examples."
    )


def _excess(record: Record, at: str) -> str:
    """Which limits a strength exceeds, in words; "" if none."""
    base = record.observations[BASE].get("answer", [])
    repetition, circles = np.nan_to_num(record.value("repetition")), circling(base)
    values = {
        "KL to the base": (record.value("kl", at), MAX_KL),
        "repetition": (record.value("repetition", at), repetition + MAX_REPETITION),
        "share of answers that go in circles": (
            circling(record.observations[at].get("answer", [])),
            circles + MAX_CIRCLES,
        ),
    }
    return ", and ".join(
        f"{name} is {value:.2f} (limit {limit:.2f})" for name, (value, limit) in values.items() if value > limit
    )


def circling(answers: Sequence[str]) -> float:
    """Share of the answers that say the same again and again, which compression finds without words in it."""
    texts = [answer.encode() for answer in answers]
    return float(np.mean([len(zlib.compress(text)) < _CIRCLE * len(text) for text in texts])) if texts else 0.0


def _shown(observations: Observations) -> float:
    """Share of the answers that show the behaviour."""
    return float(np.mean([score >= 0.5 for score in observations["score"] if score is not None]))


def _in_answers(record: Record, shown: Mapping[str, float], at: str | None) -> str:
    """How many answers show the behaviour, before and at a strength."""
    if at is None or at not in shown:
        return ""
    count = len(record.observations[at]["answer"])
    return (
        f": {shown[at] * count:.0f} of {count} answers to held-out prompts show the behaviour, and "
        f"{shown[BASE] * count:.0f} did before"
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
