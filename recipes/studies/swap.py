"""TRL's examples with one import changed: do they learn, and how long does the whole run take?

    python -m steertune.recipes.studies.swap --folder docs/results/swap
    python -m steertune.recipes.studies.swap --all-ways --pairs pairs.jsonl --rows 64 --batch 4 8 --epochs 1 3

Each case is a script as TRL documents it: a model, some pairs, the class's default arguments. It runs once with our
trainer in place of TRL's, and once with TRL's own trainer and a LoRA on all linear layers. `--all-ways` adds our
trainer with our own loss, and the same LoRA in the upper third of the layers under both trainers. Each run has its own
process. Its CPU seconds count twice: from the import, and from the construction of the trainer (tokenisation,
training and what the first epoch computes once), both to the saved adapter. Accuracy is the share of held-out pairs
whose chosen answer is more likely than the rejected one. `--launch` names set-ups of two processes (`cpu_ddp`,
`cpu_zero3`) under which our trainer also runs, to compare what it learns. Writes `table.md` and `runs.json`, and skips
runs that `runs.json` already holds.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd

from steertune.recipes.lab.command_line import Choice, Count, Option, Result, command, whole_number
from steertune.recipes.lab.resumable import Job, Key, records_of

TASK = "cautious_advice"
TEST = 40
CASES = ("DPO", "SFT", "Trainer")
ALL: list[str] = list(CASES)
NONE: list[str] = []
EIGHT, THREE = [8], [3]
STOCK = "TRL + LoRA r8"
OURS = "one import changed"
OWN_LOSS = "one import changed, own loss"
STOCK_UPPER = "TRL + LoRA r8, upper third"
UPPER = "one import changed + LoRA r8, upper third"
WAYS = (STOCK, OURS, OWN_LOSS, STOCK_UPPER, UPPER)
BASELINE = {OURS: STOCK, OWN_LOSS: STOCK, UPPER: STOCK_UPPER}
LOSSES = {"DPO": "dpo", "SFT": "cross_entropy", "Trainer": "cross_entropy"}


@dataclass(frozen=True)
class Example:
    """The settings of one whole run.

    Attributes:
        case: One of `CASES`.
        way: One of `WAYS`.
        launch: Name of the set-up of processes; "" for a single process.
        precision: Precision of the forward passes, bf16 or fp32.
        pairs: File of pairs, in records only its name; "" for the embedded task.
        rows: Number of pairs, drawn with seed 0.
        batch: Rows per step.
        epochs: Passes over the rows.
    """

    case: str
    way: str
    launch: str
    precision: str
    pairs: str
    rows: int
    batch: int
    epochs: int

    @property
    def setting(self) -> tuple[Any, ...]:
        """All but the way and the processes: runs of one setting are compared."""
        return self.case, self.precision, Path(self.pairs).name, self.rows, self.batch, self.epochs


@dataclass(frozen=True)
class Run:
    """A whole run's results.

    Attributes:
        example: What was run.
        seconds: CPU seconds of the first process, from the import to the saved adapter.
        training_seconds: The same from the construction of the trainer.
        accuracy: Accuracy on held-out pairs, after training.
        loss: Loss of the chosen held-out answers, in nats per token, after training.
        base_accuracy: The accuracy before training.
        base_loss: The loss before training.
    """

    example: Example
    seconds: float
    training_seconds: float
    accuracy: float
    loss: float
    base_accuracy: float
    base_loss: float

    @classmethod
    def read(cls, record: dict[str, Any]) -> Run:
        """A run from its line in `runs.json`."""
        example = Example(**{name: record[name] for name in _KEYS})
        return cls(example, **{name: value for name, value in record.items() if name not in _KEYS})

    def record(self) -> dict[str, Any]:
        """A line of `runs.json`."""
        results = asdict(self)
        return {**results.pop("example"), **results}


_KEYS = [field.name for field in fields(Example)]


@command
def main(
    cases: Annotated[list[str], Choice(CASES, "examples to run", metavar="NAME ...")] = ALL,
    launch: Annotated[
        list[str], Option(help="set-ups in recipes/configs/accelerate/ to run as well", metavar="NAME ...")
    ] = NONE,
    all_ways: Annotated[bool, Option("--all-ways", help="also our own losses, and a LoRA in the upper third")] = False,
    fp32: Annotated[bool, Option("--fp32", help="run in fp32 instead of bf16, TRL's default")] = False,
    pairs: Annotated[str, Option(help=f"a file of pairs; without one, the embedded task {TASK}")] = "",
    rows: Annotated[int, Count("pairs to train on, drawn with seed 0")] = 32,
    batch: Annotated[list[int], Option(parser=whole_number, metavar="N ...", help="rows per step")] = EIGHT,
    epochs: Annotated[list[int], Option(parser=whole_number, metavar="N ...", help="passes over the rows")] = THREE,
    threads: Annotated[int, Count("CPU threads of every run")] = 1,
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/swap"),
    run: Annotated[tuple[str, str] | None, Option(hidden=True, help="run one example here")] = None,
) -> Result | None:
    """Run the examples that are missing, and write the table."""
    if run is not None:
        run_example(Example(**json.loads(run[0])), Path(run[1]))
        return None

    ways = WAYS if all_ways else (STOCK, OURS)
    examples = [
        Example(case, way, of, "fp32" if fp32 else "bf16", pairs, rows, size, passes)
        for passes, size, case in itertools.product(epochs, batch, cases)
        for of, way in [*(("", way) for way in ways), *((of, OURS) for of in launch)]
    ]

    def job(example: Example) -> Job:
        # a record names the file of pairs, not where it lies on this machine
        named = replace(example, pairs=Path(pairs).name)
        title = ", ".join(filter(None, (example.case, example.way, example.launch)))

        def measured(_: Sequence[Key]) -> list[dict[str, Any]]:
            return [replace(measure(example, folder, threads), example=named).record()]

        return Job(title, [astuple(named)], measured)

    records = records_of([job(example) for example in examples], folder / "runs.json", _KEYS, "Runs")
    runs = [Run.read(record) for record in records]
    (folder / "table.md").write_text(table(runs), encoding="utf-8")
    return Result([run.record() for run in runs], table(runs))


def run_example(example: Example, folder: Path) -> None:
    """The example itself, with TRL's defaults except for what a machine without a GPU needs.

    Its imports belong to the run and are timed, so they are inside the function.
    """
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainingArguments
    from trl import DPOConfig, SFTConfig

    ours = example.way in BASELINE
    if ours:
        from steertune.trainers import SteeringDPOTrainer as DPOTrainer
        from steertune.trainers import SteeringSFTTrainer as SFTTrainer
        from steertune.trainers import SteeringTrainer as Trainer
    else:
        from trl import DPOTrainer, SFTTrainer

        Trainer = SFTTrainer  # transformers' own Trainer does not tokenise
    from steertune.recipes.lab import embedded

    model: Any = embedded.load_model()
    depth = model.config.num_hidden_layers
    options: dict[str, Any] = {"loss": LOSSES[example.case]} if example.way == OWN_LOSS else {}
    if example.way not in (OURS, OWN_LOSS):
        upper = list(range(depth - depth // 3, depth)) if example.way in (UPPER, STOCK_UPPER) else None
        # PEFT accepts layers only together with a list of modules
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        options["peft_config"] = LoraConfig(r=8, target_modules=modules, layers_to_transform=upper)
    file = example.pairs or str(embedded.TASKS / TASK / "train.jsonl")
    pairs = load_dataset("json", data_files=file, split="train")
    pairs = pairs.shuffle(seed=0) if example.pairs else pairs
    pairs = pairs.select(range(example.rows))
    answers = pairs.rename_column("chosen", "completion").remove_columns("rejected")
    trainer_class, config_class, rows = {
        "DPO": (DPOTrainer, DPOConfig, pairs),
        "SFT": (SFTTrainer, SFTConfig, answers),
        "Trainer": (Trainer, TrainingArguments if ours else SFTConfig, answers),
    }[example.case]
    args = config_class(
        str(folder / "run"), bf16=example.precision == "bf16", report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), per_device_train_batch_size=example.batch,
        num_train_epochs=example.epochs,
    )  # fmt: skip
    tokenizer = embedded.load_tokenizer()
    ready = time.process_time()
    trainer = trainer_class(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **options)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    if trainer.is_world_process_zero():
        end = time.process_time()
        (folder / "seconds.json").write_text(json.dumps([end, end - ready]))


def measure(example: Example, folder: Path, threads: int = 1) -> Run:
    """Run an example in its own process, and evaluate what it saved on held-out rows."""
    name = "-".join(str(part).replace(" ", "_") for part in (*example.setting, example.way, example.launch) if part)
    home = folder.absolute() / "runs" / name
    home.mkdir(parents=True, exist_ok=True)
    script = [str(Path(__file__)), "--run", json.dumps(asdict(example)), str(home)]
    command = [sys.executable, *script]
    if example.launch:
        config = Path(__file__).parents[1] / "configs" / "accelerate" / f"{example.launch}.yaml"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *script]
    with (home / "log.txt").open("w") as log:
        subprocess.run(
            command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )
    seconds, training_seconds = json.loads((home / "seconds.json").read_text())
    accuracy, loss = evaluate(home / "adapter", example)
    base_accuracy, base_loss = evaluate(None, example)
    return Run(example, seconds, training_seconds, accuracy, loss, base_accuracy, base_loss)


def evaluate(adapter: Path | None, example: Example) -> tuple[float, float]:
    """Accuracy on held-out pairs, and the loss per token of their chosen answers.

    Args:
        adapter: Folder of the adapter; None for the base model.
        example: What was run. In a file of pairs, the rows after the training rows are held out.
    """
    from datasets import disable_progress_bars, load_dataset
    from peft import PeftModel

    from steertune.recipes.lab import embedded
    from steertune.recipes.lab.evaluate import evaluate
    from steertune.recipes.lab.measures import Seen
    from steertune.recipes.lab.observe import HeldOut, neutral_rows

    disable_progress_bars()
    pairs = load_dataset("json", data_files=example.pairs or str(embedded.TASKS / TASK / "test.jsonl"), split="train")
    pairs = pairs.shuffle(seed=0).select(range(example.rows, example.rows + TEST)) if example.pairs else pairs
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

    by_way = {(run.example.setting, run.example.way): run for run in runs if not run.example.launch}

    def ratio(run: Run, seconds: str) -> str:
        baseline = by_way.get((run.example.setting, BASELINE.get(run.example.way, "")))
        if run.example.launch or baseline is None:
            return ""
        return f"{getattr(baseline, seconds) / getattr(run, seconds):.1f}"

    def row(run: Run) -> dict[str, str]:
        example = run.example
        return {
            "case": example.case,
            "way": f"{example.way}, {example.launch}" if example.launch else example.way,
            "precision": example.precision,
            "batch": str(example.batch),
            "epochs": str(example.epochs),
            "accuracy": f"{run.base_accuracy:.3f} to {run.accuracy:.3f}",
            "loss of chosen answers": f"{run.base_loss:.3f} to {run.loss:.3f}",
            "CPU seconds": "" if example.launch else f"{run.seconds:.0f}",
            "times faster": ratio(run, "seconds"),
            "of these, from construction": "" if example.launch else f"{run.training_seconds:.1f}",
            "times faster ": ratio(run, "training_seconds"),
        }

    blocks = []
    for pairs, rows in sorted({(run.example.pairs, run.example.rows) for run in runs}):
        same_rows = [run for run in runs if (run.example.pairs, run.example.rows) == (pairs, rows)]
        block = [row(run) for run in sorted(same_rows, key=_order)]
        blocks += [
            f"{rows} rows of {Path(pairs).name or TASK}, drawn with seed 0:" if pairs else f"{rows} rows of {TASK}:",
            "",
            pd.DataFrame(block).to_markdown(index=False, disable_numparse=True),
            "",
        ]
    return "\n".join(
        [
            "# One import changed",
            "",
            "SmolLM2-135M-Instruct, TRL's default arguments but for what the table names, one thread, CPU seconds "
            "from the import to the saved adapter, and from the construction of the trainer (with tokenisation, and "
            f"all that the first epoch computes once); {TEST} held-out pairs. TRL's row of `Trainer` is its "
            "SFTTrainer. TRL's default rates are those of full finetuning, so its LoRA hardly moves. Two processes "
            "take half as many steps.",
            "",
            *blocks,
            "The machine was not idle, so the ratios are rough. "
            "On a GPU, TRL's own runs gain: with Triton, it computes the logits of labelled tokens only.",
            "",
            "Made by `python -m steertune.recipes.studies.swap` (for rows of a file with --pairs, --rows, --batch "
            f"and --epochs as the table says) with {versions()}.",
            "",
        ]
    )


def _order(run: Run) -> tuple[Any, ...]:
    example = run.example
    case = CASES.index(example.case)
    return example.precision, example.epochs, example.batch, case, example.launch, WAYS.index(example.way)


if __name__ == "__main__":
    sys.exit(main())
