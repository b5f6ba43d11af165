"""The rows that every way trains on: random words, all rows of one length, or the pairs of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.reading import read_file
from steertune.trainers.data import tokenised_rows


@dataclass(frozen=True)
class Rows:
    """What one benchmark trains on.

    Attributes:
        batch: Demonstrations per step.
        pairs: Pairs per step.
        length: Tokens of a row; 0 for rows of a file.
        prompt: Tokens of its prompt; 0 for rows of a file.
        file: JSON lines with `prompt`, `chosen` and `rejected`; None for random words.
        epoch: Batches of the data set, which is what the first epoch reads.
        steps: Timed steps per turn; with unequal rows a whole epoch, because batches differ.
    """

    batch: int
    pairs: int
    length: int = 0
    prompt: int = 0
    file: Path | None = None
    epoch: int = 8
    steps: int = 2

    @classmethod
    def of_one_length(cls, text: str, tokens: int) -> Rows:
        """Random words.

        Args:
            text: `TOKENS/PROMPT`, the tokens of a row and of its prompt.
            tokens: Tokens of a batch.

        Raises:
            ArmError: `text` is something else.
        """
        try:
            length, prompt = map(int, text.split("/"))
        except ValueError:
            length, prompt = 0, 0
        if not 0 < prompt < length - 1:
            raise ArmError(f"--rows {text} must be TOKENS/PROMPT, with at least 1 token of prompt and 2 of answer.")
        batch = max(2, tokens // length)
        return cls(batch, batch // 2, length, prompt)

    @classmethod
    def of_file(cls, file: Path, batch: int) -> Rows:
        """Pairs of a file, drawn with seed 0; the chosen answers are the demonstrations."""
        return cls(batch, batch, file=file, epoch=4, steps=4)

    @property
    def title(self) -> str:
        """The label of these rows on a page; also their key in `table.json`."""
        if self.file is not None:
            return f"rows of {self.file.name}, {self.batch} per batch (seed 0)"
        return f"{self.batch} rows of {self.length} tokens, {self.prompt} of them prompt"

    @property
    def words(self) -> list[str]:
        """The options of the command that select these rows."""
        if self.file is not None:
            return ["--pairs", str(self.file), "--batch", str(self.batch)]
        return ["--rows", f"{self.length}/{self.prompt}", "--tokens", str(self.batch * self.length)]

    def data(self, tokenizer: Any, kind: str) -> Dataset:
        """The data set of an epoch.

        Args:
            tokenizer: The tokenizer.
            kind: `sft` (one answer per prompt) or `dpo` (two).

        Raises:
            ArmError: the file has too few rows.
        """
        count = self.epoch * (self.pairs if kind == "dpo" else self.batch)
        if self.file is None:
            return random_words(tokenizer, kind, self.length, self.prompt, count)
        rows = read_file(self.file)
        if len(rows) < count:
            raise ArmError(f"{self.file}: {len(rows)} rows. {count} are needed. Use a smaller --batch.")
        rows = rows.shuffle(seed=0).select(range(count)).select_columns(["prompt", "chosen", "rejected"])
        return rows if kind == "dpo" else rows.rename_column("chosen", "completion").remove_columns("rejected")

    def tokens(self, tokenizer: Any, kind: str) -> tuple[float, float]:
        """Mean tokens of a batch: those of prompts, where a pair's prompt counts once, and those of answers."""
        prompts = answers = 0
        for row in tokenised_rows(self.data(tokenizer, kind), tokenizer):
            if kind == "dpo":
                prompts += len(row["prompt_ids"])
                answers += len(row["chosen_ids"]) + len(row["rejected_ids"])
            else:
                labelled = sum(label != -100 for label in row["labels"])
                prompts += len(row["labels"]) - labelled
                answers += labelled
        return prompts / self.epoch, answers / self.epoch


def random_words(tokenizer: Any, kind: str, length: int, prompt: int, count: int) -> Dataset:
    """Rows of random words of one token each.

    Args:
        tokenizer: The tokenizer.
        kind: `sft` (one answer per prompt) or `dpo` (two).
        length: Tokens of a row, with the end of the answer.
        prompt: Tokens of its prompt.
        count: Number of rows.
    """
    generator = np.random.default_rng(0)
    decoded = (tokenizer.decode([i]) for i in range(200, 5000))
    words = [w for w in decoded if w.startswith(" ") and w[1:].isalpha() and w.isascii()]

    def text(tokens: int) -> str:
        return "".join(generator.choice(words, tokens))

    sides = ("chosen", "rejected") if kind == "dpo" else ("completion",)
    return Dataset.from_list(
        [{"prompt": text(prompt), **{side: text(length - prompt - 1) for side in sides}} for _ in range(count)]
    )
