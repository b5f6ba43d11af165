"""What steering costs the model, measured twice: on neutral text, and with the behaviour left out."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from steertune.recipes.ablation import analysis
from steertune.recipes.ablation.cells import column
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import ARROWS, COMPARED, means_table, numbers, section
from steertune.recipes.ablation.tables import AT
from steertune.recipes.lab import measures
from steertune.recipes.lab.pages import Block, Section, Text, table_of
from steertune.recipes.lab.pages.measured import title
from steertune.recipes.lab.rows import BASE, FRONTIER, MATCHED, TUNED

ON_NEUTRAL_TEXT = ("kl", "kl_tail", "perplexity_ratio")
"""Neutral text shows the behaviour too if that is unconditional; then these measures count it as harm."""
KNOWN_ENDS, OWN_ANSWERS = ("capability", "capability_loss"), ("instructed_loss", "undone_loss")
WITHOUT_BEHAVIOUR = (*KNOWN_ENDS, "repetition", "neutral_repetition", *OWN_ANSWERS)
"""These leave the behaviour out."""


@section(place=8)
def damage(findings: Findings) -> Section | None:
    """Side effects of every arm. They are called damage only where both kinds were measured."""
    cells, (at, names) = findings.ran, _seen(findings)
    if not names:
        return None
    is_rigid = cells["scalable"] == False if "scalable" in cells else pd.Series(dtype=bool)  # noqa: E712  None: failed
    rigid = at != TUNED and bool(is_rigid.any())
    if rigid:  # arms without a strength are measured at the tuned one alone
        tuned = cells[[column(name, TUNED) for name in names]].where(is_rigid)
        cells = cells.assign(**{
            column(name, at): cells[column(name, at)].fillna(tuned[column(name, TUNED)]) for name in names
        })  # fmt: skip
    both = has_both_kinds(findings)
    means = cells.groupby("arm", sort=False)[[column(name, at) for name in names]].mean()
    base = pd.DataFrame([[cells[column(name, BASE)].mean() for name in names]], ["(base model)"], means.columns)
    headers = [f"{title(name)}{ARROWS[measures.get(name).better]}" for name in names]
    what = (
        "KL and perplexity on neutral text count the behaviour itself as a change, wherever it does not wait for its "
        "occasion; the other columns leave it out. An arm is better off only if it is in both."
        if both
        else "Only one kind of side effect was measured, so none of them is called damage: neutral text may show the "
        "behaviour itself."
    )
    blocks: list[Block] = [
        Text(f"{what} Means {AT[at]}{_RIGID if rigid else ''}."),
        means_table(pd.concat([base, means]), headers, ["{:.3f}"] * len(names), "damage"),
        *_compared(findings, names, at),
    ]
    return Section("Damage" if both else "Side effects", blocks)


_RIGID = "; of arms without a strength as they come"


def has_both_kinds(findings: Findings) -> bool:
    """Whether side effects were measured on neutral text, and with the behaviour left out."""
    names = {*_seen(findings)[1]}
    return bool(names & {*ON_NEUTRAL_TEXT} and names & {*KNOWN_ENDS, *OWN_ANSWERS})


def _seen(findings: Findings) -> tuple[str, list[str]]:
    """The first strength at which side effects were measured, and their names."""
    for at in (FRONTIER, MATCHED, TUNED):
        names = [*ON_NEUTRAL_TEXT, *WITHOUT_BEHAVIOUR]
        if names := [name for name in names if findings.ran[column(name, at)].notna().any()]:
            return at, names
    return TUNED, []


def _compared(findings: Findings, names: Sequence[str], at: str) -> list[Block]:
    """The two arms of the claim on each of these measures."""
    claim, rows = findings.claim, []
    for name in names:
        wide = analysis.scores(findings.paired, column(name, at))
        if {claim.better, claim.than} <= {*wide} and len(both := wide[[claim.better, claim.than]].dropna()):
            rows.append([title(name), *numbers(analysis.gap(both, claim.better, claim.than, claim.sample))])
    header = ["", f"{claim.better} minus {claim.than}", *COMPARED]
    return [table_of(header, rows, "damage_compared")] if rows else []
