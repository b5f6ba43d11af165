"""Cells of version 3, which kept margins and means, are read as records: by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from steertune.recipes.ablation.cells import read_cells
from steertune.recipes.ablation.old_cells import record_of
from steertune.recipes.ablation.store import Store
from steertune.recipes.ablation.tables import Claim
from steertune.recipes.lab.files import ArmError, write_result
from steertune.recipes.lab.rows import BASE, MATCHED, TUNED

KEYS = {"arm": "form=bias", "task": "warm_tone", "examples": 4, "seed": 1}
MEANS = {"kl": 0.25, "perplexity": 8.0, "base_perplexity": 4.0, "repetition": 0.125, "base_repetition": 0.0}
MARGINS = {"base_margins": [-1.0, 1.0, 0.0, -2.0], "margins": [1.0, 2.0, -1.0, 1.0]}
OLD = {
    **KEYS, **MEANS, **MARGINS, "version": 3, "key": "k", "status": "ok", "error": None, "scalable": True,
    "base_accuracy": 0.375, "accuracy": 0.75, "margin": 0.75, "margin_gain": 1.25, "moved_wrong": 0.25,
    "behaviour": 0.5, "behaviours": [0.25, None, 0.75], "judgements_failed": 1, 
    "matched_margins": [3.0, 0.0, 0.0, 1.0],
    "matched_accuracy": 0.75, "parameters": 576, "levels": {"form": "bias"},
}  # fmt: skip
SETTING = {"rate": 3.0, "steps": 8, "strength": 0.5, "prompt": 0}
EXPECTED = {
    "accuracy@0": 0.375, "accuracy@tuned": 0.75, "accuracy@matched": 0.75, "margin_gain@tuned": 1.25,
    "margin_gain@matched": 1.5, "moved_wrong@tuned": 0.25, "behaviour@tuned": 0.5, "judgements_failed@tuned": 1 / 3,
    "kl@tuned": 0.25, "perplexity@tuned": 8.0, "perplexity@0": 4.0, "repetition@tuned": 0.125, "parameters": 576,
    "setting_rate": 3.0, "setting_steps": 8,
}  # fmt: skip


def test_a_cell_of_version_3_is_a_record(tmp_path: Path) -> None:
    file = tmp_path / "cells" / "warm_tone" / "n4" / "seed1" / "form=bias" / "cell.json"
    file.parent.mkdir(parents=True)
    write_result(file, {**OLD, "setting": SETTING, "tuning": [{"rate": 3.0}]})
    check(tmp_path)
    [record] = Store(tmp_path).records()
    assert record.keys == KEYS and record.facts["tuning"] == [{"rate": 3.0}]
    assert [*record.observations] == [BASE, TUNED, MATCHED]
    assert record.observations[MATCHED]["margin"] == [3.0, 0.0, 0.0, 1.0]


def test_a_table_of_version_3_is_records(tmp_path: Path) -> None:
    row: dict[str, Any] = {name: value for name, value in OLD.items() if name != "levels"} | {"form": "bias"}
    row |= {f"setting_{name}": value for name, value in SETTING.items()}
    failed = {**KEYS, "seed": 2, "version": 3, "status": "failed", "error": "out of memory"}
    pd.DataFrame([row, failed]).to_parquet(tmp_path / "cells.parquet")
    check(tmp_path)
    failure = Store(tmp_path).records()[1]
    assert failure.keys["seed"] == 2 and failure.facts == {"status": "failed", "error": "out of memory"}


def test_packing_an_old_table_loses_nothing(tmp_path: Path) -> None:
    test_a_cell_of_version_3_is_a_record(tmp_path)
    records = Store(tmp_path).records()
    Store(tmp_path).pack()
    (tmp_path / "cells" / "warm_tone" / "n4" / "seed1" / "form=bias" / "cell.json").unlink()
    assert Store(tmp_path).records() == records
    check(tmp_path)


def check(folder: Path) -> None:
    """The table of a folder's cells has the values that were worked out by hand."""
    cell = read_cells(folder).iloc[0]
    assert {name: cell[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert cell["accuracy@tuned by example"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert cell["accuracy@0 by example"].tolist() == [0.0, 1.0, 0.5, 0.0], "a tie counts half"
    assert np.isnan(cell["behaviour@tuned by example"]).tolist() == [False, True, False]
    assert cell["perplexity@tuned by example"].tolist() == pytest.approx([8.0]), "its examples were not kept"


def test_an_older_version_is_refused() -> None:
    with pytest.raises(ArmError, match="cell.json is of version 2 .*; 3 and later are read. Delete it"):
        record_of({**OLD, "version": 2}, "cell.json")


def test_a_claim_of_version_3_is_one_about_a_measure_at_a_strength() -> None:
    claim = Claim.model_validate({"better": "a", "than": "b", "measure": "matched_behaviour"})
    assert (claim.measure, claim.strength, claim.column) == ("behaviour", "matched", "behaviour@matched")
    with pytest.raises(ValueError, match="needs a strength"):
        Claim.model_validate({"better": "a", "than": "b", "measure": "behaviour"})
