"""Find rows to measure an adapter on, without any that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.similarity import text_of
from steertune.recipes.lab.sources import Reading, has_one_split, load_parts, load_split, row_place
from steertune.recipes.lab.trained_on import FILE, read, resembling


def held_out_rows(name: str, adapters: Sequence[Path], reading: Reading | None = None) -> tuple[Dataset, str]:
    """The test rows of a data set for some adapters: its test split, or of a single file all rows if no adapter was
    trained on any of them, else the rows that every recipe holds out.

    Returns:
        The rows, and a note on them for the user.

    Raises:
        ArmError: the data set does not exist, none of its rows is held out, or an adapter was trained on a test row.
    """
    sets_of = {folder: read(folder) for folder in adapters}
    training_sets = [one for sets in sets_of.values() for one in sets or ()]
    called = Path(name).name
    unknown = [str(folder) for folder, sets in sets_of.items() if sets is None]
    note = f"{', '.join(unknown)} has no {FILE}, so it may have been trained on rows of `{called}`."
    if not has_one_split(name):
        rows, where, split = load_split(name, "test", reading), row_place(name, "test"), ""
    else:
        parts = load_parts(name, reading=reading)
        assert parts.whole is not None
        if not resembling(training_sets, parts.whole):
            return (
                parts.whole,
                note if unknown else f"No adapter was trained on `{called}`: all its rows are test rows.",
            )
        rows, where, split = parts.test, parts.places[1], parts.note
        if not len(rows):
            raise ArmError(f"{called!r}: an adapter was trained on rows of it. {split} Give other rows.")
    if trained := resembling(training_sets, rows):
        row = rows[trained[0]]
        raise ArmError(
            f"{where(trained[0])} is not held out: an adapter was trained on it, or on a row that is nearly the same "
            f"({len(trained)} such rows of {len(rows)}): {text_of(row.get('prompt', row.get('chosen')))[:120]!r}. "
            "Measure on other rows, or remove these."
        )
    return rows, " ".join(part for part in (split, note if unknown else "") if part)
