"""The study that chose the default arm: its rules, its table, and what its results say."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import steertune.recipes.train as recipe
from steertune.recipes.studies import default_arm
from steertune.recipes.studies.default_arm import is_fluent, shown, table
from steertune.recipes.studies.natural.behaviours import BEHAVIOURS, own_pairs, sentence_of
from steertune.recipes.studies.natural.candidates import CANDIDATES

CELLS = Path(__file__).parents[2] / "docs" / "results" / "default_arm" / "cells.json"
SENTENCES = ["The station is near the old bridge, and it is very busy.", "I like long walks because they are quiet."]


@pytest.mark.parametrize("name", [name for name, behaviour in BEHAVIOURS.items() if behaviour.rewrite is not None])
def test_a_rule_finds_the_behaviour_in_what_it_wrote_and_nowhere_else(name: str) -> None:
    rows = own_pairs(BEHAVIOURS[name], ["a?", "b?"], SENTENCES)
    answers = {side: [answer[0]["content"] for answer in rows[side]] for side in ("chosen", "rejected")}
    assert answers["rejected"] == SENTENCES
    assert all(map(BEHAVIOURS[name].shown_by, answers["chosen"]))
    assert not any(map(BEHAVIOURS[name].shown_by, answers["rejected"]))


def test_the_first_sentence_of_an_answer() -> None:
    assert sentence_of("**It is** 3.5 km.\n\nThat is far.") == "It is 3.5 km."
    assert sentence_of("No end in sight,") == "No end in sight."


def cell(answer: str, **changes: Any) -> dict[str, Any]:
    made = {"candidate": "base", "behaviour": "wow", "split": "test", "strength": 0.0, "kl": 0.0, "topic": 1.0}
    return {**made, "answers": [answer], **changes}


def test_the_table_marks_what_is_not_fluent() -> None:
    base = cell("It is a bridge.")
    loop, good = (
        cell("Wow! " * 30, candidate="loop", strength=1.0),
        cell("Wow! It is a bridge!", candidate="good", strength=1.0),
    )
    assert [is_fluent(c, base) for c in (base, good, loop)] == [True, True, False]
    assert not is_fluent({**good, "kl": 9.0}, base) and not is_fluent({**good, "topic": -0.1}, base)
    lines = table([base, loop, good], "test").splitlines()
    assert [line for line in lines if line.startswith("| loop | 1 | 1.00 ") and "✗" in line]
    assert [line for line in lines if line.startswith("| good | 1 | 1.00 ") and "✗" not in line]


def test_answers_of_the_default_arm_show_the_behaviour_and_stay_fluent_on_six_sets_or_more() -> None:
    default = inspect.signature(recipe.main).parameters["arm"].default
    cells = json.loads(CELLS.read_text(encoding="utf-8"))
    bases = {cell["behaviour"]: cell for cell in cells if cell["candidate"] == "base"}
    trained = [cell for cell in cells if cell["candidate"] == default and cell["strength"] == 1]
    showing = {
        cell["behaviour"]
        for cell in trained
        if is_fluent(cell, bases[cell["behaviour"]]) and shown(cell) >= shown(bases[cell["behaviour"]]) + 0.4
    }
    assert len(showing) >= 6, showing


def test_the_options_name_every_candidate_and_behaviour() -> None:
    assert ["base", *CANDIDATES] == default_arm._ALL
    assert [*BEHAVIOURS] == default_arm._SETS
