"""How much of the claimed arm's gain over the base model every arm reaches."""

from __future__ import annotations

from steertune.recipes.ablation import claims
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import COMPARED, numbers, section
from steertune.recipes.lab.pages import Section, table_of


@section(place=40)
def recovered(findings: Findings) -> Section | None:
    """How much of the claimed arm's gain over the base model every arm reaches, for a claim about a share of it."""
    claim = findings.claim
    if claim.recovers is None:
        return None
    arms = sorted(claims.recovered(findings.paired, claim), key=lambda one: -one.gain.estimate)
    rows = [
        [one.arm, f"{one.gain}", "" if one.share is None else f"{one.share:.2f}", *numbers(one.ahead)] for one in arms
    ]
    header = ["arm", "gain over the base", f"share of {claim.than}'s", f"minus {claim.recovers:g} of it", *COMPARED]
    return Section(f"Recovered of {claim.than}'s gain", [table_of(header, rows, "recovered")])
