"""TRL's examples with one import changed: do they learn, and how long does the whole run take?

    python -m steertune.recipes.studies.swap --folder docs/results/swap

Each case is a script as TRL documents it: a model, 32 rows, the class's default arguments, three epochs. It runs once
with our trainer in place of TRL's, and once with TRL's own trainer and a LoRA on all linear layers. Each run has its
own process, whose CPU seconds count from the import to the saved adapter. Accuracy is then the share of held-out pairs
whose chosen answer is more likely than the rejected one. `--launch` names set-ups of two processes (`cpu_ddp`,
`cpu_zero3`) under which our trainer also runs, to compare what it learns. Writes `table.md` and `runs.json`, and skips
runs that `runs.json` already holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd

from steertune.recipes.lab.command_line import Choice, Count, Option, Result, command
from steertune.recipes.lab.progress import progress

TASK = "cautious_advice"
TRAIN, TEST = 32, 40
CASES = ("DPO", "SFT", "Trainer")
ALL: list[str] = list(CASES)
NONE: list[str] = []
STOCK = "TRL + LoRA r8"
OURS = "one import changed"


@dataclass(frozen=True)
class Run:
    """One whole run and its results.

    Attributes:
        case: One of `CASES`.
        way: `OURS` or `STOCK`.
        launch: Name of the set-up of processes; "" for a single process.
        precision: Precision of the forward passes, bf16 or fp32.
        seconds: CPU seconds of the first process, from the import to the saved adapter.
        accuracy: On held-out pairs, after training.
        loss: Of the chosen held-out answers, in nats per token, after training.
        base_accuracy: The same before training.
        base_loss: The same before training.
    """

    case: str
    way: str
    launch: str
    precision: str
    seconds: float
    accuracy: float
    loss: float
    base_accuracy: float
    base_loss: float

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Identifies the run: case, way, launch, precision."""
        return self.case, self.way, self.launch, self.precision


@command
def main(
    cases: Annotated[list[str], Choice(CASES, "examples to run", metavar="NAME ...")] = ALL,
    launch: Annotated[
        list[str], Option(help="set-ups in recipes/configs/accelerate/ to run as well", metavar="NAME ...")
    ] = NONE,
    fp32: Annotated[bool, Option("--fp32", help="run in fp32 instead of bf16, TRL's default")] = False,
    threads: Annotated[int, Count("CPU threads of every run")] = 1,
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/swap"),
    run: Annotated[tuple[str, str, str, str] | None, Option(hidden=True, help="run one example here")] = None,
) -> Result | None:
    """Run the examples that are missing, and write the table."""
    if run is not None:
        case, way, precision, home = run
        run_example(case, way, precision, Path(home))
        return None

    # skip what an earlier call has finished
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.json"
    runs = [Run(**run) for run in json.loads(file.read_text())] if file.exists() else []
    finished = {run.key for run in runs}
    precision = "fp32" if fp32 else "bf16"
    keys = [(case, way, "", precision) for case in cases for way in (OURS, STOCK)]
    keys += [(case, OURS, each, precision) for each in launch for case in cases]
    with progress("Runs", len(keys)) as bar:
        for key in keys:
            if key in finished:
                bar.skip()
                continue
            with bar.step(", ".join(filter(None, key))):
                runs.append(measure(*key, folder, threads))
                file.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(runs), encoding="utf-8")
    return Result([asdict(run) for run in runs], table(runs))


def run_example(case: str, way: str, precision: str, folder: Path) -> None:
    """The example itself, with TRL's defaults except for what a machine without a GPU needs.

    Its imports belong to the run and are timed, so they stand inside the function.
    """
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainingArguments
    from trl import DPOConfig, SFTConfig

    if way == OURS:
        from steertune.trainers import SteeringDPOTrainer as DPOTrainer
        from steertune.trainers import SteeringSFTTrainer as SFTTrainer
        from steertune.trainers import SteeringTrainer as Trainer

        adapter: dict[str, Any] = {}
    else:
        from trl import DPOTrainer, SFTTrainer

        Trainer = SFTTrainer  # transformers' own Trainer does not tokenise
        adapter = {"peft_config": LoraConfig(r=8, target_modules="all-linear")}
    from steertune.recipes.lab import embedded

    file = str(embedded.TASKS / TASK / "train.jsonl")
    pairs = load_dataset("json", data_files=file, split="train").select(range(TRAIN))
    answers = pairs.rename_column("chosen", "completion").remove_columns("rejected")
    trainer_class, config_class, rows = {
        "DPO": (DPOTrainer, DPOConfig, pairs),
        "SFT": (SFTTrainer, SFTConfig, answers),
        "Trainer": (Trainer, TrainingArguments if way == OURS else SFTConfig, answers),
    }[case]
    args = config_class(
        str(folder / "run"), bf16=precision == "bf16", report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = trainer_class(
        model=embedded.load_model(), args=args, train_dataset=rows, processing_class=embedded.load_tokenizer(),
        **adapter,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    if trainer.is_world_process_zero():
        (folder / "seconds.json").write_text(json.dumps(time.process_time()))


def measure(case: str, way: str, launch: str, precision: str, folder: Path, threads: int = 1) -> Run:
    """Run an example in its own process, and evaluate what it saved on held-out rows."""
    name = "-".join(part for part in (case, "ours" if way == OURS else "stock", launch, precision) if part)
    home = folder.absolute() / "runs" / name
    home.mkdir(parents=True, exist_ok=True)
    script = [str(Path(__file__)), "--run", case, way, precision, str(home)]
    command = [sys.executable, *script]
    if launch:
        config = Path(__file__).parents[1] / "configs" / "accelerate" / f"{launch}.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *script]
    with (home / "log.txt").open("w") as log:
        subprocess.run(
            command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )
    seconds = json.loads((home / "seconds.json").read_text())
    return Run(case, way, launch, precision, seconds, *evaluate(home / "adapter"), *evaluate(None))


def evaluate(adapter: Path | None) -> tuple[float, float]:
    """Accuracy on held-out pairs, and the loss per token of their chosen answers.

    Args:
        adapter: Folder of the adapter; None for the base model.
    """
    from datasets import disable_progress_bars, load_dataset
    from peft import PeftModel

    from steertune.recipes.lab import embedded
    from steertune.recipes.lab.evaluate import evaluate
    from steertune.recipes.lab.measures import Seen
    from steertune.recipes.lab.observe import HeldOut, neutral_rows

    disable_progress_bars()
    pairs = load_dataset("json", data_files=str(embedded.TASKS / TASK / "test.jsonl"), split="train")
    model: Any = embedded.load_model()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    held_out = HeldOut(model, embedded.load_tokenizer(), pairs.select(range(TEST)), neutral_rows(), batch_size=16)
    seen = Seen(evaluate(model, held_out, ["accuracy"])["1"])
    loss = -float(seen["chosen_logp"].sum() / seen["chosen_tokens"].sum())
    return float(seen["accuracy"].mean()), loss


def table(runs: Sequence[Run]) -> str:
    """The table in Markdown: what each case learned, and how long it took compared with TRL and a LoRA."""
    from steertune.adapters.card import versions

    stock = {(run.case, run.precision): run.seconds for run in runs if run.way == STOCK}
    rows = [
        {
            "case": run.case,
            "way": f"{run.way}, {run.launch}" if run.launch else run.way,
            "precision": run.precision,
            "accuracy": f"{run.base_accuracy:.3f} to {run.accuracy:.3f}",
            "loss of chosen answers": f"{run.base_loss:.3f} to {run.loss:.3f}",
            "CPU seconds": "" if run.launch else f"{run.seconds:.0f}",
            "times faster": ""
            if run.launch or run.way == STOCK or (run.case, run.precision) not in stock
            else f"{stock[run.case, run.precision] / run.seconds:.1f}",
        }
        for run in sorted(runs, key=lambda run: (run.precision, CASES.index(run.case), run.launch, run.way))
    ]
    return "\n".join(
        [
            "# One import changed",
            "",
            f"SmolLM2-135M-Instruct, {TRAIN} rows of {TASK}, default arguments (3 epochs, 12 steps of 8), one thread, "
            f"timed from the import to the saved adapter; {TEST} held-out pairs. TRL's row of `Trainer` is its "
            "SFTTrainer. TRL's default rates are those of full finetuning, so its LoRA hardly moves. Two processes "
            "take half as many steps.",
            "",
            pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
            "",
            "The machine was not idle, so the ratios are rough. "
            "On a GPU, TRL's own runs gain: with Triton, it computes the logits of labelled tokens only.",
            "",
            f"Made by `python -m steertune.recipes.studies.swap` with {versions()}.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
