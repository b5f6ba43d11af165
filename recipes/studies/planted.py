"""Do studies tell the truth? Runs whole studies of problems whose answer is known.

    steertune planted --folder docs/results/planted/forms

A teacher is the base model plus one known change: a vector, a rank-one gate or a rank-one LoRA at a known layer, or no
change at all. Of two answers, the chosen one is the answer that the change makes more likely. Every study is a grid
with tasks, seeds and matched KL like a real one (but with nothing to tune), and its arms cross the form of the adapter
with its layer. The page reports how often a study names and claims the teacher's form and layer, how often it claims a
difference where there is none, and how often its 95 % intervals contain the true difference.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from transformers import AutoModelForCausalLM

from steertune.adapters.saved import CHECKSUMS, check_checksums
from steertune.recipes.ablate import run
from steertune.recipes.ablation.cells import read_cells
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.ablation.store import Store
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.options import Choice, Count, Option
from steertune.recipes.lab.pages import write_page
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.studies.planting import FORMS, PROBLEMS
from steertune.recipes.studies.planting.page import page
from steertune.recipes.studies.planting.studies import Study, read_study
from steertune.recipes.studies.planting.teachers import LAYER, save_base, write_task

CHOSEN: list[str] = list(PROBLEMS)
WRONG_LAYER = 0
TASKS, SEEDS, EXAMPLES, TEST = 2, 4, 128, 60


@command
def main(
    problems: Annotated[list[str], Choice(PROBLEMS, "teachers to study", metavar="NAME ...")] = CHOSEN,
    studies: Annotated[int, Count("of every problem except base")] = 8,
    nulls: Annotated[int, Count("studies of base, where every claim is false")] = 20,
    threads: Annotated[int, Count("CPU threads; the models are tiny")] = 1,
    folder: Annotated[Path, Option(help="where the studies are run")] = Path("runs/planted"),
) -> Result:
    """Run the studies that are missing, and write the table."""
    begin(threads, only_one=True)
    gc.freeze()  # the many small tests would otherwise spend most of their time collecting garbage

    # the model is written once; a checksum file says that it is complete
    base = folder / "model"
    if not (base / CHECKSUMS).exists():
        save_base(base)
    check_checksums(base)

    numbers = [(problem, i) for problem in problems for i in range(nulls if problem == "base" else studies)]
    finished: dict[str, list[Study]] = {problem: [] for problem in problems}
    with progress("Studies", len(numbers)) as bar:
        for problem, i in numbers:
            with bar.step(f"{problem} {i}"):
                finished[problem].append(study(problem, i, base, folder))
    size = f"{TASKS} tasks x {SEEDS} seeds, with {EXAMPLES} examples and {TEST} test rows"
    file = write_page(page(finished, size), folder, "table")
    result = {problem: [asdict(one) for one in many] for problem, many in finished.items()}
    return Result(result, file.read_text(encoding="utf-8"))


def study(problem: str, number: int, base: Path, folder: Path) -> Study:
    """Run a study, or the cells it still lacks, and read its results. Its number seeds the teachers and the data.

    Raises:
        ArmError: a cell failed.
    """
    home = folder / problem / f"s{number:03d}"
    # another seed gives another teacher of the same kind
    tasks = [home / "data" / f"t{i}" for i in range(TASKS)]
    model: Any = None
    for i, task in enumerate(tasks):
        if not (task / CHECKSUMS).exists():
            model = model or AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False).eval()
            seed = (PROBLEMS.index(problem) * 1000 + number) * TASKS + i
            write_task(task, model, problem, seed, train=EXAMPLES + 100, test=TEST)
        check_checksums(task)
    grid = make_grid(tables(problem, base, [str(task) for task in tasks]))
    cells = grid.cells()
    Store(home).check(cells)
    failed = run(cells, Context(grid), home, show=False)
    if failed:
        raise ArmError(f"{len(failed)} cells of {home} failed, the first {failed[0]}: see their failed.json.")
    return read_study(problem, grid, read_cells(home, grid.to_json()))


def tables(problem: str, base: Path, tasks: list[str]) -> dict[str, Any]:
    """The grid of a study: form x layer, with the same tuning budget for all."""
    lora = {"type": "lora", "r": 1, "lora_alpha": 15, "target_modules": ["down_proj"]}
    at = {"right": LAYER, "wrong": WRONG_LAYER}
    true = problem if problem in FORMS else "bias"
    start = {"form": "lora" if true != "lora" else "bias", "layer": "wrong"}
    end = {"form": true, "layer": "right"}
    return {
        "name": "planted",
        "model": {"name": str(base), "threads": 1},
        "neutral": str(base / "neutral.jsonl"),
        "tasks": [{"name": task, "scorer": {"kind": "rule", "pattern": "w1"}} for task in tasks],
        "examples": [EXAMPLES],
        "seeds": list(range(SEEDS)),
        "generations": 0,
        "questions": 0,
        "trainer": {"per_device_train_batch_size": 16},
        "loss": {"beta": 1.0},  # margins are a few nats here
        "splits": {"validation": 40, "test": TEST, "scorer": 0, "near_duplicates": 1.0},
        "budget": {"trials": 1, "steps": [20]},
        "matched": {"kl": 0.3, "frontier": []},
        "card": {
            "problem": "Does the instrument find the change that was planted?",
            "hypothesis": "The arm with the teacher's own form and layer is the best.",
            "against": "Another arm is named, or a difference is claimed where there is none.",
            "baselines": "The other forms, and the wrong layer.",
            "affordances": {"*": "the same pairs, the same budget"},
        },
        "claim": {
            "better": _arm(end), "than": _arm(start), "measure": "accuracy", "strength": "matched", "tasks": "fixed"
        },
        "design": {"kind": "full", "start": start, "end": end},
        "factors": {
            "form": {
                "bias": {"adapter": {"type": "steering_vector", "form": "bias"}, "trainer": {"learning_rate": 0.01}},
                "gated": {
                    "adapter": {"type": "steering_vector", "form": "gated"}, "trainer": {"learning_rate": 0.01}
                },
                "lora": {"adapter": lora, "trainer": {"learning_rate": 0.03}},
            },
            "layer": {
                level: [
                    {"when": {"form": "lora"}, "adapter": {"layers_to_transform": [layer]}},
                    {"adapter": {"layers": [layer]}},
                ]
                for level, layer in at.items()
            },
        },
    }  # fmt: skip


def _arm(levels: dict[str, str]) -> str:
    return ",".join(f"{factor}={level}" for factor, level in levels.items())


if __name__ == "__main__":
    sys.exit(main())
