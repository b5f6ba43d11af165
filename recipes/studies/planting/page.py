"""The results of all studies of planted problems."""

from __future__ import annotations

import numpy as np

from steertune.recipes.lab.intervals import rate
from steertune.recipes.lab.pages import Block, Page, Section, Table, Text, table_of
from steertune.recipes.studies.planting import FORMS
from steertune.recipes.studies.planting.studies import Study


def page(studies: dict[str, list[Study]], size: str) -> Page:
    """What the arms reach, what the studies claim, how good the intervals are; `size` says how large a study is."""
    means = (
        f"Every study is a grid of {size}, every arm with its own learning rate, compared at matched KL. Mean "
        "held-out accuracy (form/layer):"
    )
    claims = (
        "A claim is an effect (gated and LoRA against bias, wrong layer against right) whose permutation test and "
        "test for other seeds and test rows, corrected for all three, are both below 5 %. "
        "*Named*: the teacher's form has the highest mean. *Claimed*: it is claimed to be better than `bias`; for "
        "the bias teacher, that another is worse. *Shares*: a clear Shapley share of form or layer. *False "
        "effect*: of a form or layer that is not the teacher's; for `base` (all labels are a coin's) and "
        "`shuffled` (the training labels are), any effect, share or verdict is false. Each should come about in 5 "
        "% of studies at most; their 95 % intervals are Clopper-Pearson's. *By p alone*: false effects if the "
        "permutation test were enough."
    )
    intervals = (
        "How often the 95 % interval of an effect, one a study, holds the truth where that is known: for `base` "
        "and other seeds and test rows it is 0. About the same test rows the truth is another number, which "
        "nobody knows, since their labels happen to suit one arm or the other; how often that interval holds 0 "
        "says how much it leaves out. (Other teachers each have a true effect of their own, unknown too.)"
    )
    sections = [
        Section("", [Text(means), _means(studies)]),
        Section("What studies claim", [Text(claims), _claims(studies)]),
        Section("Intervals", [Text(intervals), _coverage(studies)]),
    ]
    return Page("Planted problems", sections)


def _means(studies: dict[str, list[Study]]) -> Table:
    arms = [(form, layer) for form in FORMS for layer in ("right", "wrong")]
    rows = []
    for problem, many in studies.items():
        means = [[study.means[arm] for study in many if not np.isnan(study.means[arm])] for arm in arms]
        values = [f"{np.mean(matched):.3f}" if matched else "unmatched" for matched in means]
        rows.append([problem, str(len(many)), f"{np.mean([study.base for study in many]):.3f}", *values])
    header = ["teacher", "studies", "base", *("/".join(arm) for arm in arms)]
    return table_of(header, rows, "means")


_CLAIMS = (
    "teacher", "studies", "form named", "form claimed", "layer claimed", "shares",
    "verdict for / against / undecided", "false effect", "by p alone", "false share", "false verdict",
)  # fmt: skip


def _claims(studies: dict[str, list[Study]]) -> Table:
    rows = []
    for problem, many in studies.items():
        planted = problem in FORMS
        counts = [sum(s.named for s in many), sum(s.form for s in many), sum(s.layer for s in many)]
        sides = " / ".join(str(sum(s.side == side for s in many)) for side in ("for", "against", "undecided"))
        shares = ", ".join(f"{f} {sum(f in s.shares for s in many)}" for f in ("form", "layer"))
        false_effects = [rate([s.false[0] for s in many]), rate([s.false_by_p for s in many])]
        others = ["" if planted else rate([s.false[i] for s in many]) for i in (1, 2)]
        named = [str(count) if planted else "" for count in counts]
        rows.append([problem, str(len(many)), *named, shares, sides, *false_effects, *others])
    return table_of(_CLAIMS, rows, "claims")


def _coverage(studies: dict[str, list[Study]]) -> Block:
    many = studies.get("base", [])
    if not many:
        return Text("No study of `base` was run.")
    rows = []
    for name in dict.fromkeys(name for study in many for name in study.gaps):
        gaps = [study.gaps[name] for study in many if name in study.gaps]
        held = [[i.low <= 0 <= i.high for i in (gap.crossed, gap.interval)] for gap in gaps]
        rows.append([name, str(len(gaps)), rate([h[0] for h in held]), rate([h[1] for h in held])])
    header = ["effect", "studies", "other test rows too, holds the truth", "these test rows, holds 0"]
    return table_of(header, rows, "intervals")
