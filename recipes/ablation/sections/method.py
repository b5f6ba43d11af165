"""How the numbers were computed, what they cover, and how to run the grid again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steertune.recipes.ablation.budget import BudgetTable, draw
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import section
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.strengths import TRAINED
from steertune.recipes.lab.observe import neutral_rows
from steertune.recipes.lab.pages import Block, Code, Section, Text, escape
from steertune.recipes.lab.splits import SplitTable


@section(place=100)
def method(findings: Findings) -> Section:
    """Statistics, budgets, scorers, versions and the command."""
    tables = findings.tables
    budgets = ""
    for name, change in tables.budgets.items():
        settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in change.items())
        budgets += f" {name}: {settings}."
    blocks: list[Block] = [
        Text(_statistics(findings)),
        Text(
            f"{_budget(tables.budget)}{escape(budgets)} {_splits(tables.splits)} Matched KL: {tables.matched.kl} nats "
            f"per token{_frontier(findings)}."
        ),
        *_rates(findings),
        *_lead(findings),
        *_notes(findings),
        Code(findings.grid["command"]),
    ]
    return Section("How it was made", blocks)


def _statistics(findings: Findings) -> str:
    """When a difference is called clear, and what the measure of the claim does not cover."""
    claim = findings.claim
    rule = (
        "tasks stand for many like them, so that they are what varies: Student's t over the tasks, whose variance is "
        "taken to be no less than that of their seeds and test rows"
        if claim.sample
        else "both a permutation test over the pairs and the test for other seeds *and* test rows, about these tasks "
        "alone; *other tasks too* takes the tasks as a sample of many like them, and nothing is called clear by it"
    )
    text = (
        "Differences are paired by task and seed. All seeds of a task share its test rows. Nothing is called clear "
        f"unless its p, corrected by Holm within its table, is below {100 * claim.alpha:.3g} %: {rule}. All of it is "
        "about the settings that the tuning chose."
    )
    if claim.measure != "accuracy":
        return text
    file = findings.tables.neutral
    text_of_kl = f"{len(neutral_rows())} neutral rows" if file is None else f"the rows of {escape(file)}"
    matched = f" The KL was matched on {text_of_kl} alone." if claim.strength == "matched" else ""
    return (
        f"{text} Pair accuracy is how often the model finds the chosen one of two given answers likelier; what it "
        f"writes by itself is another question (`--measure behaviour`, where answers were generated).{matched}"
    )


def _frontier(findings: Findings) -> str:
    """The KLs of the frontier, and the text on which they were matched and side effects are reported."""
    tables = findings.tables
    if not tables.matched.frontier or "frontier" not in findings.ran:
        return ""
    file = "" if tables.neutral is None else f" of {escape(Path(tables.neutral).name)}"
    return (
        f", and {_listed(tables.matched.frontier)} for the frontier, matched on every other row of the neutral "
        f"text{file}; side effects are reported on the rows between"
    )


_PER = {"cell": "in every cell", "arm": "per task and number of examples", "grid": "for the whole grid"}


def _budget(budget: BudgetTable) -> str:
    strengths, rates = budget.strengths, budget.learning_rate
    at = "the matched strength" if strengths == "matched" else f"strengths {_listed(strengths)}"
    spread = f"{_listed(rates)} times" if isinstance(rates, list) else f"within a factor of {rates:g} of"
    layers = f", layers at {_listed(budget.layers)} of the depth for arms that write into one" if budget.layers else ""
    landing = (
        f"; and {budget.landed} more with the best one's rate times the strength that it is used at, if far from 1"
        if budget.landed
        else ""
    )
    halving = f"; one trial in {budget.halving} goes on after each rung" if budget.halving > 1 else ""
    return (
        f"Tuning of every arm: {budget.trials} trials {_PER[budget.per]}, learning rates {spread} its own, "
        f"{_listed(budget.steps)} steps{layers}, measured at {at}{halving}{landing}."
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _splits(splits: SplitTable) -> str:
    return (
        f"Rows: {splits.validation} for validation, {splits.test} for the test, {splits.scorer} for the scorer; rows "
        f"more similar than {splits.near_duplicates:g} are {'left out' if splits.drop_near_duplicates else 'refused'}."
    )


def _rates(findings: Findings) -> list[Block]:
    """The learning rates that were tried, and how many arms have their best one at the edge."""
    tables, cells = findings.tables, findings.ran
    if "setting_rate" not in cells or tables.budgets:
        return []
    seeds = tables.seeds if tables.budget.per == "cell" else tables.seeds[:1]
    tried = sorted({setting.rate for seed in seeds for setting in draw(tables.budget, seed)})
    trained = cells[cells["setting_steps"] > 0].dropna(subset=["setting_rate"])
    largest, smallest = (trained.loc[trained["setting_rate"] == tried[end], "arm"].nunique() for end in (-1, 0))
    return [
        Text(
            "Learning rates that were tried, as multiples of an arm's own: "
            f"{', '.join(f'{rate:.3g}' for rate in tried)}. Of {trained['arm'].nunique()} trained arms, {largest} did "
            f"best on the validation rows with the largest and {smallest} with the smallest, beyond which something "
            "better may lie."
        )
    ]


def _lead(findings: Findings) -> list[Block]:
    """Whether the tuning decided anything, and what its second choice would have given."""
    cells = findings.ran
    blocks = _landed(cells)
    if "tuning_lead" not in cells or cells["tuning_lead"].isna().all():
        return blocks
    # cells that share a tuning show it once
    tunings = cells.dropna(subset=["tuning_lead"]).drop_duplicates("tuning_key")
    near, passed = int((tunings["tuning_lead"] < 1).sum()), int((tunings["tuning_lead"] < 0).sum())
    over = f" ({passed} times a better score was passed over for its strength)" if passed else ""
    return [
        *blocks,
        Text(
            "Settings are chosen by the margin per token on the validation rows. The best trial leads the second by "
            f"{tunings['tuning_lead'].median():.2f} standard errors (median), by less than one in {near} of "
            f"{len(tunings)} tunings{over}. On these rows its accuracy is {tunings['tuning_best'].mean():.3f}; the "
            f"second would have given {tunings['tuning_second'].mean():.3f}."
        ),
    ]


def _landed(cells: Frame) -> list[Block]:
    """Which steps and layers the tuning chose, and whether the arms can be used as they were trained."""
    if "tuning_landed" not in cells or cells["tuning_landed"].isna().all():
        return []
    tunings = cells.dropna(subset=["tuning_landed"]).drop_duplicates("tuning_key")
    tunings = tunings[tunings["setting_steps"] > 0]
    off = tunings[tunings["tuning_landed"] < 1]
    parts = []
    for column, word in (("setting_steps", "steps"), ("setting_layer", "of the depth")):
        if column in tunings and tunings[column].nunique() > 1:
            counts = tunings[column].value_counts().sort_index()
            parts.append(", ".join(f"{value:g} {word} ({count})" for value, count in counts.items()))
    chosen = f"Chosen, by number of tunings: {'; '.join(parts)}. " if parts else ""
    arms = ", ".join(map(str, dict.fromkeys(off["arm"])))
    low, high = TRAINED
    text = (
        f"In {len(off)} of {len(tunings)} tunings of trained arms no trial is used at strengths of {low:g} to "
        f"{high:g} at every KL: {arms}."
        if len(off)
        else f"In all {len(tunings)} tunings of trained arms a trial is used at strengths of {low:g} to {high:g} at "
        "every KL, and such a one was preferred."
    )
    return [Text(chosen + text)]


def _notes(findings: Findings) -> list[Block]:
    """Who scored the behaviour, and with which versions the cells were made."""
    cells, lines = findings.ran, []
    if "scorer" in cells:
        scorers = cells.dropna(subset=["scorer"]).groupby("task")["scorer"].unique()
        lines += [f"- Behaviour of {task}: {'; '.join(map(escape, texts))}." for task, texts in scorers.items()]
    versions = cells["versions"].dropna().unique() if "versions" in cells else []
    lines += [f"- Made with {escape(version)}." for version in versions]
    return [Text("\n".join(lines))] if lines else []
