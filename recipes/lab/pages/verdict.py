"""The first line of a training's page: the outcome, whether it is too much, and which strength to use."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from steertune.recipes.lab.rows import BASE, Record
from steertune.recipes.lab.similarity import words

TRAINED = "1"
_TRAINING = "`trainer.learning_rate` or `trainer.max_steps`"
MAX_KL = 1.5
"""Nats per token on neutral text; a behaviour that shows everywhere costs 0.5 to 1.3 by itself."""
MAX_REPETITION = 0.1
"""Share of repeated word triples in excess of the base's."""
MAX_CIRCLES = 0.2
"""Share of answers that go in circles, in excess of the base's."""
MAX_ALIKE = 0.3
"""Share of answers that are given to several prompts, in excess of the base's and that of the chosen answers."""
VISIBLE = 0.4
"""A behaviour must rise by this share of the answers to be noticed."""
SLIGHT = 0.15
"""Below this share, nothing visible happened."""
_RISE = 0.05  # an answer counts as more like the chosen ones if its score, a probability, rises by more than this
_CIRCLE = 0.5  # an answer that compresses below this share of its length repeats itself

_FLUENCY = (
    ("answer", "repetition", "repetition", "share of answers that go in circles"),
    (
        "neutral_answer",
        "neutral_repetition",
        "repetition in neutral answers",
        "share of neutral answers that go in circles",
    ),
)
"""Name of the recorded answers, the measure of their repetition, and the page's words for repetition and circles."""
_NOT_HELD_OUT = {
    "held-out": "",
    "training": " **No rows were held out**: these are training prompts, and nothing says what others do.",
    "neutral": " The rows have no prompts of their own, so these are everyday questions about other things.",
}
"""Kind of the prompts that were answered -> the note on them."""


def verdict(record: Record) -> str:
    """The verdict, as one paragraph in Markdown."""
    prompts = _asked(record)
    nothing = " **No rows were held out.**" if prompts == "neutral" and not record.facts["held_out"] else ""
    return f"{_outcome(record)}{nothing}{_NOT_HELD_OUT[prompts]}"


def _asked(record: Record) -> str:
    """Which prompts were answered: held-out, training or neutral ones."""
    return record.facts.get("asked", "held-out")


def _outcome(record: Record) -> str:
    """The outcome, in words."""
    untrained = record.facts.get("steps") == 0
    strengths = sorted((at for at in record.observations if float(at) > 0), key=float)
    excess = {at: _excess(record, at) for at in strengths}
    harmless = [at for at in strengths if not excess[at]]
    gains = {at: _gain(record, at) for at in strengths if "score" in record.observations[at]}
    # among strengths with the same gain, the one nearest to the trained strength
    best = max(harmless, key=lambda at: (gains.get(at, (0.0,))[0], -abs(float(at) - 1)), default=None)
    if best is None:
        return f"**Every strength is too much: at {strengths[0]}, {excess[strengths[0]]}.** " + (
            "Use a smaller one." if untrained else f"Lower {_TRAINING}, or add `loss.neutral_kl`."
        )
    if excess[TRAINED]:
        words = f": {gains[best][1]}" if gains else ""
        return f"**Strength 1 is too much: {excess[TRAINED]}. Use strength {best}**{words}."
    if not gains:
        return _without_scorer(record)
    if gains[TRAINED][0] >= VISIBLE:
        return f"**The answers changed**: {gains[TRAINED][1]}. Side effects are within the limits ({_costs(record)})."
    if gains[best][0] >= VISIBLE:
        return f"**Strength 1 shows little. Use strength {best}**: {gains[best][1]}."
    fix = "Use a larger strength" if untrained else f"Raise {_TRAINING}"
    return f"{_little(gains, excess, best)} {fix}, or give more examples."


def _little(gains: Mapping[str, tuple[float, str]], excess: Mapping[str, str], best: str) -> str:
    """The outcome if no harmless strength shows the behaviour."""
    strongest = best if gains[best][0] > gains[TRAINED][0] else TRAINED
    outcome = "**Nothing visible happened**"
    if gains[strongest][0] >= SLIGHT:
        outcome = f"**The answers changed a little**, at strength {strongest}"
    # a strength that shows the behaviour but costs too much tells that it can be learned
    beyond = next((at for at in gains if excess[at] and gains[at][0] >= VISIBLE), None)
    costly = "" if beyond is None else f" Strength {beyond} is too much: {excess[beyond]}; there {gains[beyond][1]}."
    return f"{outcome}: {gains[strongest][1]}.{costly}"


def _gain(record: Record, at: str) -> tuple[float, str]:
    """The share of the answers by which the behaviour rises, and the same in words.

    A rule decides for every answer whether it shows the behaviour. Other scores are compared with that of the base's
    answer to the same prompt, since what counts as high depends on the pairs that the scorer was fitted on.
    """
    before, after = (np.array(record.observations[label]["score"], dtype=float) for label in (BASE, at))
    judged = ~np.isnan(before) & ~np.isnan(after)
    before, after = before[judged], after[judged]
    if not len(after):
        return 0.0, "no answer could be judged"
    if np.isin([before, after], (0, 1)).all():
        shown = f"{after.sum():.0f} of {len(after)} answers to {_asked(record)} prompts show the behaviour"
        return float(np.mean(after - before)), f"{shown}, and {before.sum():.0f} did before"
    rises, falls = int((after > before + _RISE).sum()), int((after < before - _RISE).sum())
    words = (
        f"{rises} of {len(after)} answers to {_asked(record)} prompts are more like the chosen answers than the base "
        f"model's are, and {falls} less"
    )
    return (rises - falls) / len(after), words


def _costs(record: Record) -> str:
    """KL and repetition at the trained strength, with their limits."""
    values = _limited(record, TRAINED)
    names = [name for name in ("KL to the base", "repetition") if not np.isnan(values[name][0])]
    return ", ".join(f"{name} {values[name][0]:.2f} of {values[name][1]:.2f}" for name in names)


def _excess(record: Record, at: str) -> str:
    """Which limits a strength exceeds, in words; "" if none."""
    values = {name: pair for name, pair in _limited(record, at).items() if pair[0] > pair[1]}
    return ", and ".join(f"{name} is {value:.2f} (limit {limit:.2f})" for name, (value, limit) in values.items())


def _limited(record: Record, at: str) -> dict[str, tuple[float, float]]:
    """What is limited at a strength: name -> value and limit."""
    base, steered = record.observations[BASE], record.observations[at]
    values = {"KL to the base": (record.value("kl", at), MAX_KL)}
    for answers, measure, repetition, circles in _FLUENCY:
        limit = np.nan_to_num(record.value(measure)) + MAX_REPETITION
        values[repetition] = (record.value(measure, at), limit)
        limit = circling(base.get(answers, [])) + MAX_CIRCLES
        values[circles] = (circling(steered.get(answers, [])), limit)
    usual = max(alike(base.get("answer", [])), record.facts.get("chosen_alike", 0.0))
    values["share of answers that are given to several prompts"] = (
        alike(steered.get("answer", [])),
        usual + MAX_ALIKE,
    )
    return values


def alike(answers: Sequence[str]) -> float:
    """Share of the answers that are also given to another prompt, word for word."""
    counts = Counter(words(answer) for answer in answers)
    return sum(count for count in counts.values() if count > 1) / len(answers) if answers else 0.0


def circling(answers: Sequence[str]) -> float:
    """Share of the answers that repeat themselves, as measured by compression, which needs no word boundaries."""
    texts = [answer.encode() for answer in answers]
    return float(np.mean([len(zlib.compress(text)) < _CIRCLE * len(text) for text in texts])) if texts else 0.0


def _without_scorer(record: Record) -> str:
    """The outcome without a scorer: whether the answers differ from the base model's."""
    if "answer" not in record.observations[BASE]:
        return "No answers were generated, so this page cannot say what one would notice."
    before, after = (record.observations[at]["answer"] for at in (BASE, TRAINED))
    same = sum(a == b for a, b in zip(before, after, strict=True))
    if same > len(before) / 2:
        return f"**Nothing visible happened: {same} of {len(before)} answers are the base model's, word for word.**"
    return f"{len(before) - same} of {len(before)} answers differ from the base model's; read them below."
