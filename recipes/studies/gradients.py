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

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steertune.recipes.lab.arm import Arm, ArmError, load_arm, refuse_augmentation
from steertune.recipes.lab.data import load_model, load_splits
from steertune.recipes.lab.processes import begin, command, positive
from steertune.recipes.lab.training import make_trainer, write_whole
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


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="gradients", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", help="an embedded task, a path or a Hub name, as data.name")
    parser.add_argument("--arm", default="vector_dpo", help="a file, or a name in recipes/configs/arms/")
    parser.add_argument("--model", default="embedded", help="embedded, a local folder or a Hub name")
    parser.add_argument("--pairs", type=positive, default=64)
    parser.add_argument("--held-out", type=positive, default=64, help="test pairs that give the behaviour's direction")
    parser.add_argument("--batch", type=positive, default=4, help="pairs in a batch")
    parser.add_argument("--threads", type=positive, help="CPU threads (all cores)")
    parser.add_argument("--folder", type=Path, default=Path("runs/gradients"))
    options = parser.parse_args(argv)
    begin(options.threads, only_one=True)
    found = measure(options)
    table = summarise(options, found)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_whole(options.folder / "gradients.json", json.dumps(found, indent=1))
    write_whole(options.folder / "table.md", table)
    print(table)
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Noise and signal of every contrast.

    Raises:
        ArmError: fewer than two batches, a batch of one pair, which has no other prompt, no batch of held-out pairs,
            or an arm with biases or a `[augmentation]`.
    """
    if options.batch < 2 or options.pairs < 2 * options.batch:
        raise ArmError(f"--pairs {options.pairs} --batch {options.batch}: two batches or more, of two pairs or more.")
    if options.held_out < options.batch:
        raise ArmError(f"--held-out {options.held_out}: one batch of {options.batch} or more.")
    arms = {name: _arm(options, changes) for name, changes in CONTRASTS.items()}
    if biases := list(arms["pairs"].biases):
        raise ArmError(
            f"Arm {options.arm!r} changes gradients with {biases}; what is measured here is the loss's own."
        )
    refuse_augmentation(arms["pairs"], "gradients")
    model, tokenizer = load_model(arms["pairs"].model)
    asked = {name: (arm, 0, options.pairs) for name, arm in arms.items()}
    asked["held out"] = (arms["pairs"], 1, options.held_out)
    prefix, seen = FrozenPrefix(), {}
    for name, (arm, split, pairs) in tqdm(asked.items(), desc="Contrasts", unit="contrast"):
        with tempfile.TemporaryDirectory() as folder:
            settings = {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": options.batch}
            rows = load_splits(arm.data)[split]
            trainer = make_trainer(arm, copy.deepcopy(model), tokenizer, rows, Path(folder), prefix, **settings)
            trainer.initialise_vectors()
            trainer.pay_once.start(trainer, training=True)
            seen[name] = _gradients(trainer, pairs // options.batch)
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


def _arm(options: argparse.Namespace, changes: Sequence[str]) -> Arm:
    values = {"model.name": options.model, "data.name": options.task}
    values |= {"data.train": options.pairs, "data.test": options.held_out}
    return load_arm(options.arm, [*(f"--{key}={value}" for key, value in values.items()), *changes])


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


def summarise(options: argparse.Namespace, found: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        f"# Noise of the gradient: {Path(options.task).name}, {options.arm}",
        "",
        f"{options.pairs} pairs in batches of {options.batch}, before training. The behaviour is the direction of the "
        f"gradient of {options.held_out} held-out pairs.",
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
