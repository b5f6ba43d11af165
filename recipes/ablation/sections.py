"""The sections of a report: each makes its lines of Markdown, and its charts, from the cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steertune.recipes.ablation import analysis, charts
from steertune.recipes.ablation.budget import draw
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.factorial import INERT, Effect, anova, changes, effects, mixed_model
from steertune.recipes.ablation.statistics.paired import Difference, too_few
from steertune.recipes.ablation.statistics.rows import examples_of
from steertune.recipes.ablation.tables import Claim, GridTables

_SHOWN = 8  # arms in a chart; more cannot be told apart
_HEADER = ["95 %, these test rows", "95 %, other test rows too", "p (Holm)", "pairs"]
_TASKS = "95 %, other tasks too"


def attribution(folder: Path, tables: GridTables, found: analysis.Attribution, label: str) -> list[str]:
    """Shapley shares of the gap between the two ends of the design."""
    file = folder / "charts" / "attribution.png"
    charts.intervals({f: share.crossed for f, share in found.shares.items()}, file, f"share of the gap in {label}")
    total = sum(share.estimate for share in found.shares.values())
    return [
        "## Attribution",
        "",
        f"Exact Shapley shares of the gap ({total:+.3f}) from `{words(tables.design.start)}` to "
        f"`{words(tables.design.end)}`.",
        "",
        "![Shapley share of every factor](charts/attribution.png)",
        "",
        *table(["factor", "share", *_HEADER], [[f, *_numbers(share)] for f, share in found.shares.items()]),
        *_reach([*found.shares.values()]),
    ]


def effects_of_factors(folder: Path, cells: Frame, tables: GridTables, measure: str, label: str) -> list[str]:
    """What changing one factor does: matched comparisons, analysis of variance, mixed model. What means
    nothing in an arm counts as at the design's centre, else such arms would be compared with none."""
    factors, centre = list(tables.factors), tables.design.around or tables.design.start
    if not factors or cells.empty:
        return []
    cells = cells.dropna(subset=[measure])
    inert = {f: centre[f] for f in factors if centre and f in cells and (cells[f] == INERT).any()}
    cells = cells.replace({f: {INERT: level} for f, level in inert.items()})
    found = effects(cells, factors, measure)
    if not found:
        return []
    charts.effects(found, folder / "charts" / "effects.png", f"difference in {label}")
    header = ["factor", "level against reference", "difference", *_HEADER[:2], _TASKS, *_HEADER[2:], "contexts"]
    lines = [
        "## Effect of each factor, everything else equal",
        "",
        "![Matched effects](charts/effects.png)",
        "",
        *table(header, _effect_rows(found)),
        *_reach([e.difference for e in found]),
        *([f"Where a factor means nothing in an arm, it counts as `{words(inert)}`.", ""] if inert else []),
    ]
    if cells["examples"].nunique() > 1 and (changed := changes(cells, factors, measure)):
        sizes = f"{cells['examples'].max()} examples than with {cells['examples'].min()}"
        lines += [f"How much larger the effect is with {sizes}:", "", *table(header, _effect_rows(changed))]
    variance = anova(cells, factors, measure)
    if variance is not None:
        lines += [
            "Analysis of variance with HC3 errors, tasks and seeds as blocks. Its p values, as those of the mixed "
            "model below, are uncorrected, about these test rows, and too small where an effect differs from pair to "
            "pair; nothing is claimed from them. Of several numbers of examples both take the mean.",
            "",
            *table(
                ["term", "df", "F", "p", "partial η²"],
                [[str(t), str(r.df), f"{r.F:.2f}", _p(r.p), f"{r.share:.2f}"] for t, r in variance.iterrows()],
            ),
        ]
    mixed = mixed_model(cells, factors, measure)
    if mixed is not None:
        lines += [
            "Mixed model, task and seed as random effects:",
            "",
            *table(
                ["level", "estimate", "95 %", "p"],
                [[str(n), f"{r.estimate:+.3f}", f"[{r.low:+.3f}, {r.high:+.3f}]", _p(r.p)]
                 for n, r in mixed.iterrows()],
            ),
        ]  # fmt: skip
    return lines


def comparisons(cells: Frame, claim: Claim) -> list[str]:
    """Every arm against the claim's baseline."""
    own = analysis.scores(cells, claim.column)
    if claim.than not in own:
        return [f"{claim.than} has no {claim.label}.", ""]
    found = sorted(analysis.comparisons(cells, claim.than, claim.column), key=lambda c: -c.difference.estimate)
    rows = [[c.arm, f"{c.mean:.3f}", *_numbers(c.difference)] for c in found]
    absent = [a for a in dict.fromkeys(cells["arm"]) if a != claim.than and a not in {c.arm for c in found}]
    rigid = [a for a in absent if claim.strength == "matched" and not _has_strength(cells, a)]
    others = [a for a in absent if a not in rigid]
    note = []
    if rigid:
        note += [f"Not compared, because they have no strength that could be matched: {', '.join(rigid)}.", ""]
    if others:
        measured = f"{claim.label} of them with every number of examples"
        note += [f"Not compared, because no pair of task and seed has {measured}: {', '.join(others)}.", ""]
    itself = analysis.mean(own[claim.than].dropna())
    what = f"{claim.label}; {claim.than} itself has {itself:.3f}."
    header = ["arm", "mean", f"minus {claim.than}", *_HEADER]
    return [what[0].upper() + what[1:], "", *table(header, rows), *_reach([c.difference for c in found]), *note]


def _has_strength(cells: Frame, arm: str) -> bool:
    said = cells.loc[cells["arm"] == arm, "scalable"] if "scalable" in cells else pd.Series([True])
    return bool((said != False).any())  # noqa: E712  None: a cell that failed does not say


def recovered(cells: Frame, claim: Claim) -> list[str]:
    """How much of the claimed arm's gain over the base model every arm reaches."""
    found = sorted(analysis.recovered(cells, claim), key=lambda one: -one.gain.estimate)
    rows = [
        [one.arm, f"{one.gain}", "" if one.share is None else f"{one.share:.2f}", *_numbers(one.ahead)]
        for one in found
    ]
    header = ["arm", "gain over the base", f"share of {claim.than}'s", f"minus {claim.recovers:g} of it", *_HEADER]
    return [f"## Recovered of {claim.than}'s gain", "", *table(header, rows)]


def behaviour(cells: Frame) -> list[str]:
    """Means of every measure."""
    columns = {
        "accuracy@tuned": "accuracy, tuned strength",
        "accuracy@matched": "accuracy, matched KL",
        "margin_gain@tuned": "margin gain, nats",
        "moved_wrong@tuned": "moved the wrong way",
        "behaviour@tuned": "behaviour, tuned",
        "behaviour@matched": "behaviour, matched KL",
    }
    there = [c for c in columns if c in cells and cells[c].notna().any()]
    groups = cells.groupby("arm", sort=False)
    means, counts_of = groups[there].mean(), groups.size()
    rows = [
        [str(arm), *("" if pd.isna(v) else f"{v:.3f}" for v in means.loc[arm]), str(counts_of[arm])]
        for arm in means.index
    ]
    base = [cells[f"{c.partition('@')[0]}@0"].mean() for c in there]
    rows.insert(0, ["(base model)", *("" if pd.isna(v) else f"{v:.3f}" for v in base), ""])
    failed = int(sum(_failed(row) for _, row in cells.iterrows()))
    note = [f"{failed} judgements failed; they are in no mean.", ""] if failed else []
    header = ["arm", *(columns[c] for c in there), "cells"]
    return ["Means over the cells that an arm has:", "", *table(header, rows), *note]


def _failed(cell: pd.Series) -> int:
    """Judgements that failed in a cell; at the same strength they are of the same answers."""
    values = (cell[examples_of(f"judgements_failed@{strength}")] for strength in ("tuned", "matched"))
    return max((int(v.sum()) for v in values if isinstance(v, np.ndarray)), default=0)


def efficiency(
    folder: Path, cells: Frame, curves: Mapping[str, Sequence[analysis.Efficiency]], claim: Claim, label: str
) -> list[str]:
    """Scores by number of examples, curves, and what n examples of an arm are worth in those of each baseline."""
    charts.curves(cells, most_telling(cells, claim), claim.column, folder / "charts" / "curves.png", label)
    return [
        "## Sample efficiency",
        "",
        "![Curves](charts/curves.png)",
        "",
        "Bars: 95 % over the seeds of a task, unpaired; the intervals of the tables are paired, and allow for other "
        "test rows. Dashed: the base model.",
        "",
        *_by_examples(cells, claim),
        *(line for than, found in curves.items() for line in _worth(cells, found, than)),
    ]


def _by_examples(cells: Frame, claim: Claim) -> list[str]:
    found = analysis.by_examples(cells, claim.than, claim.column)
    sizes = sorted({n for by_size in found.values() for n in by_size})

    def said(by_size: Mapping[int, tuple[float, Difference | None]], n: int) -> str:
        if n not in by_size:
            return ""
        mean, gap = by_size[n]
        return f"{mean:.3f}" if gap is None else f"{mean:.3f} ({gap}, p {_p(gap.p)})"

    rows = [[arm, *(said(by_size, n) for n in sizes)] for arm, by_size in found.items()]
    gaps = [gap for by_size in found.values() for _, gap in by_size.values() if gap is not None]
    return [
        f"Mean at every n (and minus {claim.than} with as many, 95 % for other seeds and test rows, p by Holm over "
        "the table):",
        "",
        *table(["arm", *(f"n = {n}" for n in sizes)], rows),
        *_reach(gaps),
    ]


def _worth(cells: Frame, curves: Sequence[analysis.Efficiency], than: str) -> list[str]:
    """What n examples of every arm are worth in those of one baseline."""
    if not curves:
        return [f"No arm has its whole curve beside that of {than} in any pair.", ""]
    sizes = list(curves[0].equivalents)
    header = ["arm", f"area over {than}'s curve", *_HEADER, *(f"n = {n} is worth" for n in sizes)]
    rows = [[e.arm, *_numbers(e.area), *(str(e.equivalents[n]) for n in sizes)] for e in curves]
    absent = [arm for arm in dict.fromkeys(cells["arm"]) if arm not in {than, *(e.arm for e in curves)}]
    return [
        f"*n is worth*: how many examples {than} needs to reach what the arm reaches with n, with its 95 % interval "
        "for other seeds and test rows; `>` where its curve never gets there.",
        "",
        *table(header, rows),
        *_reach([e.area for e in curves]),
        *([f"Left out, because no pair has the whole curve of them: {', '.join(absent)}.", ""] if absent else []),
    ]


def side_effects(folder: Path, cells: Frame, tables: GridTables) -> list[str]:
    scored = cells["behaviour@tuned"].notna().any()
    y, label = ("behaviour", "behaviour score") if scored else ("accuracy", "held-out accuracy")
    matched = tables.budget.strengths == "matched"  # then every arm has the same KL, and fluency is what differs
    x, x_label = ("perplexity", "perplexity") if matched else ("kl", "KL to the base")
    base = (float(cells["perplexity@0"].mean()) if matched else 0.0, float(cells[f"{y}@0"].mean()))
    unit = "" if matched else ", nats/token"
    charts.pareto(
        cells,
        f"{x}@tuned",
        f"{y}@tuned",
        folder / "charts" / "pareto.png",
        f"{x_label} on neutral text{unit}",
        label,
        base,
    )
    names = {
        "kl@tuned": "KL to the base",
        "perplexity@tuned": "perplexity",
        "perplexity_ratio": "of the base's",
        "repetition@tuned": "repetition",
        "moved_wrong@tuned": "moved wrong",
    }
    cells = cells.assign(perplexity_ratio=cells["perplexity@tuned"] / cells["perplexity@0"])
    there = [c for c in names if cells[c].notna().any()]
    means = cells.groupby("arm", sort=False)[there].mean()
    rows = [[str(arm), *("" if pd.isna(v) else f"{v:.3f}" for v in means.loc[arm])] for arm in means.index]
    said = f"Base: perplexity {cells['perplexity@0'].mean():.2f}" if cells["perplexity@0"].notna().any() else ""
    if cells["repetition@0"].notna().any():
        said += f", repetition {cells['repetition@0'].mean():.3f}"
    return [
        f"## Side effects, at the {'matched' if matched else 'tuned'} strength",
        "",
        "![Effect against side effect](charts/pareto.png)",
        "",
        *table(["arm", *(names[c] for c in there)], rows),
        f"{said}.",
        "",
    ]


def cost(cells: Frame) -> list[str]:
    columns = {
        "parameters": ("trained parameters", "{:,.0f}"),
        "train_seconds": ("training, s", "{:.1f}"),
        "tuning_seconds": ("tuning, s", "{:.1f}"),
        "pairs_read": ("pairs read", "{:.0f}"),
        "tokens_read": ("tokens read", "{:,.0f}"),
        "prompt_tokens": ("tokens added to every request", "{:.0f}"),
        "peak_memory_gb": ("peak memory, GB", "{:.2f}"),
    }
    there = [c for c in columns if c in cells and cells[c].notna().any()]
    means = cells.groupby("arm", sort=False)[there].mean()
    rows = [
        [str(arm), *("" if pd.isna(v) else columns[c][1].format(v) for c, v in means.loc[arm].items())]
        for arm in means.index
    ]
    return ["## Cost", "", *table(["arm", *(columns[c][0] for c in there)], rows)]


def failures(cells: Frame) -> list[str]:
    bad = cells[cells["status"] != "ok"]
    if bad.empty:
        return ["## Failures", "", "None: every cell ran and none diverged.", ""]
    rows = [
        [r.task, str(r.examples), str(r.seed), r.arm, r.status, (str(r.error).splitlines() or ["no message"])[0][:160]]
        for r in bad.itertuples()
    ]
    note = (
        "A diverged cell counts as the base model in every comparison. A failed one counts nowhere, and an unmatched "
        "one nowhere at matched KL: its whole pair is left out, which a verdict allows for one pair in ten."
    )
    return ["## Failures", "", note, "", *table(["task", "n", "seed", "arm", "status", "error"], rows)]


def how(grid: dict[str, Any], tables: GridTables, cells: Frame) -> list[str]:
    """Command, budgets, scorers, versions: what it takes to run the grid again."""
    lines = ["## How it was made", "", f"```\n{grid['command']}\n```", ""]
    budgets = [f"`{name}`: {words(change)}" for name, change in tables.budgets.items()]
    other = f"; other budgets: {', '.join(budgets)}" if budgets else ""
    lines += [
        f"Tuning budget of every arm: `{words(tables.budget.model_dump())}`{other}. Splits: "
        f"`{words(tables.splits.model_dump())}`. Matched KL: {tables.matched.kl} nats per token.",
        "",
        *_rates(tables, cells),
    ]
    if "scorer" in cells:
        notes = cells.dropna(subset=["scorer"]).groupby("task")["scorer"].unique()
        lines += [f"- Behaviour of {task}: {'; '.join(found)}." for task, found in notes.items()]
    versions = cells["versions"].dropna().unique() if "versions" in cells else []
    return [*lines, *(f"- Made with {version}." for version in versions), ""]


def _rates(tables: GridTables, cells: Frame) -> list[str]:
    """Which learning rates were tried, and whose best one lies at the edge of them."""
    if "setting_rate" not in cells or tables.budgets:
        return []
    seeds = tables.seeds if tables.budget.per == "cell" else tables.seeds[:1]
    tried = sorted({setting.rate for seed in seeds for setting in draw(tables.budget, seed)})
    trained = cells[cells["setting_steps"] > 0].dropna(subset=["setting_rate"])
    largest, smallest = (trained.loc[trained["setting_rate"] == tried[end], "arm"].nunique() for end in (-1, 0))
    return [
        f"Learning rates that were tried, as multiples of an arm's own: {', '.join(f'{rate:.3g}' for rate in tried)}. "
        f"Of {trained['arm'].nunique()} trained arms, {largest} did best on the validation rows with the largest and "
        f"{smallest} with the smallest, beyond which something better may lie.",
        "",
    ]


def _effect_rows(found: Sequence[Effect]) -> list[list[str]]:
    rows = []
    for effect in found:
        estimate, these_rows, other_rows, *rest = _numbers(effect.difference)
        ends = [these_rows, other_rows, effect.difference.tasks.ends]
        rows.append(
            [effect.factor, f"{effect.level} − {effect.reference}", estimate, *ends, *rest, str(effect.contexts)]
        )
    return rows


def _reach(found: Sequence[Difference]) -> list[str]:
    sentence = too_few(found)
    return [sentence, ""] if sentence else []


def _p(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-4 else "< 0.0001"


def _numbers(found: Difference) -> list[str]:
    pairs = str(found.interval.pairs)
    return [f"{found.estimate:+.3f}", found.interval.ends, found.crossed.ends, _p(found.p), pairs]


def words(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in table.items())


def most_telling(cells: Frame, claim: Claim) -> list[str]:
    """The arms of the claim and the best others, as many as a chart can show."""
    means = cells.groupby("arm")[claim.column].mean().dropna().sort_values(ascending=False)
    first = [arm for arm in (claim.better, claim.than) if arm in means.index]
    return [*first, *(arm for arm in means.index if arm not in first)][:_SHOWN]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
        "",
    ]
