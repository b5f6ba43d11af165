"""Measure tasks on the base model: `python recipes/tasks/check.py [TASK ...] [--rows 208] [--answers 32]`.

For every task: the lengths of the answers and how much they differ, the base's pair accuracy and the correlation of
its margin with the length, how well the task's scorer tells chosen from rejected answers, and how often the base's
answers show the behaviour. The cards of the tasks quote these numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch

from steertune.recipes.lab import embedded, scorers
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.behaviours import read_behaviour
from steertune.recipes.lab.generation import generate, plain
from steertune.recipes.lab.sources import load_split
from steertune.trainers import ModelAt

_BATCH = 16
_NEW_TOKENS = 32
COLUMNS = ("task", "tokens", "largest difference", "base accuracy", "correlation", "scorer accuracy", "base behaviour")


@torch.no_grad()
def margins(model: torch.nn.Module, batched: Sequence[object]) -> np.ndarray:
    """`log p(chosen) - log p(rejected)` of every pair, `(pairs,)`."""
    values = []
    for batch in batched:
        chosen, rejected = ModelAt(model, model, batch)(1.0).logps.chunk(2)  # pyright: ignore[reportArgumentType]
        values += (chosen - rejected).tolist()
    return np.array(values)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; 0 if one of the two is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def scores(name: str, answers: Sequence[str]) -> np.ndarray:
    """The scores of answers by the task's scorer, `(answers,)`."""
    scorer = scorers.fit(read_behaviour(name).scorer_table({}), load_split(name, "validation"), None, None)
    return np.array(scorer.score([""] * len(answers), answers), dtype=float)


def check(name: str, model: torch.nn.Module, rows: int, answers: int) -> tuple[str, ...]:
    """One line of the table."""
    tokenizer = embedded.load_tokenizer()
    test = load_split(name, "test")
    test = test.select(range(min(rows, len(test))))
    texts = {side: [plain(answer) for answer in test[side]] for side in ("chosen", "rejected")}
    # lengths of both answers, and the base's margin
    lengths = {side: np.array([len(ids) for ids in tokenizer(texts[side])["input_ids"]]) for side in texts}
    difference = lengths["chosen"] - lengths["rejected"]
    margin = margins(model, batches(tokenizer, test, _BATCH))
    line = [name, f"{np.mean([*lengths.values()]):.1f}", str(int(np.abs(difference).max()))]
    line += [f"{(margin > 0).mean():.3f}", f"{correlation(margin, difference):+.2f}"]
    # the task's rule, on the pairs and on the base's answers
    if read_behaviour(name).scorer is None:
        return (*line, "", "")
    right = [*(scores(name, texts["chosen"]) == 1), *(scores(name, texts["rejected"]) == 0)]
    generated: list[str] = []
    for start in range(0, min(answers, len(test)), _BATCH):
        generated += generate(model, tokenizer, test["prompt"][start : min(start + _BATCH, answers)], _NEW_TOKENS)
    return (*line, f"{np.mean(right):.3f}", f"{scores(name, generated).mean():.2f}" if generated else "")


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help="all of them if none is given")
    parser.add_argument("--rows", type=int, default=208, help="test pairs")
    parser.add_argument("--answers", type=int, default=32, help="test prompts that the base model answers")
    options = parser.parse_args()
    model = embedded.load_model()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in options.tasks or embedded.task_names():
        print(f"| {' | '.join(check(name, model, options.rows, options.answers))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
