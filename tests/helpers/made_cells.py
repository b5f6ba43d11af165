"""Cells of a grid that never ran, in memory, so that what a report should say of them is known."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steertune.recipes.ablation.cells import cells_table
from steertune.recipes.ablation.findings import Findings, find
from steertune.recipes.ablation.grid import Grid, make_grid
from steertune.recipes.lab.pages import Block, Section, Table, Text
from steertune.recipes.lab.rows import BASE, MATCHED, TUNED, Record, at_kl

GRID = """
name = "made"
arms = ["vector_dpo", "lora_dpo", "mean_difference", "full_dpo"]
tasks = ["lower_case", "hedged", "formal", "agreeing"]
examples = [8]
seeds = [0, 1]

[card]
problem = "Does the form matter?"
hypothesis = "The vector shows more behaviour at the same KL."
against = "LoRA shows more."
baselines = "LoRA, the untrained mean difference, full finetuning."
affordances = { "*" = "the same pairs" }

[claim]
better = "vector_dpo"
than = "lora_dpo"
measure = "behaviour"
strength = "frontier"
"""
TARGETS = (0.03, 0.1, 0.3)
BETTER, THAN, CLOSED, RIGID = "vector DPO", "LoRA DPO", "mean difference", "full DPO"
"""Labels of the arms: the claim's, one in closed form, and one without a strength."""

Values = Callable[[str, int, int, float], Sequence[float]]
"""Arm, index of the task, seed and KL -> the scores of a cell's answers."""


@dataclass
class Made:
    """What a cell looks like.

    Attributes:
        strength: Arm and KL -> the strength that reaches it.
        kl: Arm and KL -> the KL that is reached there.
        observed: Arm and KL -> further observations of every cell.
        facts: Further facts, by arm.
        claim: Changes of the claim.
    """

    strength: Callable[[str, float], float] = lambda arm, kl: 1.0
    kl: Callable[[str, float], float] = lambda arm, kl: kl
    observed: Callable[[str, float], Mapping[str, Any]] = lambda arm, kl: {}
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    claim: Mapping[str, Any] = field(default_factory=dict)

    def findings(self, values: Values, seeds: int = 2) -> Findings:
        """The findings of the whole grid."""
        grid, records = self.run(values, seeds)
        assert grid.tables.claim is not None
        return find({**grid.to_json(), "command": "made up"}, grid.tables, grid.tables.claim, cells_table(records))

    def run(self, values: Values, seeds: int = 2) -> tuple[Grid, list[Record]]:
        """The grid, and the record of every cell; arms go by their labels."""
        raw = tomllib.loads(GRID)
        raw["claim"] |= self.claim
        raw["seeds"] = [*range(seeds)]
        grid = make_grid(raw)
        labels = {"vector_dpo": BETTER, "lora_dpo": THAN, "mean_difference": CLOSED, "full_dpo": RIGID}
        tasks = [task.label for task in grid.tasks]
        return grid, [
            self._record(labels[cell.arm.name], cell.arm.name, tasks.index(cell.task.label), cell, values)
            for cell in grid.cells()
        ]

    def _record(self, label: str, arm: str, task: int, cell: Any, values: Values) -> Record:
        def seen(kl: float) -> dict[str, list[Any]]:
            scores = [float(score) for score in values(label, task, cell.seed, kl)]
            own = {
                "margin": [1.0, -1.0] * 4,
                "score": scores,
                "answer": ["one two three four"] * len(scores),
                "answer_cut": [0.0] * len(scores),
                "neutral_kl": [self.kl(label, kl)],
                "neutral_nll": [math.log(5.0)],
                "neutral_tokens": [1],
            }
            return own | {name: [*rows] for name, rows in self.observed(label, kl).items()}

        observations = {BASE: seen(0.0), TUNED: seen(0.1)}
        frontier = []
        if label != RIGID:
            observations |= {MATCHED: seen(0.1), **{at_kl(kl): seen(kl) for kl in TARGETS}}
            frontier = [
                {"target": kl, "strength": self.strength(label, kl), "kl": (reached := self.kl(label, kl)),
                 "reached": math.isclose(reached, kl, rel_tol=0.1)}
                for kl in TARGETS
            ]  # fmt: skip
        facts = {
            "key": cell.key, "status": "ok", "error": None, "scalable": label != RIGID, "parameters": 576,
            "tuned_strength": self.strength(label, 0.1), "tuning_key": f"{arm}/{task}",
            "setting": {"rate": 1.0, "steps": 0 if label == CLOSED else 16, "strength": 1.0},
            "train_seconds": 1.0, "tuning_seconds": 2.0, "peak_memory_gb": 1.0,
            "frontier": frontier, "kl_falls": False,
        }  # fmt: skip
        keys = {"arm": arm, "task": cell.task.label, "examples": cell.examples, "seed": cell.seed}
        return Record(keys, observations, facts | dict(self.facts.get(label, {})))


def texts(section: Section | None) -> str:
    """All prose of a section."""
    assert section is not None
    return "\n".join(block.markdown for block in section.blocks if isinstance(block, Text))


def rows_of_table(blocks: Sequence[Block], name: str) -> dict[str, dict[str, str]]:
    """A table of a section: first column -> header -> text."""
    [table] = [block.frame for block in blocks if isinstance(block, Table) and block.name == name]
    return {row.iloc[0]: {str(key): str(value) for key, value in row.items()} for _, row in table.iterrows()}
