"""How noisy the gradient is under each contrast: variance reduction is the claimed reason why pairs help.

    python -m steertune.recipes.studies.gradients cautious_advice --folder runs/gradients

Before training, the gradient of the arm's loss is computed on every batch of the same pairs, with

- `none`: the chosen answers only;
- `unpaired`, `shuffled`: the rejected answers of other prompts, within the batch or in the data;
- `in the prompt`: both answers of other pairs in the prompt (the divergence from the base behind a contrast prompt);
- `difference`: cross-entropy of the chosen answers less that of the rejected ones;
- `pairs`: the rejected answers as they are;
- `unmatched`: the chosen answers of one batch and the rejected ones of the next, each behind its own prompt. Its mean
  is that of `pairs`, so what `pairs` is less noisy is what matching the prompts is good for.

With batch gradients `g` and their mean `ḡ`

    noise / signal = mean |g - ḡ|² / (|ḡ|² - mean |g - ḡ|² / batches)

which does not depend on the loss's scale: a step on one batch goes the mean's way where it is below 1. The denominator
is the unbiased square of the true gradient; where it is not positive the gradient cannot be told from nothing.

A steady gradient may be steady for reasons that have nothing to do with the behaviour. So the same is measured along
the behaviour: with u the direction of the mean gradient of held-out pairs, of the numbers `g·u` alone; and the cosine
of `g` with u, which is the share of a step on one batch that raises the held-out preference, to first order.

Errors are standard errors over batches, by leaving each out in turn (jackknife); u is taken as given.

(From a vector of zeros DPO's gradient is linear in the answers: `unpaired` then has the gradients of `pairs`, and
`pairs` less `none` is the rejected answers' part. Where that is not so there is no row `unmatched`.)
"""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from steertune.recipes.lab.arm import Arm, load_arm
from steertune.recipes.lab.command_line import Argument, Count, Option, Result, Threads, command
from steertune.recipes.lab.data import load_model, load_splits
from steertune.recipes.lab.files import ArmError, write_whole
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
    task: Annotated[str, Argument(help="an embedded task, a path or a Hub name, as data.name")],
    arm: Annotated[str, Option(help="a file, or a name in recipes/configs/arms/")] = "vector_dpo",
    model: Annotated[str, Option(help="embedded, a local folder or a Hub name")] = "embedded",
    pairs: Annotated[int, Count("training pairs")] = 64,
    held_out: Annotated[int, Count("test pairs that give the behaviour's direction")] = 64,
    batch: Annotated[int, Count("pairs in a batch")] = 4,
    threads: Threads = None,
    folder: Annotated[Path, Option(help="where the table is written")] = Path("runs/gradients"),
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
    """Noise and signal of every contrast.

    Raises:
        ArmError: fewer than two batches, a batch of one pair, which has no other prompt, no batch of held-out pairs,
            or an arm with an ingredient that makes examples or changes gradients.
    """
    if study.batch < 2 or study.pairs < 2 * study.batch:
        raise ArmError(f"--pairs {study.pairs} --batch {study.batch}: two batches or more, of two pairs or more.")
    if study.held_out < study.batch:
        raise ArmError(f"--held-out {study.held_out}: one batch of {study.batch} or more.")
    arms = {name: _arm(study, changes) for name, changes in CONTRASTS.items()}
    model, tokenizer = load_model(arms["pairs"].model)
    asked = {name: (arm, 0, study.pairs) for name, arm in arms.items()}
    asked["held out"] = (arms["pairs"], 1, study.held_out)
    prefix, seen = FrozenPrefix(), {}
    for name, (arm, split, pairs) in track([*asked.items()], "contrast"):
        with tempfile.TemporaryDirectory() as folder:
            settings = {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": study.batch}
            rows = load_splits(arm.data)[split]
            training = training_of(arm, copy.deepcopy(model), tokenizer, rows, Path(folder))
            trainer = make_trainer(training, prefix, **settings)
            trainer.initialise_vectors()
            trainer.pay_once.start(trainer, training=True)
            seen[name] = _gradients(trainer, pairs // study.batch)
    behaviour = seen.pop("held out").mean(dim=0)
    seen = unmatched(seen["none"], seen["unpaired"], seen["pairs"]) | seen
    return [
        {"contrast": name, **noise(gradients, behaviour), "errors": errors(gradients, behaviour)}
        for name, gradients in seen.items()
    ]


def unmatched(none: Tensor, unpaired: Tensor, pairs: Tensor) -> dict[str, Tensor]:
    """The chosen answers' part of every batch, with the rejected answers' part of the next one. Nothing where the
    gradient is no sum of the two, as the gradients of other pairs in the batch (`unpaired`) say."""
    if (unpaired - pairs).norm() > 1e-2 * pairs.norm():
        return {}
    return {"unmatched": none + (pairs - none).roll(-1, dims=0)}


def _arm(study: Study, changes: Sequence[str]) -> Arm:
    values = {"model.name": study.model, "data.name": study.task}
    values |= {"data.train": study.pairs, "data.test": study.held_out}
    overrides = [*(f"--{key}={value}" for key, value in values.items()), *changes]
    return load_arm(study.arm, overrides, recipe="gradients")


def _gradients(trainer: Any, batches: int) -> Tensor:
    """Gradient of every batch, `(batches, trained parameters)`."""
    model, found = trainer.model, []
    trained = [p for p in model.parameters() if p.requires_grad]
    loader = iter(trainer.get_train_dataloader())
    for _ in range(batches):
        loss = trainer.compute_loss(model, trainer._prepare_inputs(next(loader)))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).float().cpu())
    return torch.stack(found)


def noise(gradients: Tensor, behaviour: Tensor) -> dict[str, float]:
    """Signal and noise of batch gradients `(batches, parameters)`, and the same along a direction; see the module."""
    mean = gradients.mean(dim=0)
    variance = float((gradients - mean).square().sum() / (len(gradients) - 1))
    signal = float(mean.square().sum()) - variance / len(gradients)
    along = gradients @ (behaviour / behaviour.norm())
    progress = float(along.mean()) ** 2 - float(along.var()) / len(along)
    cosines = torch.nn.functional.cosine_similarity(gradients, behaviour[None], dim=1)
    return {
        "signal": signal,
        "noise": variance,
        "ratio": _over(variance, signal),
        "ratio_along": _over(float(along.var()), progress),
        "cosine": float(cosines.mean()),
        "cosine_of_mean": float(torch.nn.functional.cosine_similarity(mean, behaviour, dim=0)),
    }


def errors(gradients: Tensor, behaviour: Tensor) -> dict[str, float]:
    """Jackknife standard errors of `noise`: `sqrt((b - 1) / b sum (x_i - x̄)²)`, x_i without the i-th of b batches.

    Not a number with two batches, of which one has no variance, and where some have no signal.
    """
    batches = len(gradients)
    if batches < 3:
        return dict.fromkeys(noise(gradients, behaviour), math.nan)
    left = [noise(torch.cat([gradients[:i], gradients[i + 1 :]]), behaviour) for i in range(batches)]
    found = {name: torch.tensor([one[name] for one in left], dtype=torch.float64) for name in left[0]}
    return {name: float(((batches - 1) * x.var(correction=0)) ** 0.5) for name, x in found.items()}


def _over(noise: float, signal: float) -> float:
    return noise / signal if signal > 0 else float("inf")


def summarise(study: Study, found: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
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
    for row in found:
        numbers = (
            _shown(row[name], row["errors"][name]) for name in ("ratio", "ratio_along", "cosine", "cosine_of_mean")
        )
        lines.append(f"| {row['contrast']} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def _shown(value: float, error: float) -> str:
    if not math.isfinite(value):
        return "no signal"
    return f"{value:.2f} ± {error:.2f}" if math.isfinite(error) else f"{value:.2f} ± ?"


if __name__ == "__main__":
    sys.exit(main())
