"""What studies of planted problems come to, over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from statsmodels.stats.proportion import proportion_confint

from steertune.recipes.studies.planting.studies import Study
from steertune.recipes.studies.planting.teachers import FORMS


def page(found: dict[str, list[Study]], size: str) -> str:
    """Markdown: what the arms reach, what the studies claim, how good the intervals are.

    Args:
        found: Studies of every problem.
        size: How large each of them is, in words.
    """
    return "\n".join(
        [
            "# Planted problems",
            "",
            f"Every study is a grid of {size}, "
            "every arm with its own learning rate, compared at matched KL. Mean held-out accuracy (form/layer):",
            "",
            *_means(found),
            "",
            "## What studies claim",
            "",
            "A claim is an effect (gated and LoRA against bias, wrong layer against right) whose permutation test and "
            "test for other seeds and test rows, corrected for all three, are both below 5 %. "
            "*Named*: the teacher's form has the highest mean. *Claimed*: it is claimed to be better than `bias`; for "
            "the bias teacher, that another is worse. *Shares*: a clear Shapley share of form or layer. *False "
            "effect*: of a form or layer that is not the teacher's; for `base` (all labels are a coin's) and "
            "`shuffled` (the training labels are), any effect, share or verdict is false. Each should come about in 5 "
            "% of studies at most; their 95 % intervals are Clopper-Pearson's. *By p alone*: false effects if the "
            "permutation test were enough.",
            "",
            *_claims(found),
            "",
            "## Intervals",
            "",
            "How often the 95 % interval of an effect, one a study, holds the truth where that is known: for `base` "
            "and other seeds and test rows it is 0. About the same test rows the truth is another number, which "
            "nobody knows, since their labels happen to suit one arm or the other; how often that interval holds 0 "
            "says how much it leaves out. (Other teachers each have a true effect of their own, unknown too.)",
            "",
            *_coverage(found),
            "",
        ]
    )


def _means(found: dict[str, list[Study]]) -> list[str]:
    arms = [(form, layer) for form in FORMS for layer in ("right", "wrong")]
    lines = ["| teacher | studies | base | " + " | ".join(f"{f}/{la}" for f, la in arms) + " |"]
    lines.append("|---" * (len(arms) + 3) + "|")
    for problem, studies in found.items():
        values = " | ".join(_mean([s.means[arm] for s in studies]) for arm in arms)
        lines.append(f"| {problem} | {len(studies)} | {np.mean([s.base for s in studies]):.3f} | {values} |")
    return lines


def _mean(values: Sequence[float]) -> str:
    there = [value for value in values if not np.isnan(value)]
    return f"{np.mean(there):.3f}" if there else "unmatched"


def _claims(found: dict[str, list[Study]]) -> list[str]:
    lines = [
        "| teacher | studies | form named | form claimed | layer claimed | shares | verdict for / against / undecided "
        "| false effect | by p alone | false share | false verdict |",
        "|---" * 11 + "|",
    ]
    for problem, studies in found.items():
        known = problem in FORMS
        sides = " / ".join(str(sum(s.side == side for s in studies)) for side in ("for", "against", "undecided"))
        shares = ", ".join(f"{f} {sum(f in s.shares for s in studies)}" for f in ("form", "layer"))
        cells = [
            *(str(sum(getattr(s, name) for s in studies)) if known else "" for name in ("named", "form", "layer")),
            shares,
            sides,
            _rate([s.false[0] for s in studies]),
            _rate([s.false_by_p for s in studies]),
            *("" if known else _rate([s.false[i] for s in studies]) for i in (1, 2)),
        ]
        lines.append(f"| {problem} | {len(studies)} | " + " | ".join(cells) + " |")
    return lines


def _coverage(found: dict[str, list[Study]]) -> list[str]:
    studies = found.get("base", [])
    if not studies:
        return ["No study of `base` was run."]
    lines = [
        "| effect | studies | other test rows too, holds the truth | these test rows, holds 0 |",
        "|---" * 4 + "|",
    ]
    for name in dict.fromkeys(name for study in studies for name in study.gaps):
        gaps = [study.gaps[name] for study in studies if name in study.gaps]
        held = [[i.low <= 0 <= i.high for i in (gap.crossed, gap.interval)] for gap in gaps]
        lines.append(f"| {name} | {len(gaps)} | {_rate([h[0] for h in held])} | {_rate([h[1] for h in held])} |")
    return lines


def _rate(seen: Sequence[bool]) -> str:
    low, high = proportion_confint(sum(seen), len(seen), method="beta")
    return f"{np.mean(seen):.0%} [{low:.0%}, {high:.0%}]"
