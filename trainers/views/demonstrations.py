"""The example after other examples: k-shot prompts, and contrast prompts that show a bad answer next to a good one."""

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

    A conversation keeps its own system message, if it begins with one and there is no `instruction`. System messages
    of demonstrations are left out, since a conversation has only one. A contrast prompt is one user message after it;
    in conversations with several turns, each turn is labelled with its role.

    Args:
        k: Number of demonstrations.
        contrast: Show each demonstration's rejected answer too ("Good response: ... Bad response: ..."), and ask for a
            good response.
        instruction: A text before everything else. In conversations it is the system message, and replaces the
            conversation's own, as the view `instruction` does; with `contrast` it begins the one user message.
        seed: Seed of the draws.
        pool: Rows to draw from; if empty, the other rows of the training data, also for evaluation rows.

    Raises:
        ValueError: k is below 1.
    """

    k: int = 4
    contrast: bool = False
    instruction: str = ""
    seed: int = 0
    pool: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k={self.k!r} must be a whole number, 1 or more.")

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Put demonstrations into the rows' prompts.

        Raises:
            ViewError: there are fewer than k other rows, or a contrast has no rejected answers.
        """
        pool = self.pool or rows
        # if all rows have the same prompt, their answers tell them apart
        one_prompt = len(pool) > 1 and all(row["prompt"] == pool[0]["prompt"] for row in (*pool, *rows))
        key = _identity if one_prompt else prompt_of
        viewed = []
        for i, row in enumerate(rows):
            # neither the row itself nor another row with its prompt is a demonstration
            others = [other for other in pool if key(other) != key(row)]
            if len(others) < self.k:
                raise ViewError(f"Row {i}: k={self.k} demonstrations need as many other examples (got {len(others)}).")
            drawn = random.Random(f"{self.seed}/{key(row)}").sample(others, self.k)
            viewed.append({**row, "prompt": self._prompt(prompt_of(row), drawn)})
        return viewed

    def for_evaluation(self, training: Sequence[Row], rows: Sequence[Row]) -> View:
        """Draw the demonstrations of evaluation rows from the training rows too.

        Raises:
            ViewError: the rows to draw from contain evaluation rows.
        """
        pool = self.pool or tuple(training)
        identities = {_identity(row) for row in rows}
        if shared := [row for row in pool if _identity(row) in identities]:
            raise ViewError(
                f"{len(shared)} of the {len(pool)} rows that demonstrations are drawn from are evaluation rows too, "
                f"such as {shared[0]['prompt']!r:.120}. Remove them from the training data, or from pool=."
            )
        return replace(self, pool=pool)

    def _prompt(self, prompt: Any, drawn: Sequence[Row]) -> Any:
        # each example is a prompt, a good and a bad answer
        answers = [other["chosen"] if "chosen" in other else other["completion"] for other in drawn]
        examples = [
            tuple(map(_turns, (other["prompt"], good, self._bad(other))))
            for other, good in zip(drawn, answers, strict=True)
        ]
        if isinstance(prompt, str):
            return self._text(prompt, examples)
        has_system = bool(prompt) and prompt[0]["role"] == "system"
        system, turns = (prompt[:1], prompt[1:]) if has_system else ([], prompt)
        if self.contrast:  # one user message: a conversation has no turn for a bad answer
            text = self._text(_as_text(turns), [tuple(map(_as_text, parts)) for parts in examples])
            return [*([] if self.instruction else system), {"role": "user", "content": text}]
        if self.instruction:
            system = [{"role": "system", "content": self.instruction}]
        return [*system, *(message for other, good, _ in examples for message in (*other, *good)), *turns]

    def _bad(self, other: Row) -> Any:
        if not self.contrast:
            return None
        if "rejected" not in other:
            raise ViewError(
                "contrast=True shows rejected answers, but the data have none. Give pairs, or leave contrast out."
            )
        return other["rejected"]

    def _text(self, prompt: str, examples: Sequence[tuple[Any, ...]]) -> str:
        parts = [self.instruction] if self.instruction else []
        for other, good, bad in examples:
            if self.contrast:
                parts.append(f"{other.strip()}\n{_GOOD} {good.strip()}\n{_BAD} {(bad or '').strip()}")
            else:
                parts.append(f"{other.rstrip()} {good.strip()}")
        end = prompt[len(prompt.rstrip()) :]
        parts.append(f"{prompt.strip()}\n{_GOOD}{end}" if self.contrast else prompt)
        return "\n\n".join(parts)


def _identity(row: Row) -> str:
    """A row's prompt and answer, if it has one, as a key."""
    return json.dumps([prompt_of(row), row.get("chosen", row.get("completion"))], sort_keys=True)


def _turns(value: Any) -> Any:
    """A conversation without its system messages; a string unchanged."""
    return [message for message in value if message["role"] != "system"] if isinstance(value, list) else value


def _as_text(value: Any) -> str:
    """A conversation as text: the content of its single message, or all messages with their roles."""
    if not isinstance(value, list):
        return value or ""
    if len(value) == 1:
        return value[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)
