"""Adapters say by hashes what they were trained on, and no recipe measures them on that."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from unlike_pairs import pair, unlike, write

from steertune.recipes.lab import trained_on
from steertune.recipes.lab.data import load_data
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.held_out import held_out_rows
from steertune.recipes.lab.tables import DataTable
from steertune.recipes.lab.trained_on import FILE, TrainedOn


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder that says it was trained on the training rows of `pairs.jsonl`."""
    data = load_data(DataTable(name=write(tmp_path / "pairs.jsonl", unlike(60)), train=60))
    (tmp_path / "adapter").mkdir()
    trained_on.write(tmp_path / "adapter", trained_on.sets_of(data.train, data.by, data.train))
    return tmp_path / "adapter"


def test_the_file_has_no_text_and_finds_exact_and_near_duplicates(adapter):
    text = (adapter / FILE).read_text()
    rows = unlike(60)
    assert not any(word in text for row in rows for word in row["prompt"].split())
    [kept] = trained_on.read(adapter) or []
    long = "could you please tell my neighbour politely that the music is too loud at night"
    kept = TrainedOn.of(Dataset.from_list([*rows, pair(long)]), "prompt")
    asked = [long.upper() + "!", f"hello, {long}", long.replace("music", "drums"), "where is the nearest bakery"]
    found = kept.resembling([pair(text) for text in [rows[3]["prompt"], *asked]])
    assert found[:3] == [0, 1, 2] and 4 not in found


def test_the_training_file_gives_the_held_out_rows_and_another_one_all(adapter, tmp_path):
    rows, note = held_out_rows(str(tmp_path / "pairs.jsonl"), [adapter])
    assert rows.to_list() == load_data(DataTable(name=str(tmp_path / "pairs.jsonl"))).test.to_list()
    assert "divided by a hash" in note
    fresh = write(tmp_path / "fresh.jsonl", unlike(10, 70))
    rows, note = held_out_rows(fresh, [adapter])
    assert len(rows) == 10 and "all its rows are test rows" in note


def test_rows_that_were_trained_on_are_refused_with_their_place(adapter, tmp_path):
    (tmp_path / "task").mkdir()
    trained = load_data(DataTable(name=str(tmp_path / "pairs.jsonl"), train=60)).train
    [written] = [row for row in unlike(60) if row["prompt"] in str(trained[0]["prompt"])]
    write(tmp_path / "task" / "test.jsonl", [*unlike(3, 70), written])
    with pytest.raises(ArmError, match=r"test\.jsonl:4 is not held out"):
        held_out_rows(str(tmp_path / "task"), [adapter])


def test_an_adapter_without_the_file_is_said(adapter, tmp_path):
    (adapter / FILE).unlink()
    rows, note = held_out_rows(str(tmp_path / "pairs.jsonl"), [adapter])
    assert len(rows) == 60 and "it may have been trained" in note


def test_a_damaged_file_is_refused(adapter):
    (adapter / FILE).write_text((adapter / FILE).read_text().replace('"prompt"', '"text"'))
    with pytest.raises(ArmError, match="is damaged"):
        trained_on.read(adapter)
