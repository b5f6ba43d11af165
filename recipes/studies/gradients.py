"""How noisy the gradient is under each kind of contrast: less variance is the reason usually given why pairs help.

    python -m steertune.recipes.studies.gradients cautious_advice --folder runs/gradients

Before any training, the gradient of the arm's loss is computed on every batch of the same pairs, with these contrasts:

- `none`: the chosen answers only;
- `unpaired`, `shuffled`: rejected answers of other prompts, in the batch or in the data;
- `in the prompt`: both answers of other pairs in the prompt (the divergence from the base with a contrast prompt);
- `difference`: cross-entropy of the chosen answers minus that of the rejected ones;
- `pairs`: the rejected answers as they are;
- `unmatched`: the chosen answers of one batch and the rejected answers of the next, each after its own prompt. Its
  mean equals that of `pairs`, so the difference in noise is what matching the prompts is worth.

With batch gradients `g` and their mean `ḡ`,

    noise / signal = mean |g - ḡ|² / (|ḡ|² - mean |g - ḡ|² / batches)

The ratio does not depend on the scale of the loss. Below 1, a step on one batch goes mostly in the mean's direction.
The denominator is the unbiased square of the true gradient; where it is not positive, no gradient is distinguishable
from zero.

A gradient can also be steady for reasons unrelated to the behaviour. So the same ratio is measured along the
behaviour, for the numbers `g·u`, where u is the direction of the mean gradient of held-out pairs. The cosine of `g`
with u is the share of a step on one batch that raises the held-out preference, to first order.

Errors are jackknife standard errors over batches; u is taken as given.

(From a vector of zeros, DPO's gradient is linear in the answers: `unpaired` then has the gradients of `pairs`, and
`pairs` minus `none` is the rejected answers' part. Where this does not hold, there is no row `unmatched`.)
"""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from steertune.recipes.lab.arm import Arm, load_arm
from steertune.recipes.lab.checks import check_start
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_data, load_model, model_has_template
from steertune.recipes.lab.files import ArmError, write_whole
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.options import Argument, Count, Option, Threads
from steertune.recipes.lab.pair_lint import warn_of
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress, track
from steertune.recipes.lab.training import make_trainer, training_of
from steertune.trainers import FrozenPrefix

CONTRASTS = {
    "none": ["--loss.contrast=none"],
    "unpaired": ["--loss.contrast=unpaired"],
    "shuffled": ["--data.pairing=shuffled"],
    "in the prompt": [
        "--loss={name='context_distillation'}",
        "--views.good={name='demonstrations', k=4, contrast=true}",
    ],
    "difference": ["--loss={name='cross_entropy', contrast='difference'}"],
    "pairs": [],
}
"""Contrast -> what it changes in the arm."""


@dataclass(frozen=True)
class Study:
    """What is measured: the options of the command."""

    task: str
    arm: str
    model: str
    pairs: int
    held_out: int
    batch: int


@command
def main(
    task: Annotated[str, Argument(help="an embedded task, a path or a Hub name, like data.name")],
    arm: Annotated[str, Option(help="a file, or a name in recipes/configs/arms/")] = "vector_dpo",
    model: Annotated[str, Option(help="embedded, a local folder or a Hub name")] = "embedded",
    pairs: Annotated[int, Count("training pairs")] = 64,
    held_out: Annotated[int, Count("test pairs that define the behaviour")] = 64,
    batch: Annotated[int, Count("pairs per batch")] = 4,
    threads: Threads = None,
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/gradients"),
) -> Result:
    """Measure every contrast, and write the table."""
    begin(threads, only_one=True)
    study = Study(task, arm, model, pairs, held_out, batch)
    with progress("Contrasts"):
        rows = measure(study)
    table = summarise(study, rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "gradients.json", json.dumps(rows, indent=1))
    write_whole(folder / "table.md", table)
    return Result(rows, table)


def measure(study: Study) -> list[dict[str, Any]]:
    """Noise and signal of every contrast, one row each.

    Raises:
        ArmError: fewer than two batches, batches of one pair (which contain no other prompt), less than a batch of
            held-out pairs, or an arm with an ingredient that makes examples or changes gradients.
    """
    if study.batch < 2 or study.pairs < 2 * study.batch:
        raise ArmError(
            f"--pairs {study.pairs} --batch {study.batch}: two batches or more are needed, of two pairs or more."
        )
    if study.held_out < study.batch:
        raise ArmError(f"--held-out {study.held_out}: at least one batch of {study.batch} pairs is needed.")
    arms = {name: _arm(study, changes) for name, changes in CONTRASTS.items()}
    chat = partial(model_has_template, arms["pairs"].model)
    data = {name: load_data(arm.data, chat) for name, arm in arms.items()}
    plain = data["pairs"]
    for option, rows, size in (("pairs", plain.train, study.pairs), ("held-out", plain.test, study.held_out)):
        if len(rows) < size:  # the rows of a single file were divided
            raise ArmError(f"--{option} {size}: there are {len(rows)}. {plain.note} Ask for fewer.")
    check_start(arms["pairs"], plain.train)
    warn_of(plain.all_rows(), plain.by, study.task)
    model, tokenizer = load_model(arms["pairs"].model)

    # gradients of every contrast on the training pairs, and of the held-out pairs
    trainings = {name: (arm, data[name].train, study.pairs) for name, arm in arms.items()}
    trainings["held out"] = (arms["pairs"], plain.test, study.held_out)
    prefix, gradients_of = FrozenPrefix(), {}
    for name, (arm, rows, pairs) in track([*trainings.items()], "contrast"):
        with tempfile.TemporaryDirectory() as folder:
            settings = {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": study.batch}
            examples = readable(rows, tokenizer)
            training = training_of(arm, copy.deepcopy(model), tokenizer, examples, Path(folder))
            trainer = make_trainer(training, prefix, **settings)
            trainer.initialise_vectors()
            trainer.pay_once.start(trainer, training=True)
            gradients_of[name] = _batch_gradients(trainer, pairs // study.batch)

    behaviour_D = gradients_of.pop("held out").mean(dim=0)
    gradients_of = unmatched(gradients_of["none"], gradients_of["unpaired"], gradients_of["pairs"]) | gradients_of
    return [
        {"contrast": name, **noise(g_BD, behaviour_D), "errors": errors(g_BD, behaviour_D)}
        for name, g_BD in gradients_of.items()
    ]


def _arm(study: Study, changes: Sequence[str]) -> Arm:
    values = {"model.name": study.model, "data.name": study.task}
    values |= {"data.train": study.pairs, "data.test": study.held_out}
    overrides = [*(f"--{key}={value}" for key, value in values.items()), *changes]
    return load_arm(study.arm, overrides, recipe="gradients")


def _batch_gradients(trainer: Any, batches: int) -> Tensor:
    """Gradient of every batch, `(batches, trained parameters)`."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    loader = iter(trainer.get_train_dataloader())
    rows = []
    for _ in range(batches):
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(next(loader)))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).float().cpu())
    return torch.stack(rows)


def unmatched(none_BD: Tensor, unpaired_BD: Tensor, pairs_BD: Tensor) -> dict[str, Tensor]:
    """The chosen answers' part of every batch plus the rejected answers' part of the next batch.

    Empty if the gradient is not the sum of these two parts, which shows in `unpaired` differing from `pairs`.
    """
    if (unpaired_BD - pairs_BD).norm() > 1e-2 * pairs_BD.norm():
        return {}
    return {"unmatched": none_BD + (pairs_BD - none_BD).roll(-1, dims=0)}


def noise(gradients_BD: Tensor, behaviour_D: Tensor) -> dict[str, float]:
    """Signal and noise of batch gradients, also along one direction; see the module for the formulas."""
    mean_D = gradients_BD.mean(dim=0)
    variance = float((gradients_BD - mean_D).square().sum() / (len(gradients_BD) - 1))
    signal = float(mean_D.square().sum()) - variance / len(gradients_BD)
    along_B = gradients_BD @ (behaviour_D / behaviour_D.norm())
    signal_along = float(along_B.mean()) ** 2 - float(along_B.var()) / len(along_B)
    return {
        "signal": signal,
        "noise": variance,
        "ratio": variance / signal if signal > 0 else math.inf,
        "ratio_along": float(along_B.var()) / signal_along if signal_along > 0 else math.inf,
        "cosine": float(cosine_similarity(gradients_BD, behaviour_D[None], dim=1).mean()),
        "cosine_of_mean": float(cosine_similarity(mean_D, behaviour_D, dim=0)),
    }


def errors(gradients_BD: Tensor, behaviour_D: Tensor) -> dict[str, float]:
    """Jackknife standard errors of `noise`: `sqrt((b - 1) / b sum (x_i - x̄)²)`, with x_i computed without the i-th of
    b batches.

    NaN with fewer than three batches, since a single batch has no variance, and where some x_i have no signal.
    """
    batches = len(gradients_BD)
    if batches < 3:
        return dict.fromkeys(noise(gradients_BD, behaviour_D), math.nan)
    without = [noise(torch.cat([gradients_BD[:i], gradients_BD[i + 1 :]]), behaviour_D) for i in range(batches)]
    values = {name: torch.tensor([row[name] for row in without], dtype=torch.float64) for name in without[0]}
    return {name: float(((batches - 1) * x.var(correction=0)) ** 0.5) for name, x in values.items()}


def summarise(study: Study, rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""

    def shown(row: dict[str, Any], name: str) -> str:
        value, error = row[name], row["errors"][name]
        if not math.isfinite(value):
            return "no signal"
        return f"{value:.2f} ± {error:.2f}" if math.isfinite(error) else f"{value:.2f} ± ?"

    lines = [
        f"# Noise of the gradient: {Path(study.task).name}, {study.arm}",
        "",
        f"{study.pairs} pairs in batches of {study.batch}, before training. The behaviour is the direction of the "
        f"gradient of {study.held_out} held-out pairs.",
        "",
        "| contrast | noise / signal | noise / signal along the behaviour | cosine of a batch with the behaviour "
        "| cosine of the mean with the behaviour |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (shown(row, name) for name in ("ratio", "ratio_along", "cosine", "cosine_of_mean"))
        lines.append(f"| {row['contrast']} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
