"""The smallest difference that a grid can detect, and how more tasks, rows or seeds would lower it; for dry runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from steertune.recipes.ablation import analysis
from steertune.recipes.ablation.cells import cells_table
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import Grid
from steertune.recipes.ablation.statistics.power import (
    MEASURED,
    POWER,
    Components,
    Design,
    components,
    detectable,
    larger,
)
from steertune.recipes.ablation.store import Store
from steertune.recipes.ablation.tables import Claim, GridTables
from steertune.recipes.lab import measures

LIKE = {"accuracy": "accuracy", "behaviour": "behaviour"}
"""Beginning of a measure's name -> the measure whose components stand in for it before any cell has run."""


def resolution(grid: Grid, context: Context, folder: Path, minutes: float, more_rows: float) -> list[str]:
    """Lines about what the design can detect. `minutes` is the time of one cell, `more_rows` the factor by which it
    takes longer with twice the test rows."""
    claim = grid.tables.claim
    assert claim is not None  # a grid without one is refused when it is read
    rows = _rows(grid, context, claim)
    tables = [
        measures.get(claim.measure).title,
        f"{len(grid.tasks)} tasks x {len(grid.tables.seeds)} seeds x {rows} rows",
    ]
    head = f"What the design can see (power {POWER:g} at alpha {claim.alpha:g}; {'; '.join(tables)}):"
    variances, source = _components(grid, folder, claim)
    if variances is None or rows is None:
        return [head, f"  not known for this measure before two tasks have two seeds: {source}."]
    # tasks that are made of the same rows are one task, with the seeds of each
    tasks = len({task.name for task in grid.tasks})
    design = Design(tasks, len(grid.tables.seeds) * len(grid.tasks) // tasks, rows)
    beyond = f" from {claim.margin:g}" if claim.margin else ""
    lines = [head, f"  a difference{beyond} of {_both(variances, design, claim)}."]
    lines.append(f"  Standard deviations of a difference, by source: {variances} ({source}).")
    cells = len(grid.arms) * len(grid.tables.examples)
    cost = {
        "one more task": minutes * cells * design.seeds,
        "twice the rows": minutes * (more_rows - 1) * cells * design.seeds * design.tasks,
        "one more seed": minutes * cells * design.tasks,
    }
    bought = {name: detectable(variances, more, claim.sample, claim.alpha) for name, more in larger(design).items()}
    for name, more in larger(design).items():
        lines.append(f"  With {name}: {_both(variances, more, claim)}, for about {cost[name]:.0f} more minutes.")
    return [*lines, f"  {_advice(bought, detectable(variances, design, claim.sample, claim.alpha))}"]


def _both(variances: Components, design: Design, claim: Claim) -> str:
    """The smallest difference for other tasks, and for these alone; the one that decides the claim comes first."""
    words = {True: "for other tasks like these", False: "for these tasks alone"}
    seen = {sample: detectable(variances, design, sample, claim.alpha) for sample in (claim.sample, not claim.sample)}
    return ", ".join(f"{_number(value)} {words[sample]}" for sample, value in seen.items())


def _number(value: float) -> str:
    return "none" if math.isinf(value) else f"{value:.3f}"


def _advice(bought: Mapping[str, float], now: float) -> str:
    """What to add to the design: tasks and rows first, unless the numbers say otherwise."""
    best = min(bought, key=lambda name: bought[name])
    if math.isinf(bought[best]):
        return "None of these is enough to see anything: add several tasks, and two seeds or more."
    if best == "one more seed" and bought[best] < now:
        return "A seed helps most here; add tasks and rows as well, since seeds alone stop helping soon."
    seed = _number(bought["one more seed"])
    return f"Add tasks and rows before seeds: {best} helps most; one more seed leaves it at {seed}."


def _components(grid: Grid, folder: Path, claim: Claim) -> tuple[Components | None, str]:
    """Variances of differences from the claim's baseline, and where they come from."""
    records = Store(folder).records()
    if records:
        cells = cells_table(records)
        cells = analysis.in_pairs(cells[cells["status"] != "failed"], grid.tables.tasks)
        wide = analysis.scores(cells, claim.column) if len(cells) else cells
        arms = [arm for arm in wide if arm != claim.than and claim.than in wide] if len(cells) else []
        gaps = [(wide[arm] - wide[claim.than]).dropna() for arm in arms]
        variances = components([gap for gap in gaps if len(gap)])
        if variances is not None:
            return variances, f"from the {len(records)} cells that ran"
    like = next((name for beginning, name in LIKE.items() if claim.measure.startswith(beginning)), None)
    if like is None:
        return None, f"no study has measured how {claim.measure} varies"
    return MEASURED[like], f"defaults, measured by {like} at matched KL on the studies of docs/results"


def _rows(grid: Grid, context: Context, claim: Claim) -> int | None:
    """How many test rows of a task the claim's measure reads."""
    tables = grid.tables
    pairs = min(len(context.splits(task).test) for task in grid.tasks)
    sizes = {
        "pairs": pairs,
        "answers": min(tables.generations, pairs),
        "neutral": len(context.neutral[1]),
        "questions": tables.questions,
    }
    needs = [sizes[need] for need in measures.get(claim.measure).needs if need in sizes]
    return min(needs) if needs else None


def with_twice_the_rows(tables: GridTables) -> GridTables:
    """The same grid with twice the test rows and answers."""
    splits = tables.splits.model_copy(update={"test": 2 * tables.splits.test})
    return tables.model_copy(update={"splits": splits, "generations": 2 * tables.generations})
