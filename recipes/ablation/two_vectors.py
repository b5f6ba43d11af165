"""Do two vectors at once do what each does alone? Measured on the data of both.

On the data of each vector, four models are compared: the base, each vector alone, and both. With margins m
(log p(chosen) - log p(rejected)) and the gain g = m - m(base), averaged over held-out pairs,

    kept        = g(both) / g(alone)                 on the vector's own data
    interaction = g(both) - g(first) - g(second)     0 where the effects add up

The vectors are two adapters of one model, so any forms, layers and sites can be combined.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from steertune.adapters import set_strength
from steertune.recipes.lab import measures
from steertune.recipes.lab.data import base_of, load_steered, model_has_template
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.held_out import held_out_rows
from steertune.recipes.lab.intervals import interval
from steertune.recipes.lab.observe import FEW_NEUTRAL, HeldOut, neutral_rows
from steertune.recipes.lab.pages import Table, table_markdown
from steertune.recipes.lab.pages.measured import comparison
from steertune.recipes.lab.pages.side_effects import side_effects
from steertune.recipes.lab.pair_lint import warn_of
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.rehearsal import rehearse
from steertune.recipes.lab.rows import BASE, Record
from steertune.recipes.lab.similarity import told_apart_by
from steertune.recipes.lab.sources import Reading
from steertune.recipes.lab.tables import Columns
from steertune.trainers import FrozenPrefix, scaled

FIRST, SECOND = "default", "second"
KEEPS = 0.8
"""A vector keeps its effect if at least this share of its gain remains."""
BOTH = "both"
_ROWS = 40
_NAMES = [*measures.served_by("pairs", "neutral"), "neutral_repetition"]
_ANSWERS, _NEW_TOKENS = 8, 24  # answers to neutral prompts, to measure repetition


def measure(
    folders: Sequence[Path],
    data: Sequence[str],
    strengths: Sequence[float] = (1.0, 1.0),
    rows: int | None = None,
    model: str | None = None,
    threads: int | None = None,
    columns: Columns | None = None,
) -> dict[str, Any]:
    """Margins of the base, each vector alone and both on the data of each, and side effects on neutral text.

    Without `rows`, 40 test pairs of each task are used, or as many as there are; without `model`, the base model that
    the first adapter names.

    Raises:
        ArmError: no usable adapter, adapters of different bases, no pairs, or too few.
    """
    begin(threads, only_one=True)
    names = [folder.name for folder in folders]
    if names[0] == names[1]:
        names = [str(folder) for folder in folders]
    reading = Reading(columns or {}, chat=partial(model_has_template, base_of(folders[0], model)))
    parts = [_pairs(name, rows, folders, reading) for name in data]
    rows = min(map(len, parts)) if rows is None else rows
    steered, tokenizer = _with_both(folders, strengths, model)
    held_out = _examples(steered, tokenizer, [part.select(range(rows)) for part in parts])

    # the base, each vector alone and both, on the data of each vector and on neutral text
    with scaled(steered, 0.0):
        for examples in held_out:
            rehearse(examples)
        bases = [evaluate_base(examples, _NAMES) for examples in held_out]
    records = []
    for arm, active in {names[0]: [FIRST], names[1]: [SECOND], BOTH: [FIRST, SECOND]}.items():
        steered.base_model.set_adapter(active)
        for name, examples, base in zip(data, held_out, bases, strict=True):
            keys = {"arm": arm, "task": Path(name).name, "examples": 0, "seed": 0}
            records.append(Record(keys, base | evaluate(steered, examples, _NAMES)))
    on = [{record.keys["arm"]: record for record in records[i::2]} for i in range(2)]
    return {
        "names": names,
        "data": [Path(name).name for name in data],
        "strengths": [*strengths],
        "rows": rows,
        "on": [_compared(of_task[names[i]], of_task[names[1 - i]], of_task[BOTH]) for i, of_task in enumerate(on)],
        "records": [record.to_json() for record in records],
    }


def _examples(model: Any, tokenizer: Any, parts: Sequence[Dataset]) -> list[HeldOut]:
    """The pairs of each task with the same neutral text and one cached prefix."""
    shared: dict[str, Any] = {
        "neutral": neutral_rows(tokenizer, count=FEW_NEUTRAL),
        "neutral_generations": _ANSWERS,
        "new_tokens": _NEW_TOKENS,
        "prefix": FrozenPrefix(warn=False),
    }
    return [HeldOut(model, tokenizer, readable(part, tokenizer), **shared) for part in parts]


def _with_both(folders: Sequence[Path], strengths: Sequence[float], model: str | None) -> tuple[Any, Any]:
    """One model with both vectors as adapters, at their strengths, and its tokenizer."""
    steered, tokenizer, _ = load_steered(folders[0], model)
    try:
        steered.load_adapter(str(folders[1]), SECOND)
        for name, strength in zip((FIRST, SECOND), strengths, strict=True):
            set_strength(steered, strength, name)
    except (ValueError, KeyError) as error:
        raise ArmError(f"{folders[1]} cannot be loaded beside {folders[0]}: {error}") from error
    return steered.eval(), tokenizer


def summarise(result: dict[str, Any]) -> str:
    """The result in Markdown, beginning with the answer in words."""
    records = [Record.from_json(record, Path("the result")) for record in result["records"]]
    lines = [*_answers(result), ""]
    for i, name in enumerate(result["data"]):
        of_task = {record.keys["arm"]: record for record in records[i::2]}
        models = {"base": records[i].seen()} | {arm: record.seen(1) for arm, record in of_task.items()}
        means = {arm: record.means()["1"] for arm, record in of_task.items()}
        columns = {"base": records[i].means()[BASE]} | means
        lines += [f"On {name}:", ""]
        lines += [table_markdown(block) for block in side_effects(models, "model") if isinstance(block, Table)]
        lines += ["Every measure:", "", table_markdown(comparison(columns))]
    return "\n".join(lines).rstrip()


def _answers(result: dict[str, Any]) -> list[str]:
    lines = []
    for i, (name, on) in enumerate(zip(result["names"], result["on"], strict=True)):
        where = f"On {result['data'][i]}"
        if not on["works"]:
            lines.append(f"{where}, {name} alone has no clear effect ({on['alone']}), so there is none to keep.  ")
            continue
        verdict = {"keeps": "the pair keeps it", "loses": "the pair loses it", "open": "it is open whether it is kept"}
        lines.append(
            f"{where}, {name} alone gains {on['alone']} nats and the pair {on['together']}, {on['kept']:.0%} of it: "
            f"{verdict[on['verdict']]} (interaction {on['interaction']}).  "
        )
    return lines


def _compared(vector: Record, other: Record, both: Record) -> dict[str, Any]:
    """On the data of one vector: what it gains alone, what the other one does, and what the pair keeps of the gain."""
    alone, others, together = (record.seen(1)["margin_gain"] for record in (vector, other, both))
    kept = interval(together - KEEPS * alone)
    return {
        "works": bool(interval(alone).low > 0),
        "alone": str(interval(alone)),
        "together": str(interval(together)),
        "kept": float(together.mean() / alone.mean()) if alone.mean() else float("nan"),
        "verdict": "keeps" if kept.low > 0 else "loses" if kept.high < 0 else "open",
        "interaction": str(interval(together - alone - others)),
    }


def _pairs(name: str, rows: int | None, folders: Sequence[Path], reading: Reading) -> Dataset:
    """Test pairs that neither vector was trained on."""
    part, note = held_out_rows(name, folders, reading)
    if note:
        print(note, file=sys.stderr)
    warn_of(part, told_apart_by(part.to_list()), name)
    rows = min(_ROWS, len(part)) if rows is None else rows
    if not {"chosen", "rejected"} <= set(part.column_names):
        raise ArmError(
            f"{name!r} must have preference pairs to measure effects on (its columns are {part.column_names})."
        )
    if not 2 <= rows <= len(part):
        raise ArmError(f"--rows must be 2 to {len(part)}, the test pairs of {name!r} (got {rows}).")
    return part.select(range(rows))
