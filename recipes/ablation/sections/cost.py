"""What every arm costs."""

from __future__ import annotations

from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import means_table, section
from steertune.recipes.lab.pages import Section

_FACTS = {
    "parameters": ("trained parameters", "{:,.0f}"),
    "train_seconds": ("training, s", "{:.1f}"),
    "tuning_seconds": ("tuning, s", "{:.1f}"),
    "pairs_read": ("pairs read", "{:.0f}"),
    "tokens_read": ("tokens read", "{:,.0f}"),
    "prompt_tokens": ("tokens added to every request", "{:.0f}"),
    "peak_memory_gb": ("peak memory, GB", "{:.2f}"),
}


@section(place=70)
def cost(findings: Findings) -> Section:
    """Means over the cells of every arm."""
    facts = [fact for fact in _FACTS if fact in findings.ran and findings.ran[fact].notna().any()]
    means = findings.ran.groupby("arm", sort=False)[facts].mean()
    titles, formats = ([_FACTS[fact][i] for fact in facts] for i in (0, 1))
    return Section("Cost", [means_table(means, titles, formats, "cost")])
