"""The linter of pairs warns of what it should, of nothing else, and refuses nothing."""

from __future__ import annotations

import json
import random

import pytest
from unlike_pairs import NOUNS, unlike, write

from steertune.recipes import cli
from steertune.recipes.lab.pair_lint import at_edge, words_accuracy


def noise(count: int = 40) -> list[dict[str, str]]:
    """Pairs whose answers are drawn alike."""
    draw = random.Random(0)
    return [
        {"prompt": row["prompt"], **{side: " ".join(draw.choices(NOUNS[:30], k=6)) for side in ("chosen", "rejected")}}
        for row in unlike(count)
    ]


def findings(rows, tmp_path, capsys) -> dict[str, dict]:
    assert cli.main(["lint", write(tmp_path / "pairs.jsonl", rows), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == len(rows)
    return {finding["check"]: finding for finding in result["findings"]}


def test_it_says_nothing_of_good_pairs(tmp_path, capsys):
    assert findings(noise(), tmp_path, capsys) == {}


def test_duplicates_are_named_by_line(tmp_path, capsys):
    [line] = findings([*noise(), noise()[2]], tmp_path, capsys)["duplicates"]["rows"]
    assert line.endswith("pairs.jsonl:41")


def test_equal_answers_are_a_warning_here_and_an_error_elsewhere(tmp_path, capsys):
    rows = noise()
    rows[5]["rejected"] = rows[5]["chosen"]
    found = findings(rows, tmp_path, capsys)
    assert found["equal"]["rows"][0].endswith("pairs.jsonl:6")
    assert "pairs.jsonl:6: chosen equals rejected" in found["refused"]["text"]


def test_pairs_that_all_differ_in_case_are_fine(tmp_path, capsys):
    rows = [{**row, "rejected": row["chosen"].upper()} for row in noise()]
    assert "equal" not in findings(rows, tmp_path, capsys)


def test_unknown_columns_are_a_finding_and_not_a_clean_file(tmp_path, capsys):
    file = tmp_path / "pairs.csv"
    file.write_text("question,good,bad\n" + "".join(f"Where is {i}?,Here,There\n" for i in range(20)))
    assert cli.main(["lint", str(file)]) == 0
    output = capsys.readouterr().out
    assert "--columns prompt=" in output and "Nothing to warn about" not in output and "too few" not in output


def test_longer_answers(tmp_path, capsys):
    rows = [{**row, "chosen": f"{row['chosen']} {row['rejected']}"} for row in noise()]
    assert findings(rows, tmp_path, capsys)["lengths"]["value"] == 1


def test_single_words_that_tell_the_answers_apart(tmp_path, capsys):
    rows = [{**row, "chosen": f"Wow! {row['chosen']}"} for row in noise()]
    assert findings(rows, tmp_path, capsys)["bag of words"]["value"] > 0.9
    assert 0.2 < words_accuracy(noise(), "prompt") < 0.8
    assert words_accuracy(noise(5), "prompt") is None


@pytest.mark.parametrize(("accuracy", "check"), [(1.0, "ceiling"), (0.0, "floor"), (0.5, None), (float("nan"), None)])
def test_a_base_model_at_an_edge(accuracy, check):
    found = at_edge(accuracy, 40)
    assert (None if found is None else found.check) == check
