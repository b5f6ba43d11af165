"""Compare arms on the same data: every arm x task x number of examples x seed, and one table.

    python -m steertune.recipes.compare --folder runs/compare

A cell is one run; its `cell.json` is written last and whole, so a killed comparison goes on where it stopped. Smaller
training sets are subsets of larger ones, and all arms of a seed see the same examples.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm

from steertune.adapters.checks import check_checksums, read_tensors, write_checksums
from steertune.recipes.arm import Arm, load_arm
from steertune.recipes.data import load_model, load_splits
from steertune.recipes.files import ArmError, check_name, read_result, write_result, write_whole
from steertune.recipes.measures import pair_margins
from steertune.recipes.processes import begin, command, positive
from steertune.recipes.training import fit, make_trainer

ARMS = ("bias_dpo", "bias_ce", "beft_dpo", "lora_dpo", "mean_difference")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--tasks", nargs="+", required=True, help="embedded tasks or paths, as data.name")
    parser.add_argument("--examples", nargs="+", type=positive, default=[8, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--test", type=positive, default=40, help="held-out pairs")
    parser.add_argument("--threads", type=positive, help="CPU threads (all cores)")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    options = parser.parse_args(argv)
    disable_progress_bars()
    cells = list(itertools.product(options.seeds, options.tasks, options.examples, options.arms))
    for what, names in (("--tasks", options.tasks), ("--arms", options.arms)):
        if len({Path(name).stem for name in names}) < len(names):
            raise ArmError(f"{what} {names}: two have the same name, and would share their cells. Rename one.")
    begin(options.threads, only_one=True)
    arms = [_cell_arm(options, *cell) for cell in cells]  # refuses a bad cell before the first one runs
    base = None
    base_margins: dict[str, torch.Tensor] = {}
    for arm in tqdm(arms, desc="Cells", unit="cell"):
        if (Path(str(arm.output.folder)) / "cell.json").exists():
            continue
        base = base or load_model(arm.model)
        run_cell(arm, *base, base_margins)
    table = summarise(options.folder)
    write_whole(options.folder / "table.md", table)
    print(table)
    return 0


def _cell_arm(options: argparse.Namespace, seed: int, task: str, examples: int, arm: str) -> Arm:
    name = Path(arm).stem if Path(arm).suffix == ".toml" else arm
    check_name("task", Path(task).name)
    check_name("arm", name)
    folder = options.folder / Path(task).name / f"n{examples}" / f"seed{seed}" / name
    values = {
        "data.name": task,
        "data.train": examples,
        "data.test": options.test,
        "data.seed": seed,
        "output.folder": folder,
        "trainer.save_strategy": "no",
        "trainer.disable_tqdm": "true",
    }
    return load_arm(arm, [f"--{key}={value}" for key, value in values.items()])


def run_cell(arm: Arm, model: Any, tokenizer: Any, base_margins: dict[str, torch.Tensor]) -> None:
    """Train and evaluate one cell; `base_margins` keeps the base model's test margins per task."""
    start = time.monotonic()
    folder = Path(str(arm.output.folder))
    train, test = load_splits(arm.data)
    if arm.data.name not in base_margins:
        base_margins[arm.data.name] = pair_margins(model, tokenizer, test, [1.0])[1.0]
    trainer = make_trainer(arm, copy.deepcopy(model), tokenizer, train, folder)
    seconds = fit(trainer, folder)
    trained = trainer.model.eval()
    strength = 1.0
    if trainer.args.max_steps == 0:  # nothing was trained, so the strength is chosen, on training pairs
        seen = pair_margins(trained, tokenizer, train.select(range(min(8, len(train)))), [1.0, 2.0, 4.0, 8.0])
        strength = max(seen, key=lambda s: (float((seen[s] > 0).float().mean()), -s))
    trained.save_pretrained(folder / "adapter")
    write_checksums(folder / "adapter")
    margins = pair_margins(trained, tokenizer, test, [strength])[strength]
    before = base_margins[arm.data.name]
    cell = {
        "task": Path(arm.data.name).name,
        "arm": arm.name,
        "examples": arm.data.train,
        "seed": arm.data.seed,
        "strength": strength,
        "base_accuracy": float((before > 0).float().mean()),
        "accuracy": float((margins > 0).float().mean()),
        "margin_gain": float((margins - before).mean()),
        "moved_wrong": float((margins < before).float().mean()),
        "parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "train_seconds": seconds,
        "seconds": time.monotonic() - start,
    }
    write_result(folder / "cell.json", cell)


def summarise(folder: Path) -> str:
    """The table of a comparison, from its cells: mean and standard deviation over the seeds that are there."""
    again = "Delete it, and it is run again."
    cells = pd.DataFrame([read_result(file, again) for file in sorted(folder.rglob("cell.json"))])
    lines = [
        "| task | examples | arm | parameters | seeds | base accuracy | accuracy (sd) | margin gain, nats "
        "| moved wrong |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: Any = cells.groupby(["task", "examples", "arm"], sort=True)
    for (task, examples, arm), rows in groups:
        spread = f" ({rows.accuracy.std():.3f})" if len(rows) > 1 else ""
        lines.append(
            f"| {task} | {examples} | {arm} | {rows.parameters.iloc[0]:,} | {len(rows)} | "
            f"{rows.base_accuracy.mean():.3f} | {rows.accuracy.mean():.3f}{spread} | "
            f"{rows.margin_gain.mean():+.2f} | {rows.moved_wrong.mean():.0%} |"
        )
    if differences := _beft_differences(folder):
        lines += [
            "",
            f"`bias_dpo` against `beft_dpo` (stock PEFT, same site): over {len(differences)} cells the two trained "
            f"vectors differ by at most {max(differences):.1e} of their largest entry.",
        ]
    return "\n".join(lines) + "\n"


def _beft_differences(folder: Path) -> list[float]:
    differences = []
    for ours in sorted(folder.rglob("bias_dpo/adapter/adapter_model.safetensors")):
        theirs = ours.parents[2] / "beft_dpo" / "adapter" / "adapter_model.safetensors"
        if theirs.is_file():
            for file in (ours, theirs):
                check_checksums(file.parent)
            [v], [b] = (list(read_tensors(file).values()) for file in (ours, theirs))
            differences.append(float((v - b.flatten()).abs().max() / v.abs().max()))
    return differences


if __name__ == "__main__":
    sys.exit(main())
