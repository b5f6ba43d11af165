"""The card, as it was written before the grid ran, and the arms."""

from __future__ import annotations

from collections.abc import Sequence

from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import section
from steertune.recipes.ablation.tables import Card, Claim, TaskTable
from steertune.recipes.lab.pages import Block, Section, Text, escape, prose, table_of


@section(place=90)
def card(findings: Findings) -> Section:
    """The purpose of the grid, and its arms."""
    tables = findings.tables
    assert tables.card is not None and tables.claim is not None  # a grid without them is refused when it is read
    rows = [[label, name] for name, label in findings.labels.items()]
    claim = tables.claim.model_copy(
        update={"better": findings.labels[tables.claim.better], "than": findings.labels[tables.claim.than]}
    )
    blocks = [
        *card_blocks(tables.card, claim, tables.tasks)[2:],
        table_of(["arm", "its name in the cells"], rows, "arms"),
    ]
    return Section("Card", blocks)


def card_blocks(card: Card, claim: Claim, tasks: Sequence[str | TaskTable]) -> list[Block]:
    """The card, also for a report in which nothing ran."""
    uses = [f"- `{arm.replace('`', '')}`: {prose(text)}" for arm, text in card.affordances.items()]
    uses += [f"- *Unequal tuning budgets*: {prose(card.unequal_budgets)}"] if card.unequal_budgets else []
    return [
        Text(f"**Problem.** {prose(card.problem)}"),
        Text(f"**Hypothesis.** {prose(card.hypothesis)}"),
        Text(f"**What would count against it.** {prose(card.against)}"),
        Text(f"**Claim, as it is decided.** {_claim(claim)}"),
        Text(f"**Baselines.** {prose(card.baselines)}"),
        Text("**What each arm may use.**"),
        Text("\n".join(uses)),
        *_instructions(tasks),
    ]


def _claim(claim: Claim) -> str:
    if claim.recovers is not None:
        return (
            f"*{claim.better}* has at least {claim.recovers:g} of *{claim.than}*'s gain over the base model in "
            f"{claim.label} (alpha = {claim.alpha:g}); against it counts if it clearly has less."
        )
    by = f", by more than {claim.margin:g}" if claim.margin else ""
    text = f"*{claim.better}* has more {claim.label} than *{claim.than}*{by}"
    if claim.factor:
        text += f", and {claim.factor}'s share of the gap is the largest"
    less = f"the difference is clearly below {claim.margin:g}" if claim.margin else "it clearly has less"
    other = f", or if another factor's share is clearly larger than {claim.factor}'s" if claim.factor else ""
    return f"{text} (alpha = {claim.alpha:g}); against it counts if {less}{other}."


def _instructions(entries: Sequence[str | TaskTable]) -> list[Block]:
    """What prompting arms could say, and who wrote it."""
    tasks = [entry for entry in entries if isinstance(entry, TaskTable) and entry.instructions]
    if not tasks:
        return []
    lines = [
        f"- `{task.called}`: {prose(task.instructions_by)} "
        f"{' · '.join(f'“{escape(instruction)}”' for instruction in task.instructions)}"
        for task in tasks
    ]
    return [Text("**Instructions of prompting arms**, of which the tuning chose one."), Text("\n".join(lines))]
