"""Does a pair of adapters do what each did alone? Measured on the data of both.

On the data of each vector four models are seen: the base, each vector alone, and both. With margins m (log p(chosen) -
log p(rejected)) and the gain g = m - m(base), averaged over held-out pairs,

    kept        = g(both) / g(alone)                 on the vector's own data
    interaction = g(both) - g(first) - g(second)     0 where the effects add up

Both are adapters of one model that work one after the other, so any forms, layers and sites go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from steertune.adapters import set_strength
from steertune.recipes.ablation.statistics.paired import interval
from steertune.recipes.lab import measures
from steertune.recipes.lab.data import load_split, load_steered
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.observe import HeldOut, neutral_rows
from steertune.recipes.lab.page import comparison
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.rows import BASE, Record
from steertune.trainers import FrozenPrefix, scaled

FIRST, SECOND = "default", "second"
KEEPS = 0.8
"""Share of its own gain from which a vector is said to keep what it did."""
BOTH = "both"
_NAMES = measures.served_by("pairs", "neutral")


def measure(
    folders: Sequence[Path],
    data: Sequence[str],
    strengths: Sequence[float] = (1.0, 1.0),
    rows: int = 40,
    model: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Margins of base, each alone and both on the data of each, and their side effects on neutral text.

    Args:
        folders: Two adapters of one base model.
        data: The task of each.
        strengths: Of each.
        rows: Test pairs of each task.
        model: The base model; None: what the first adapter names.
        threads: CPU threads.

    Raises:
        ArmError: no usable adapter, adapters of different bases, no pairs, or too few.
    """
    begin(threads, only_one=True)
    names = [folder.name for folder in folders]
    if names[0] == names[1]:
        names = [str(folder) for folder in folders]
    parts = [_pairs(name, rows) for name in data]
    loaded: tuple[Any, Any, str] = load_steered(folders[0], model)
    steered, tokenizer, _ = loaded
    try:
        steered.load_adapter(str(folders[1]), SECOND)
        for name, strength in zip((FIRST, SECOND), strengths, strict=True):
            set_strength(steered, strength, name)
    except (ValueError, KeyError) as error:
        raise ArmError(f"{folders[1]} cannot stand beside {folders[0]}: {error}") from error
    steered.eval()

    # the same examples for the base and for every choice of adapters; each on the data of both
    prefix = FrozenPrefix(warn=False)
    held_out = [HeldOut(steered, tokenizer, pairs=part, neutral=neutral_rows(), prefix=prefix) for part in parts]
    with scaled(steered, 0.0):
        bases = [evaluate_base(examples, _NAMES) for examples in held_out]
    records = []
    for seen, active in {names[0]: [FIRST], names[1]: [SECOND], BOTH: [FIRST, SECOND]}.items():
        steered.base_model.set_adapter(active)
        for name, examples, base in zip(data, held_out, bases, strict=True):
            keys = {"arm": seen, "task": Path(name).name, "examples": 0, "seed": 0}
            records.append(Record(keys, base | evaluate(steered, examples, _NAMES)))
    on = [{record.keys["arm"]: record for record in records[i::2]} for i in range(2)]
    return {
        "names": names,
        "data": [Path(name).name for name in data],
        "strengths": [*strengths],
        "rows": rows,
        "on": [_on(of_task[names[i]], of_task[names[1 - i]], of_task[BOTH]) for i, of_task in enumerate(on)],
        "records": [record.to_json() for record in records],
    }


def summarise(result: dict[str, Any]) -> str:
    """The result in Markdown, with the answer in words first."""
    records = [Record.from_json(record, Path("the result")) for record in result["records"]]
    lines = [*_answers(result), ""]
    for i, name in enumerate(result["data"]):
        means = {record.keys["arm"]: record.means() for record in records[i::2]}
        base = next(iter(means.values()))[BASE]
        lines += [f"On {name}:", "", *comparison({"base": base} | {arm: of["1"] for arm, of in means.items()}), ""]
    return "\n".join(lines).rstrip()


def _answers(result: dict[str, Any]) -> list[str]:
    lines = []
    for i, (name, on) in enumerate(zip(result["names"], result["on"], strict=True)):
        where = f"On {result['data'][i]}"
        if not on["works"]:
            lines.append(f"{where}, {name} alone does nothing that is clear ({on['alone']}): nothing to keep.  ")
            continue
        verdict = {"keeps": "the pair keeps it", "loses": "the pair loses it", "open": "whether it is kept is open"}
        lines.append(
            f"{where}, {name} alone gains {on['alone']} nats and the pair {on['together']}, {on['kept']:.0%} of it: "
            f"{verdict[on['verdict']]} (interaction {on['interaction']}).  "
        )
    return lines


def _on(own: Record, other: Record, both: Record) -> dict[str, Any]:
    """What the data of one vector say of it alone, of the other and of the pair."""
    alone, others, together = (record.seen(1)["margin_gain"] for record in (own, other, both))
    kept = interval(together - KEEPS * alone)
    return {
        "works": bool(interval(alone).low > 0),
        "alone": str(interval(alone)),
        "together": str(interval(together)),
        "kept": float(together.mean() / alone.mean()) if alone.mean() else float("nan"),
        "verdict": "keeps" if kept.low > 0 else "loses" if kept.high < 0 else "open",
        "interaction": str(interval(together - alone - others)),
    }


def _pairs(name: str, rows: int) -> Dataset:
    part = load_split(name, "test")
    if not {"chosen", "rejected"} <= set(part.column_names):
        raise ArmError(f"{name!r}: effects are measured on preference pairs, its rows have {part.column_names}.")
    if not 2 <= rows <= len(part):
        raise ArmError(f"--rows {rows}: {name!r} has {len(part)} test pairs; 2 to {len(part)}.")
    return part.select(range(rows))
