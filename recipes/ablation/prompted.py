"""Arms that train nothing and say more in front of every prompt: an instruction, demonstrations, contrast prompts.

    [prompt]
    demonstrations = 4      # of the arm's own training examples, other ones for every prompt
    contrast = true         # each with its rejected answer: "Good response: ... Bad response: ..."
    instruction = true      # what the task's `instructions` say; the tuning chooses among them

What they cost is paid at inference: `prompt_tokens` of a cell are the tokens that every request is longer.
"""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset

from steertune.recipes.ablation.bench import Bench
from steertune.recipes.ablation.grid import Cell
from steertune.recipes.lab.measures import check_context, prompt_lengths
from steertune.trainers import View
from steertune.trainers.views import get_view

Show = Callable[[Dataset], Dataset]
"""From rows to the rows that a model is shown instead."""


def candidates(cell: Cell) -> list[str]:
    """The instructions that the tuning of a prompting arm tries; one that is empty for an arm without."""
    return cell.task.instructions if cell.arm.arm.prompt.instruction else [""]


def shown(cell: Cell, bench: Bench, seed: int, choice: int = 0) -> Show:
    """What a cell's model is shown: the rows themselves, unless its arm is a prompt.

    Args:
        cell: The cell.
        bench: Where its training rows are.
        seed: Of the training rows, which are the demonstrations.
        choice: Index of the instruction.
    """
    prompt = cell.arm.arm.prompt
    if not prompt:
        return lambda rows: rows
    text = candidates(cell)[choice]
    if prompt.demonstrations:
        pool = bench.splits(cell.task).train(cell.examples, seed).to_list()
        view: View = get_view(
            "demonstrations", k=prompt.demonstrations, contrast=prompt.contrast, instruction=text, pool=tuple(pool)
        )
    else:
        view = get_view("instruction", text=text)

    def show(rows: Dataset) -> Dataset:
        seen = Dataset.from_list([dict(row) for row in view(rows.to_list())])
        check_context(bench.model, bench.tokenizer, seen, bench.grid.tables.new_tokens, cell.title)
        return seen

    return show


def prompt_tokens(bench: Bench, rows: Dataset, show: Show) -> float:
    """Tokens that a request is longer, on average."""
    plain, seen = (prompt_lengths(bench.tokenizer, part["prompt"]) for part in (rows, show(rows)))
    return sum(b - a for a, b in zip(plain, seen, strict=True)) / len(plain)
