"""Which learning rate suits a vector, on models whose residual streams differ by three orders of magnitude.

    python -m steertune.recipes.studies.learning_rates --folder docs/results/learning_rates

Trains one vector by SFT at every rate of a ladder, on 32 answers of an embedded task and otherwise with TRL's default
arguments, and compares the losses on held-out answers. That is a proper score, which gets worse when a vector goes too
far. (A loss on pairs keeps falling long after the text is destroyed.)

The models: SmolLM2-135M-Instruct; Gemma-3-270M, a base model that reads the same answers as plain text (if it is not
installed, the error names its packages); and a tiny random model whose answers were written by a planted vector, as it
is and with a residual stream 100 times as large. Writes `table.md` and `runs.json`, and skips runs that `runs.json`
already holds.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from steertune.adapters import SteeringVectorConfig, SteeringVectorLayer, steering_layers
from steertune.adapters.card import versions
from steertune.recipes.lab import embedded
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_splits
from steertune.recipes.lab.files import write_whole
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.options import Choice, Count, Option
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.resumable import Job, records_of
from steertune.recipes.lab.tables import DataTable
from steertune.recipes.lab.training import silent
from steertune.recipes.studies.planting.teachers import save_base
from steertune.trainers import FrozenPrefix, SteeringSFTTrainer

NAMES = ["SmolLM2-135M-Instruct", "Gemma-3-270M", "tiny", "tiny, stream x100"]
RATES = [1.25e-4 * 2**step for step in range(7)]
TASK = "cautious_advice"
TRAIN, TEST = 32, 40
PLANTED_SHARE = 0.2  # length of the tiny model's planted vector, as a share of the stream's size
SHARPER = 10.0  # factor on the tiny model's logits, which are otherwise too uniform for a vector to change
WORDS = 12  # length of a prompt, and of an answer, of the tiny model
NEAR = 0.1  # a rate suits a model if it misses at most this share of the best gain


@dataclass(frozen=True)
class Subject:
    """A model with training and test answers."""

    model: Any
    tokenizer: Any
    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        model: Name of the subject.
        size: Typical norm of the residual stream where the vector is written.
        rate: Learning rate in units of the stream.
        absolute: The same rate in absolute units: by how much a step of AdamW changes an entry.
        share: Length of the trained vector divided by `size`.
        loss: Loss on held-out answers, in nats per token.
        base_loss: The same loss before training.
    """

    model: str
    size: float
    rate: float
    absolute: float
    share: float
    loss: float
    base_loss: float


@command
def main(
    models: Annotated[list[str], Choice(NAMES, "models to train", metavar="NAME ...")] = NAMES,
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/learning_rates"),
    threads: Annotated[int, Count("CPU threads")] = 1,
) -> Result:
    """Train with the rates that are missing, and write the table."""
    begin(threads, only_one=True)

    @lru_cache(maxsize=1)
    def subject(name: str) -> tuple[Subject, FrozenPrefix]:
        """A model, and the cached prefix that all its rates share."""
        return SUBJECTS[name](), FrozenPrefix(warn=False)

    def job(name: str, rate: float) -> Job:
        return Job(f"{name} at {rate:g}", [(name, rate)], lambda _: [asdict(train(name, *subject(name), rate))])

    jobs = [job(name, rate) for name, rate in product(models, RATES)]
    runs = [Run(**run) for run in records_of(jobs, folder / "runs.json", ("model", "rate"), "Trainings")]
    write_whole(folder / "table.md", table(runs))
    return Result([asdict(run) for run in runs], table(runs))


def train(name: str, subject: Subject, prefix: FrozenPrefix, rate: float) -> Run:
    """Train a vector at one rate, otherwise with TRL's defaults, and evaluate it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SteeringSFTTrainer(
            model=copy.deepcopy(subject.model),
            args=SFTConfig(
                folder, learning_rate=rate, bf16=False, gradient_checkpointing=False, report_to="none",
                save_strategy="no", use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            ),
            train_dataset=subject.train,
            eval_dataset=subject.test,
            processing_class=subject.tokenizer,
            frozen_prefix=prefix,
        )  # fmt: skip
        before = silent(trainer).evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    [layer] = steering_layers(trainer.model)
    vector: Any = layer.steering_vector_v["default"]
    size = _size(layer)
    return Run(
        model=name,
        size=size,
        rate=rate,
        absolute=rate * vector.unit,
        share=float(vector.weight.detach().norm()) / size,
        loss=after,
        base_loss=before,
    )


def _size(layer: SteeringVectorLayer) -> float:
    return (layer.config["default"].stream_sizes or {})[str(layer.layer_index)]


def smollm2() -> Subject:
    """The embedded model on an embedded task."""
    train, test = (_answers(rows) for rows in load_splits(DataTable(name=TASK, train=TRAIN, test=TEST)))
    return Subject(embedded.load_model(), embedded.load_tokenizer(), train, test)


def _answers(pairs: Dataset) -> Dataset:
    return pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")


def gemma3() -> Subject:
    """A base model without a chat template, which reads the same answers as text."""
    splits, tokenizer = load_splits(DataTable(name=TASK, train=TRAIN, test=TEST)), embedded.load_tokenizer("gemma3")
    train, test = (readable(_answers(rows), tokenizer) for rows in splits)
    return Subject(embedded.load_model(model="gemma3"), tokenizer, train, test)


def tiny(factor: float = 1.0) -> Subject:
    """A random model of 32 dimensions whose residual stream is multiplied by `factor`, and the answers that it gives
    with a planted vector."""
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder))
        # the norms' epsilon is the only number in the model that depends on the size of the stream
        base: Any = AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=1e-12).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    # everything that writes into the stream writes `factor` times as much
    for name, module in base.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.weight.data.mul_(factor)
    base.get_output_embeddings().weight.data.mul_(SHARPER)

    # the teacher is the same model with a random vector
    teacher = get_peft_model(copy.deepcopy(base), SteeringVectorConfig())
    [layer] = steering_layers(teacher)
    direction = torch.nn.functional.normalize(torch.randn(layer.in_features, generator=_seeded()), dim=0)
    layer.initialise("default", direction * PLANTED_SHARE * _size(layer))

    # random prompts (R rows of T words), and what the teacher answers
    first = len(tokenizer.all_special_ids)
    prompts_RT = torch.randint(first, len(tokenizer), (TRAIN + 200, WORDS), generator=_seeded())
    torch.manual_seed(0)
    ids = teacher.eval().generate(
        input_ids=prompts_RT, attention_mask=torch.ones_like(prompts_RT), do_sample=True, min_new_tokens=WORDS,
        max_new_tokens=WORDS, suppress_tokens=[*tokenizer.all_special_ids],
    )  # fmt: skip
    texts = [(tokenizer.decode(row[:WORDS]) + " ", tokenizer.decode(row[WORDS:])) for row in ids]
    rows = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    return Subject(base, tokenizer, rows.select(range(TRAIN)), rows.select(range(TRAIN, len(rows))))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


SUBJECTS: dict[str, Callable[[], Subject]] = dict(
    zip(NAMES, (smollm2, gemma3, tiny, lambda: tiny(100.0)), strict=True)
)


def table(runs: Sequence[Run]) -> str:
    """The table in Markdown: losses by rate, and for every model the best rate and those that are nearly as good."""
    frame = pd.DataFrame([asdict(run) for run in runs])
    losses = frame.pivot(index="model", columns="rate", values="loss").reindex(frame["model"].unique())
    rows, suits_all = [], set(RATES)
    for name, of_model in frame.groupby("model", sort=False):
        best = of_model.loc[of_model["loss"].idxmin()]
        gain = of_model["base_loss"] - of_model["loss"]
        near = of_model.loc[gain >= (1 - NEAR) * gain.max(), "rate"]
        suits_all &= set(near)
        rows.append(
            {
                "model": name,
                "size of the stream": f"{best['size']:g}",
                "best rate": f"{best['rate']:g}",
                f"within {NEAR:.0%} of its gain": ", ".join(f"{rate:g}" for rate in near),
                "the best in absolute units": f"{best['absolute']:.3g}",
                "its vector, share of the stream": f"{best['share']:.0%}",
                "held-out loss": f"{best['base_loss']:.3f} to {best['loss']:.3f}",
            }
        )
    return "\n".join(
        [
            "# Learning rates in units of the residual stream",
            "",
            f"SFT with TRL's defaults ({TRAIN} answers, 12 steps of 8, linear schedule) of one vector at two thirds "
            f"of the depth; loss per token on {TEST} held-out answers (tiny models: 200).",
            "",
            pd.DataFrame(rows).to_markdown(index=False),
            "",
            f"Rates within {NEAR:.0%} of the best gain of every model: "
            f"{', '.join(f'{rate:g}' for rate in sorted(suits_all)) or 'none'}. Best rates differ by a factor of "
            f"{_spread(rows, 'best rate'):.0f}, in absolute units by one of "
            f"{_spread(rows, 'the best in absolute units'):.0f}.",
            "",
            "Held-out loss by rate:",
            "",
            losses.round(4).rename(columns=lambda rate: f"{rate:g}").to_markdown(),
            "",
            "Other losses, tasks and numbers of steps have other best rates. Losses on pairs keep falling at rates "
            "that destroy the text, so they cannot choose a rate.",
            "",
            f"Made by `python -m steertune.recipes.studies.learning_rates` with {versions()}.",
            "",
        ]
    )


def _spread(rows: Sequence[dict[str, str]], column: str) -> float:
    """Largest divided by smallest number of a column."""
    values = [float(row[column]) for row in rows]
    return max(values) / min(values)


if __name__ == "__main__":
    sys.exit(main())
