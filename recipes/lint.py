"""Check a file of pairs before training on it; this only warns.

    steertune lint my_pairs.jsonl
    steertune lint my_pairs.csv --columns prompt=question chosen=good rejected=bad --json
    steertune lint my_pairs.jsonl --model embedded

Prints how the file will be divided, and warns about rows that no recipe accepts, duplicates, answers with the same
words, one side being longer, single words that tell chosen from rejected (cross-validated by prompt) and, with
`--model`, a base model that already orders nearly all pairs correctly, or nearly none.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import Annotated

from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.evaluate import evaluate
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.observe import HeldOut, neutral_rows
from steertune.recipes.lab.options import Argument, ColumnNames, Option, Threads, columns_of
from steertune.recipes.lab.pair_lint import LISTED, Finding, at_edge, lint, words_accuracy
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.rows import Record
from steertune.recipes.lab.sources import Reading, has_one_split, load_parts, row_place
from steertune.recipes.lab.tables import ModelTable

_MEASURED = 100  # pairs that the base model is measured on


@command
def main(
    data: Annotated[str, Argument(help="an embedded task, a path or a Hub name, as data.name")],
    columns: ColumnNames = None,
    model: Annotated[str | None, Option(help="also measure this base model: embedded, a folder or a Hub name")] = None,
    threads: Threads = None,
) -> Result:
    """Check the pairs and print the findings; the exit code is always 0."""
    begin(threads, only_one=True)
    findings: list[Finding] = []
    reading = Reading(columns_of(columns))
    try:
        parts = load_parts(data, reading=reading)
    except ArmError as error:  # every other recipe would end with this error
        parts = load_parts(data, reading=replace(reading, strict=False))
        findings.append(Finding("refused", f"Recipes refuse this file: {error}"))
    whole = parts.train if parts.whole is None else parts.whole
    findings += lint(whole, parts.by, row_place(data, "train"))
    pairs = whole.to_list() if {"chosen", "rejected"} <= set(whole.column_names) else []
    accuracy = words_accuracy(pairs, parts.by)
    if model is not None and pairs and not any(finding.check == "refused" for finding in findings):
        base, tokenizer = load_model(ModelTable(name=model))
        held_out = HeldOut(base, tokenizer, whole.select(range(min(_MEASURED, len(whole)))), neutral_rows())
        record = Record({}, evaluate(base, held_out, ["accuracy"]))
        findings += filter(None, [at_edge(record.value("accuracy", 1), len(held_out.pairs))])
    result = {
        "data": data,
        "rows": len(whole),
        "one_file": has_one_split(data),
        "split": parts.note,
        "train": len(parts.train),
        "held_out": len(parts.test),
        "bag_of_words": accuracy,
        "findings": [asdict(finding) for finding in findings],
    }
    # the division of rows without answers is meaningless
    lines = [parts.note] if pairs or not findings else []
    if accuracy is not None:
        lines.append(f"Single words tell chosen from rejected in {accuracy:.0%} of pairs (50% is chance).")
    for finding in findings:
        where = (
            f" They are {', '.join(finding.rows)}{' ...' if len(finding.rows) == LISTED else ''}."
            if finding.rows
            else ""
        )
        lines.append(f"Warning: {finding.text}{where}")
    lines += [] if findings else ["Nothing to warn about."]
    return Result(result, "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
