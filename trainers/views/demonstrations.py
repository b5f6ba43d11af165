"""The example behind others like it: k-shot prompts, and contrast prompts that show a bad answer beside a good one."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ._base import Row, View, ViewError, prompt_of

_GOOD, _BAD = "Good response:", "Bad response:"


@dataclass(frozen=True)
class Demonstrations(View):
    """`k` other rows of the same data in front of every prompt.

    Args:
        k: How many.
        contrast: Show each demonstration's rejected answer too ("Good response: ... Bad response: ..."), and ask for a
            good response.
        instruction: A text in front of everything.
        seed: Which ones are drawn for which prompt.
        pool: Rows to draw from; none: the other rows of the training data, also in front of evaluation rows.

    Raises:
        ValueError: k below 1.
    """

    k: int = 4
    contrast: bool = False
    instruction: str = ""
    seed: int = 0
    pool: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k={self.k!r}: one demonstration or more.")

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Rows with demonstrations in their prompts.

        Raises:
            ViewError: fewer than k other rows, or a contrast without rejected answers.
        """
        pool = self.pool or rows
        seen = []
        for i, row in enumerate(rows):
            prompt = prompt_of(row)
            # a row never demonstrates itself, nor does another row with its prompt
            others = [other for other in pool if other["prompt"] != prompt]
            if len(others) < self.k:
                raise ViewError(f"Row {i}: {self.k} demonstrations asked, {len(others)} other examples are there.")
            drawn = random.Random(f"{self.seed}/{prompt}").sample(others, self.k)
            seen.append({**row, "prompt": self._prompt(prompt, drawn)})
        return seen

    def for_evaluation(self, training: Sequence[Row], rows: Sequence[Row]) -> View:
        """Demonstrations of evaluation rows are training rows too.

        Raises:
            ViewError: evaluation rows are among those that are drawn from.
        """
        pool = self.pool or tuple(training)
        measured_on = {_identity(row) for row in rows}
        if shared := [row for row in pool if _identity(row) in measured_on]:
            raise ViewError(
                f"{len(shared)} of the {len(pool)} rows that demonstrations are drawn from are evaluation rows too, "
                f"such as {shared[0]['prompt']!r:.120}. Take them out of the training data, or of pool=."
            )
        return replace(self, pool=pool)

    def _prompt(self, prompt: Any, drawn: Sequence[Row]) -> Any:
        shown = [(other["prompt"], _answer(other), self._bad(other)) for other in drawn]
        if isinstance(prompt, str):
            return self._text(prompt, shown)
        if self.contrast:  # one user message: a conversation has no turn for a bad answer
            return [
                {
                    "role": "user",
                    "content": self._text(_said(prompt), [(_said(p), _said(g), _said(b)) for p, g, b in shown]),
                }
            ]
        turns = [message for other, good, _ in shown for message in (*other, *good)]
        system = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return [*system, *(m for m in turns if m["role"] != "system"), *(m for m in prompt if m["role"] != "system")]

    def _bad(self, other: Row) -> Any:
        if not self.contrast:
            return None
        if "rejected" not in other:
            raise ViewError("contrast=True shows rejected answers, and the data have none.")
        return other["rejected"]

    def _text(self, prompt: str, shown: Sequence[tuple[str, str, str | None]]) -> str:
        parts = [self.instruction] if self.instruction else []
        for other, good, bad in shown:
            if self.contrast:
                parts.append(f"{other.strip()}\n{_GOOD} {good.strip()}\n{_BAD} {(bad or '').strip()}")
            else:
                parts.append(f"{other.rstrip()} {good.strip()}")
        end = prompt[len(prompt.rstrip()) :]
        parts.append(f"{prompt.strip()}\n{_GOOD}{end}" if self.contrast else prompt)
        return "\n\n".join(parts)


def _identity(row: Row) -> str:
    return json.dumps([prompt_of(row), _answer(row)], sort_keys=True)


def _answer(row: Row) -> Any:
    return row["chosen"] if "chosen" in row else row["completion"]


def _said(messages: Any) -> str:
    return (
        "\n".join(m["content"] for m in messages if m["role"] != "system")
        if isinstance(messages, list)
        else messages or ""
    )
