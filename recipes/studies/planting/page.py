"""What studies of planted problems come to, over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from statsmodels.stats.proportion import proportion_confint

from steertune.recipes.studies.planting import FORMS
from steertune.recipes.studies.planting.studies import Study


def page(studies: dict[str, list[Study]], size: str) -> str:
    """Markdown: the scores of the arms, the claims of the studies, and the coverage of the intervals.

    Args:
        studies: Studies of every problem.
        size: Size of each study, in words.
    """
    return "\n".join(
        [
            "# Planted problems",
            "",
            f"Every study is a grid of {size}. "
            "Every arm has its own learning rate, and arms are compared at matched KL. Mean held-out accuracy "
            "(form/layer):",
            "",
            *_means(studies),
            "",
            "## What studies claim",
            "",
            "A study claims an effect (gated or LoRA against bias, wrong layer against right) if both its permutation "
            "test and its test for other seeds and test rows, corrected for the three effects, are below 5 %. "
            "*Named*: the teacher's form has the highest mean. *Claimed*: the study claims that the teacher's form is "
            "better than `bias` or, for the bias teacher, that another form is worse. *Shares*: form or layer has a "
            "clear Shapley share. *False effect*: the claim is about a form or layer that is not the teacher's. For "
            "`base` (all labels are coin flips) and `shuffled` (the training labels are), every effect, share or "
            "verdict is false. Each should occur in at most 5 % of studies; the 95 % intervals are Clopper-Pearson's. "
            "*By p alone*: false effects if the permutation test were enough.",
            "",
            *_claims(studies),
            "",
            "## Intervals",
            "",
            "How often the 95 % interval of an effect contains the truth where the truth is known. For `base` with "
            "other seeds and other test rows it is 0. For the same test rows the true effect is unknown and not 0, "
            "because their labels happen to suit one arm or the other; how often that interval contains 0 shows how "
            "much it leaves out. (Other teachers have true effects that are unknown as well.)",
            "",
            *_coverage(studies),
            "",
        ]
    )


def _means(studies_of: dict[str, list[Study]]) -> list[str]:
    arms = [(form, layer) for form in FORMS for layer in ("right", "wrong")]
    lines = ["| teacher | studies | base | " + " | ".join(f"{f}/{la}" for f, la in arms) + " |"]
    lines.append("|---" * (len(arms) + 3) + "|")
    for problem, studies in studies_of.items():
        values = " | ".join(_mean([s.means[arm] for s in studies]) for arm in arms)
        lines.append(f"| {problem} | {len(studies)} | {np.mean([s.base for s in studies]):.3f} | {values} |")
    return lines


def _mean(values: Sequence[float]) -> str:
    matched = [value for value in values if not np.isnan(value)]
    return f"{np.mean(matched):.3f}" if matched else "unmatched"


def _claims(studies_of: dict[str, list[Study]]) -> list[str]:
    lines = [
        "| teacher | studies | form named | form claimed | layer claimed | shares | verdict for / against / undecided "
        "| false effect | by p alone | false share | false verdict |",
        "|---" * 11 + "|",
    ]
    for problem, studies in studies_of.items():
        has_truth = problem in FORMS
        sides = " / ".join(str(sum(s.side == side for s in studies)) for side in ("for", "against", "undecided"))
        shares = ", ".join(f"{f} {sum(f in s.shares for s in studies)}" for f in ("form", "layer"))
        cells = [
            *(str(sum(getattr(s, name) for s in studies)) if has_truth else "" for name in ("named", "form", "layer")),
            shares,
            sides,
            _rate([s.false[0] for s in studies]),
            _rate([s.false_by_p for s in studies]),
            *("" if has_truth else _rate([s.false[i] for s in studies]) for i in (1, 2)),
        ]
        lines.append(f"| {problem} | {len(studies)} | " + " | ".join(cells) + " |")
    return lines


def _coverage(studies_of: dict[str, list[Study]]) -> list[str]:
    studies = studies_of.get("base", [])
    if not studies:
        return ["No study of `base` has run."]
    lines = [
        "| effect | studies | other test rows: contains the truth | these test rows: contains 0 |",
        "|---" * 4 + "|",
    ]
    for name in dict.fromkeys(name for study in studies for name in study.gaps):
        gaps = [study.gaps[name] for study in studies if name in study.gaps]
        other_rows = _rate([gap.crossed.low <= 0 <= gap.crossed.high for gap in gaps])
        these_rows = _rate([gap.interval.low <= 0 <= gap.interval.high for gap in gaps])
        lines.append(f"| {name} | {len(gaps)} | {other_rows} | {these_rows} |")
    return lines


def _rate(events: Sequence[bool]) -> str:
    """How often an event occurred, with its 95 % interval."""
    low, high = proportion_confint(sum(events), len(events), method="beta")
    return f"{np.mean(events):.0%} [{low:.0%}, {high:.0%}]"
