"""Check whether answers of the allowed length can show a behaviour, which is lost if it is in the part cut off.

A task such as `question_at_the_end`, whose answers have 25 tokens, is at its floor by construction if only 16 can be
generated, whatever an arm has learned. So the task's pairs are cut at that length and scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from steertune.recipes.lab.generation import plain
from steertune.recipes.lab.pair_lint import Finding
from steertune.recipes.lab.scorers import Scorer

KEPT = 0.8
"""Cut answers must keep at least this share of the score difference between whole chosen and rejected answers."""
LONGER = 0.5
"""If the scorer is not free to run, warn if at least this share of the answers is longer."""
_PAIRS = 100
_SIDES = ("chosen", "rejected")
_ROOM = 0.95  # share of the answers that the suggested length leaves whole


def too_short(
    rows: Dataset, scorer: Scorer, tokenizer: Any, new_tokens: int, name: str = "new_tokens"
) -> Finding | None:
    """A finding if pairs that are cut at `new_tokens` no longer show the behaviour to its scorer; else None.

    Args:
        rows: Pairs that show the behaviour; the first 100 are used.
        scorer: The scorer of the behaviour. If it reads more than text, it is not run, and only the share of longer
            answers counts.
        tokenizer: The tokenizer of the model that will answer.
        new_tokens: Maximum length of a generated answer.
        name: The name of this setting in the message.
    """
    if not len(rows) or not {*_SIDES} <= {*rows.column_names}:
        return None
    rows = rows.select(range(min(_PAIRS, len(rows))))
    texts = {side: [plain(answer) for answer in rows[side]] for side in _SIDES}
    ids = {side: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[side]] for side in _SIDES}
    lengths = [len(answer) for answer in ids["chosen"]]
    longer = float(np.mean(np.array(lengths) > new_tokens))
    if not longer:
        return None
    fix = f"Set {name} = {_rank(lengths, _ROOM)}, which leaves {_ROOM:.0%} of them whole."
    cut_off = f"{name}={new_tokens} cuts off {longer:.0%} of the chosen answers"
    if not scorer.reads_text_alone:
        text = f"{cut_off}, so a behaviour at their end cannot be seen. {fix}"
        return Finding("cut answers", text, value=longer) if longer >= LONGER else None

    cut = {side: [tokenizer.decode(answer[:new_tokens]).strip() for answer in ids[side]] for side in _SIDES}
    prompts = [plain(prompt) for prompt in rows["prompt"]] if "prompt" in rows.column_names else [""] * len(rows)
    whole_gap, cut_gap = (_gap(scorer, prompts, answers) for answers in (texts, cut))
    if whole_gap <= 0 or cut_gap >= KEPT * whole_gap:
        return None
    text = (
        f"{cut_off}. Cut there, chosen answers score {cut_gap:.2f} more than rejected ones, and {whole_gap:.2f} more "
        f"when whole, so {1 - cut_gap / whole_gap:.0%} of this behaviour cannot be seen. {fix}"
    )
    return Finding("cut answers", text, value=cut_gap / whole_gap)


def _gap(scorer: Scorer, prompts: Sequence[str], texts: dict[str, list[str]]) -> float:
    """The mean score of chosen answers minus that of rejected ones."""
    scores = (np.array(scorer.score(prompts, texts[side]), dtype=float) for side in _SIDES)
    chosen, rejected = (np.nanmean(values) if np.isfinite(values).any() else 0.0 for values in scores)
    return float(chosen - rejected)


def _rank(lengths: Sequence[int], share: float) -> int:
    """The smallest of the lengths that at least this share of them does not exceed."""
    return int(np.quantile(lengths, share, method="higher"))
