"""One page and one table from the cells of a grid; nothing is run again.

    python -m steertune.recipes.report runs/quick

Writes `report.html` (opens without a network), `report.md` with `charts/`, and `cells.parquet`, a row a cell.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markdown_it import MarkdownIt

from steertune.recipes.ablate import GRID
from steertune.recipes.ablation import analysis, charts
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.factorial import anova, effects, mixed_model
from steertune.recipes.ablation.tables import Card, Claim, GridTables
from steertune.recipes.ablation.tidy import read_cells
from steertune.recipes.arm import ArmError
from steertune.recipes.training import write_whole

_SHOWN = 8  # arms in a chart; more cannot be told apart


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a grid")
    parser.add_argument("--measure", choices=sorted(analysis.MEASURES), help="instead of the claim's measure")
    options = parser.parse_args(argv)
    try:
        page = write_report(options.folder, options.measure)
    except ArmError as error:
        print(f"ArmError: {error}", file=sys.stderr)
        return 2
    print(page.read_text(encoding="utf-8"))
    print(f"This page: {page.with_suffix('.html')}")
    return 0


def write_report(folder: Path, measure: str | None = None) -> Path:
    """Write the report of a grid's folder; return the Markdown page.

    Raises:
        ArmError: the folder holds no grid or no cells.
    """
    file = folder / GRID
    if not file.is_file():
        raise ArmError(f"{folder} holds no grid ({GRID}). Run one: python -m steertune.recipes.ablate")
    try:
        grid = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArmError(f"{file} holds no grid: {error}") from error
    tables = analysis.read_tables(grid)
    cells = read_cells(folder, list(grid["cells"]))
    assert tables.card is not None
    (folder / "charts").mkdir(exist_ok=True)
    _parquet(cells, folder / "cells.parquet")
    claim = tables.claim or _default_claim(grid)
    if measure:
        claim = claim.model_copy(update={"measure": measure})
    ran = cells[cells["status"] != "failed"]
    lines = [f"# {tables.name}", "", *_card(tables.card)]
    if ran.empty:
        lines += ["Every cell failed.", "", *_failures(cells)]
    else:
        lines += _body(folder, grid, tables, claim, cells, ran)
    page = folder / "report.md"
    write_whole(page, "\n".join(lines) + "\n")
    write_whole(folder / "report.html", _html("\n".join(lines), folder, tables.name))
    return page


def _body(folder: Path, grid: dict[str, Any], tables: GridTables, claim: Claim, cells: Frame, ran: Frame) -> list[str]:
    label = analysis.MEASURES[claim.measure]
    factors = list(tables.factors)
    said = analysis.verdict(ran, claim)
    shapley = analysis.attribution(ran, tables, claim.measure)
    curves = analysis.efficiency(ran, claim.than, claim.measure)
    shown = _most_telling(ran, claim)
    done = len(cells) - int((cells["status"] == "failed").sum())
    lines = [
        f"## The result counts {_SIDES[said.side]} the hypothesis",
        "",
        *(f"{sentence}  " for sentence in analysis.answer(ran, claim, said, shapley, curves)),
        "",
        f"{done} of {len(grid['cells'])} cells, {ran['task'].nunique()} tasks, {ran['seed'].nunique()} seeds. "
        "Intervals are 95 %, paired by task and seed; p values are permutation tests, corrected (Holm) within a "
        f"table. {' '.join(grid['notes'])}",
        "",
    ]
    if shapley:
        charts.intervals(shapley, folder / "charts" / "attribution.png", f"share of the gap in {label}")
        total = sum(i.estimate for i in shapley.values())
        lines += [
            "## Attribution",
            "",
            f"Exact Shapley shares of the gap ({total:+.3f}) from `{_words(tables.design.start)}` to "
            f"`{_words(tables.design.end)}`.",
            "",
            "![Shapley share of every factor](charts/attribution.png)",
            "",
            *_table(
                ["factor", "share", "95 %"],
                [[f, f"{i.estimate:+.3f}", _ends(i)] for f, i in shapley.items()],
            ),
        ]
    lines += _factors(folder, ran[ran["arm"].isin(_crossed_arms(grid))], factors, claim.measure, label)
    lines += [f"## Arms against {claim.than}", "", *_comparisons(ran, claim), *_behaviour(ran, claim)]
    if ran["examples"].nunique() > 1:
        charts.curves(ran, shown, claim.measure, folder / "charts" / "curves.png", label)
        lines += ["## Sample efficiency", "", "![Curves](charts/curves.png)", "", *_efficiency(curves, claim)]
    lines += _side_effects(folder, ran, tables)
    return [*lines, *_cost(ran), *_failures(cells), *_how(grid, tables)]


_SIDES = {"for": "for", "against": "against", "undecided": "neither for nor against"}


def _card(card: Card) -> list[str]:
    return [
        "## Card",
        "",
        f"**Problem.** {card.problem}",
        "",
        f"**Hypothesis.** {card.hypothesis}",
        "",
        f"**What would count against it.** {card.against}",
        "",
        f"**Baselines.** {card.baselines}",
        "",
        "**What each arm may use.**",
        "",
        *(f"- `{arm}`: {text}" for arm, text in card.affordances.items()),
        *([f"- *Unequal tuning budgets*: {card.unequal_budgets}"] if card.unequal_budgets else []),
        "",
    ]


def _factors(folder: Path, cells: Frame, factors: list[str], measure: str, label: str) -> list[str]:
    if not factors or cells.empty:
        return []
    cells = cells.dropna(subset=[measure])
    found = effects(cells, factors, measure)
    if not found:
        return []
    charts.effects(found, folder / "charts" / "effects.png", f"difference in {label}")
    lines = [
        "## Effect of each factor, everything else equal",
        "",
        "![Matched effects](charts/effects.png)",
        "",
        *_table(
            ["factor", "level against reference", "difference", "95 %", "p (Holm)", "contexts"],
            [
                [e.factor, f"{e.level} − {e.reference}", f"{e.interval.estimate:+.3f}", _ends(e.interval),
                 f"{e.p:.3g}", str(e.contexts)]
                for e in found
            ],
        ),
    ]  # fmt: skip
    table = anova(cells, factors, measure)
    if table is not None:
        lines += [
            "Analysis of variance with HC3 errors, tasks and seeds as blocks; cells with a level that means nothing "
            "there (`-`) are left out.",
            "",
            *_table(
                ["term", "df", "F", "p", "partial η²"],
                [[str(t), str(r.df), f"{r.F:.2f}", f"{r.p:.3g}", f"{r.share:.2f}"] for t, r in table.iterrows()],
            ),
        ]
    mixed = mixed_model(cells, factors, measure)
    if mixed is not None:
        lines += [
            "Mixed model, task and seed as random effects:",
            "",
            *_table(
                ["level", "estimate", "95 %", "p"],
                [[str(n), f"{r.estimate:+.3f}", f"[{r.low:+.3f}, {r.high:+.3f}]", f"{r.p:.3g}"]
                 for n, r in mixed.iterrows()],
            ),
        ]  # fmt: skip
    return lines


def _comparisons(cells: Frame, claim: Claim) -> list[str]:
    own = analysis.scores(cells, claim.measure)
    if claim.than not in own:
        return [f"{claim.than} has no {analysis.MEASURES[claim.measure]}.", ""]
    found = sorted(analysis.comparisons(cells, claim.than, claim.measure), key=lambda c: -c.interval.estimate)
    rows = [
        [c.arm, f"{c.mean:.3f}", f"{c.interval.estimate:+.3f}", _ends(c.interval), _ends(c.crossed), f"{c.p:.3g}",
         str(c.interval.pairs)]
        for c in found
    ]  # fmt: skip
    absent = [a for a in dict.fromkeys(cells["arm"]) if a != claim.than and a not in {c.arm for c in found}]
    header = ["arm", "mean", f"minus {claim.than}", "95 %", "95 %, other test rows too", "p (Holm)", "pairs"]
    note = (
        [f"Not compared, because they have no {analysis.MEASURES[claim.measure]} "
         f"(no strength to match, or no effect at any): {', '.join(absent)}.", ""]
        if absent else []
    )  # fmt: skip
    what = f"{analysis.MEASURES[claim.measure]}; {claim.than} itself has {own[claim.than].mean():.3f}."
    return [what[0].upper() + what[1:], "", *_table(header, rows), *note]


def _behaviour(cells: Frame, claim: Claim) -> list[str]:
    columns = {
        "accuracy": "accuracy, tuned strength",
        "matched_accuracy": "accuracy, matched KL",
        "margin_gain": "margin gain, nats",
        "moved_wrong": "moved the wrong way",
        "behaviour": "behaviour, tuned",
        "matched_behaviour": "behaviour, matched KL",
    }
    there = [c for c in columns if c in cells and cells[c].notna().any()]
    means = cells.groupby("arm", sort=False)[there].mean()
    rows = [[str(arm), *("" if pd.isna(v) else f"{v:.3f}" for v in means.loc[arm])] for arm in means.index]
    base = [cells[f"base_{c}"].mean() if f"base_{c}" in cells else float("nan") for c in there]
    rows.insert(0, ["(base model)", *("" if pd.isna(v) else f"{v:.3f}" for v in base)])
    failed = int(cells.get("judgements_failed", pd.Series(dtype=float)).fillna(0).sum())
    note = [f"{failed} judgements failed; they are in no mean.", ""] if failed else []
    return ["Means over all cells:", "", *_table(["arm", *(columns[c] for c in there)], rows), *note]


def _efficiency(curves: Sequence[analysis.Efficiency], claim: Claim) -> list[str]:
    if not curves:
        return ["No arm has the whole curve yet.", ""]
    sizes = list(curves[0].equivalents)
    header = ["arm", "area over the baseline's curve", *(f"n = {n} is worth" for n in sizes)]
    rows = [[e.arm, str(e.area), *(str(e.equivalents[n]) for n in sizes)] for e in curves]
    return [
        f"*n is worth*: how many examples {claim.than} needs to reach what the arm reaches with n, with its 95 % "
        "interval; `>` where its curve never gets there.",
        "",
        *_table(header, rows),
    ]


def _side_effects(folder: Path, cells: Frame, tables: GridTables) -> list[str]:
    y, label = (
        ("behaviour", "behaviour score") if cells["behaviour"].notna().any() else ("accuracy", "held-out accuracy")
    )
    matched = tables.budget.strengths == "matched"  # then every arm has the same KL, and fluency is what differs
    x, x_label = ("perplexity", "perplexity") if matched else ("kl", "KL to the base")
    base = None
    if f"base_{y}" in cells:
        base = (float(cells["base_perplexity"].mean()) if matched else 0.0, float(cells[f"base_{y}"].mean()))
    unit = "" if matched else ", nats/token"
    charts.pareto(cells, x, y, folder / "charts" / "pareto.png", f"{x_label} on neutral text{unit}", label, base)
    names = {
        "kl": "KL to the base",
        "perplexity": "perplexity",
        "repetition": "repetition",
        "moved_wrong": "moved wrong",
    }
    there = [c for c in names if c in cells]
    means = cells.groupby("arm", sort=False)[there].mean()
    rows = [[str(arm), *("" if pd.isna(v) else f"{v:.3f}" for v in means.loc[arm])] for arm in means.index]
    base = f"Base: perplexity {cells['base_perplexity'].mean():.2f}" if "base_perplexity" in cells else ""
    if "base_repetition" in cells:
        base += f", repetition {cells['base_repetition'].mean():.3f}"
    return [
        f"## Side effects, at the {'matched' if matched else 'tuned'} strength",
        "",
        "![Effect against side effect](charts/pareto.png)",
        "",
        *_table(["arm", *(names[c] for c in there)], rows),
        f"{base}.",
        "",
    ]


def _cost(cells: Frame) -> list[str]:
    columns = {
        "parameters": ("trained parameters", "{:,.0f}"),
        "train_seconds": ("training, s", "{:.1f}"),
        "tuning_seconds": ("tuning, s", "{:.1f}"),
        "pairs_read": ("pairs read", "{:.0f}"),
        "tokens_read": ("tokens read", "{:,.0f}"),
        "peak_memory_gb": ("peak memory, GB", "{:.2f}"),
    }
    there = [c for c in columns if c in cells and cells[c].notna().any()]
    means = cells.groupby("arm", sort=False)[there].mean()
    rows = [
        [str(arm), *("" if pd.isna(v) else columns[c][1].format(v) for c, v in means.loc[arm].items())]
        for arm in means.index
    ]
    return ["## Cost", "", *_table(["arm", *(columns[c][0] for c in there)], rows)]


def _failures(cells: Frame) -> list[str]:
    bad = cells[cells["status"] != "ok"]
    if bad.empty:
        return ["## Failures", "", "None: every cell ran and none diverged.", ""]
    rows = [
        [r.task, str(r.examples), str(r.seed), r.arm, r.status, str(r.error).splitlines()[0][:160]]
        for r in bad.itertuples()
    ]
    note = "A diverged cell counts as the base model in every comparison. A failed one counts nowhere."
    return ["## Failures", "", note, "", *_table(["task", "n", "seed", "arm", "status", "error"], rows)]


def _how(grid: dict[str, Any], tables: GridTables) -> list[str]:
    packages = ("steertune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "scipy", "statsmodels")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    return [
        "## How it was made",
        "",
        f"```\n{grid['command']}\n```",
        "",
        f"Tuning budget of every arm: `{_words(tables.budget.model_dump())}`. Splits: "
        f"`{_words(tables.splits.model_dump())}`. "
        f"Matched KL: {tables.matched.kl} nats per token. Python {platform.python_version()}, {versions}.",
        "",
    ]


def _words(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in table.items())


def _most_telling(cells: Frame, claim: Claim) -> list[str]:
    """The arms of the claim and the best others, as many as a chart can show."""
    means = analysis.scores(cells, claim.measure).mean().sort_values(ascending=False)
    first = [arm for arm in (claim.better, claim.than) if arm in means.index]
    return [*first, *(arm for arm in means.index if arm not in first)][:_SHOWN]


def _crossed_arms(grid: dict[str, Any]) -> list[str]:
    return [arm["name"] for arm in grid["arms"] if arm["levels"]]


def _default_claim(grid: dict[str, Any]) -> Claim:
    names = [arm["name"] for arm in grid["arms"]]
    return Claim(better=names[0], than=names[-1])


def _ends(found: analysis.Interval | None) -> str:
    return "" if found is None else f"[{found.low:+.3f}, {found.high:+.3f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
        "",
    ]


def _parquet(cells: Frame, file: Path) -> None:
    part = file.with_suffix(".part")
    cells.to_parquet(part, index=False)
    part.replace(file)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { padding: .3em .7em; border-bottom: 1px solid #e5e5e5; text-align: left; }
td { white-space: nowrap; } td:last-child { white-space: normal; }
th { border-bottom: 2px solid #999; }
img { max-width: 100%; } code { background: #f5f5f5; padding: .1em .3em; }
pre code { display: block; padding: .8em; }
"""


def _html(markdown: str, folder: Path, title: str) -> str:
    """The page in one file: pictures inside, no network, no script."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inline(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="(charts/\w+\.png)"', inline, body)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


if __name__ == "__main__":
    sys.exit(main())
