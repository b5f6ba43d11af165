"""The first line of a training's page, and the scorer that it counts with."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from steertune.recipes.lab import scorers
from steertune.recipes.lab.pages.verdict import verdict
from steertune.recipes.lab.rows import Record

CALM, MANIC = "one two three four five six", " ".join(20 * ["ah ha"])


def record(**strengths: tuple[list[float], float, str]) -> Record:
    """A record of four answers at strengths, each with their scores, the KL, and the answer."""
    observations: dict[str, dict[str, list[Any]]] = {
        name.strip("s").replace("_", "."): {
            "score": scores,
            "answer": [answer] * 4,
            "neutral_kl": [kl * 10],
            "neutral_tokens": [10],
        }
        for name, (scores, kl, answer) in strengths.items()
    }
    return Record({"arm": "a", "task": "t", "examples": 4, "seed": 0}, observations)


BASE = ([0.0, 0.0, 0.0, 0.0], 0.0, CALM)
FULL, HALF, NONE = [1.0] * 4, [1.0, 1.0, 0.0, 0.0], [0.0] * 4


@pytest.mark.parametrize(
    ("strengths", "begins"),
    [
        ({"s1": (FULL, 0.4, CALM)}, "**The answers changed**: 4 of 4 answers to held-out prompts show"),
        ({"s0_5": (HALF, 0.2, CALM), "s1": (FULL, 0.4, MANIC)}, "**Strength 1 is too much: repetition is 0.95 (limit"),
        ({"s0_5": (HALF, 0.2, CALM), "s1": (FULL, 1.6, CALM)}, "**Strength 1 is too much: KL to the base"),
        ({"s0_5": (FULL, 1.8, CALM), "s1": (FULL, 2.0, CALM)}, "**Every strength is too much: at 0.5, KL to the"),
        ({"s1": (NONE, 0.1, CALM), "s2": (HALF, 0.3, CALM)}, "**Strength 1 shows little. Use strength 2**: 2 of 4"),
        ({"s1": (NONE, 0.1, CALM), "s2": (FULL, 0.3, MANIC)}, "**Nothing visible happened**: 0 of 4"),
        (
            {"s0_5": (HALF, 0.2, CALM), "s1": (FULL, 0.4, "B!" + 40 * "t!")},
            "**Strength 1 is too much: share of answers that go in circles is 1.00 (limit 0.20). Use strength 0.5**:",
        ),
        # the strength nearest to 1 of those that show as much
        (
            {"s0_5": (FULL, 0.2, CALM), "s0_25": (FULL, 0.1, CALM), "s1": (FULL, 2.0, CALM)},
            "**Strength 1 is too much: KL to the base is 2.00 (limit 1.50). Use strength 0.5**",
        ),
    ],
)  # fmt: skip
def test_the_first_line(strengths: dict[str, Any], begins: str) -> None:
    line = verdict(record(s0=BASE, **strengths))
    assert line.startswith(begins), line


def test_a_small_change_is_no_nothing_and_a_costly_strength_is_named() -> None:
    """Five of eight more and two less is 0.375, just too little for a change that everybody notices."""
    one = [1.0, 0.0, 0.0, 0.0]
    line = verdict(record(s0=BASE, s1=(one, 0.1, CALM), s2=(FULL, 0.3, MANIC)))
    assert line.startswith("**The answers changed a little**, at strength 1: 1 of 4 answers to held-out prompts show")
    assert "Strength 2 is too much: repetition is 0.95 (limit 0.10)" in line and "there 4 of 4 answers" in line
    assert "Side effects are within the limits (KL to the base 0.40 of 1.50, repetition 0.00 of 0.10)." in verdict(
        record(s0=BASE, s1=(FULL, 0.4, CALM))
    )


def test_what_was_not_trained_is_changed_by_its_strength() -> None:
    silent, loud = record(s0=BASE, s1=(NONE, 0.1, CALM)), record(s0=BASE, s1=(FULL, 2.0, CALM))
    assert "Raise `trainer.learning_rate`" in verdict(silent) and "Lower `trainer.learning_rate`" in verdict(loud)
    silent.facts["steps"] = loud.facts["steps"] = 0
    assert "Use a larger strength" in verdict(silent) and "Use a smaller one" in verdict(loud)


def test_one_answer_for_every_prompt_is_too_much_unless_it_was_learned() -> None:
    """Fluent, short, at a low KL, and the same whatever is asked."""
    steered = record(s0=BASE, s0_5=(HALF, 0.1, CALM), s1=(FULL, 0.4, "Hope this helps!"))
    steered.observations["0"]["answer"] = steered.observations["0.5"]["answer"] = [f"{CALM} {i}" for i in range(4)]
    line = "**Strength 1 is too much: share of answers that are given to several prompts is 1.00 (limit 0.30)"
    assert verdict(steered).startswith(line)
    steered.facts["chosen_alike"] = 1.0  # such as a refusal in the same words
    assert verdict(steered).startswith("**The answers changed**: 4 of 4")


def test_circles_in_neutral_answers_are_too_much_where_held_out_answers_are_fluent() -> None:
    steered = record(s0=BASE, s0_5=(HALF, 0.2, CALM), s1=(FULL, 0.4, CALM))
    for at, answer in {"0": CALM, "0.5": CALM, "1": MANIC}.items():
        steered.observations[at]["neutral_answer"] = [answer] * 4
    assert verdict(steered).startswith("**Strength 1 is too much: repetition in neutral answers is 0.95 (limit 0.10)")


def test_probabilities_are_compared_with_those_of_the_base() -> None:
    before = ([0.5, 0.6, 0.7, 0.8], 0.0, CALM)
    line = verdict(record(s0=before, s1=([0.6, 0.7, 0.72, 0.7], 0.4, CALM), s2=([0.9, 0.9, 0.9, 0.9], 0.9, CALM)))
    assert line.startswith("**Strength 1 shows little. Use strength 2**: 4 of 4 answers"), "2 - 1 against 4 of 4"
    assert verdict(record(s0=before, s1=before)).startswith("**Nothing visible happened**: 0 of 4 answers")


def test_a_judge_that_failed_counts_for_nothing() -> None:
    line = verdict(record(s0=([0.0, 0.0, None, 0.0], 0.0, CALM), s1=([1.0, 1.0, 1.0, None], 0.4, CALM)))  # pyright: ignore[reportArgumentType]
    assert line.startswith("**The answers changed**: 2 of 2 answers")


def test_without_a_scorer_the_answers_themselves_are_compared() -> None:
    silent = record(s0=BASE, s1=(FULL, 0.1, CALM))
    for observations in silent.observations.values():
        del observations["score"]
    assert verdict(silent).startswith("**Nothing visible happened: 4 of 4 answers are the base model's")
    silent.observations["1"]["answer"] = ["other"] * 4
    assert verdict(silent).startswith("4 of 4 answers differ")
    del silent.observations["0"]["answer"], silent.observations["1"]["answer"]
    assert verdict(silent).startswith("No answers were generated")


def test_the_scorer_of_characters_sees_capitals_marks_and_lines() -> None:
    words = "bridge school market river tower park road lake mill gate hall"
    sentences = [f"The {word} is near the Old Town." for word in words.split()]
    rewritten = {
        "lower case": [text.lower() for text in sentences],
        "exclamation": [text[:-1] + "!" for text in sentences],
        "list": ["- " + text for text in sentences],
    }
    for name, chosen in rewritten.items():
        rows = Dataset.from_dict({"chosen": chosen[:10], "rejected": sentences[:10]})
        scorer = scorers.fit({"kind": "characters"}, rows, None, None)
        good, bad = scorer.score(["", ""], [chosen[10], sentences[10]])
        assert good is not None and bad is not None and good > 0.5 > bad, name
