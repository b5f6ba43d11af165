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

    A conversation keeps its own system message, if it begins with one and there is no `instruction`; those of the
    conversations that are shown stay out, since a conversation has one. A contrast prompt is one user message behind
    it, which says of conversations of several turns who says what.

    Args:
        k: How many.
        contrast: Show each demonstration's rejected answer too ("Good response: ... Bad response: ..."), and ask for a
            good response.
        instruction: A text in front of everything: of conversations the system message, whose own it replaces as the
            view `instruction` does, or with `contrast` the beginning of the one user message.
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
        # where all ask the same, the answers are what rows differ in
        one_prompt = len(pool) > 1 and all(row["prompt"] == pool[0]["prompt"] for row in (*pool, *rows))
        key = _identity if one_prompt else prompt_of
        seen = []
        for i, row in enumerate(rows):
            # a row never demonstrates itself, nor does another row with its prompt
            others = [other for other in pool if key(other) != key(row)]
            if len(others) < self.k:
                raise ViewError(f"Row {i}: {self.k} demonstrations asked, {len(others)} other examples are there.")
            drawn = random.Random(f"{self.seed}/{key(row)}").sample(others, self.k)
            seen.append({**row, "prompt": self._prompt(prompt_of(row), drawn)})
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
        shown = [tuple(map(_turns, (other["prompt"], _answer(other), self._bad(other)))) for other in drawn]
        if isinstance(prompt, str):
            return self._text(prompt, shown)
        leads = bool(prompt) and prompt[0]["role"] == "system"
        system, turns = (prompt[:1], prompt[1:]) if leads else ([], prompt)
        if self.contrast:  # one user message: a conversation has no turn for a bad answer
            text = self._text(_said(turns), [tuple(map(_said, parts)) for parts in shown])
            return [*([] if self.instruction else system), {"role": "user", "content": text}]
        if self.instruction:
            system = [{"role": "system", "content": self.instruction}]
        return [*system, *(message for other, good, _ in shown for message in (*other, *good)), *turns]

    def _bad(self, other: Row) -> Any:
        if not self.contrast:
            return None
        if "rejected" not in other:
            raise ViewError("contrast=True shows rejected answers, and the data have none.")
        return other["rejected"]

    def _text(self, prompt: str, shown: Sequence[tuple[Any, ...]]) -> str:
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
    """Its prompt and its answer, if it has one."""
    return json.dumps([prompt_of(row), row.get("chosen", row.get("completion"))], sort_keys=True)


def _answer(row: Row) -> Any:
    return row["chosen"] if "chosen" in row else row["completion"]


def _turns(value: Any) -> Any:
    """A conversation without its system messages; a text as it is."""
    return [message for message in value if message["role"] != "system"] if isinstance(value, list) else value


def _said(value: Any) -> str:
    """A conversation as text: what its one message says, or who says what."""
    if not isinstance(value, list):
        return value or ""
    if len(value) == 1:
        return value[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)
