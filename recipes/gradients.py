"""How noisy the gradient is under each contrast: variance reduction is the claimed reason why pairs help.

    python -m steertune.recipes.gradients cautious_advice --folder runs/gradients

Before training, the gradient of the arm's loss is computed on every batch of the same pairs, with the rejected answers
as they are (`pairs`), those of other prompts (`shuffled` in the data, `unpaired` within the batch), none, or both
answers of other pairs in the prompt (`in the prompt`: the divergence from the base model behind a contrast prompt).
With batch gradients `g` and their mean `ḡ`

    noise / signal = mean |g - ḡ|² / (|ḡ|² - mean |g - ḡ|² / batches)

which does not depend on the loss's scale: a step on one batch goes the right way where it is below 1. The denominator
is the unbiased square of the true gradient; where it is not positive the gradient cannot be told from nothing. (From a
vector of zeros DPO's gradient is linear in the answers: `unpaired` then has the gradients of `pairs`.)
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from steertune.recipes.arm import Arm, ArmError, load_arm
from steertune.recipes.data import load_model, load_splits
from steertune.recipes.processes import begin
from steertune.recipes.training import make_trainer, write_whole

CONTRASTS = {
    "none": ["--loss.contrast=none"],
    "unpaired": ["--loss.contrast=unpaired"],
    "shuffled": ["--data.pairing=shuffled"],
    "in the prompt": [
        "--loss={name='context_distillation'}",
        "--views.good={name='demonstrations', k=4, contrast=true}",
    ],
    "pairs": [],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="gradients", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", help="an embedded task, a path or a Hub name, as data.name")
    parser.add_argument("--arm", default="bias_dpo", help="a file, or a name in recipes/arms/")
    parser.add_argument("--model", default="embedded", help="embedded, a local folder or a Hub name")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="pairs in a batch")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    parser.add_argument("--folder", type=Path, default=Path("runs/gradients"))
    options = parser.parse_args(argv)
    try:
        begin(options.threads, only_one=True)
        found = measure(options)
    except (ArmError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    table = summarise(options, found)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_whole(options.folder / "gradients.json", json.dumps(found, indent=1))
    write_whole(options.folder / "table.md", table)
    print(table)
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Noise and signal of every contrast.

    Raises:
        ArmError: fewer than two batches, a batch of one pair, which has no other prompt, or an arm with biases.
    """
    if options.batch < 2 or options.pairs < 2 * options.batch:
        raise ArmError(f"--pairs {options.pairs} --batch {options.batch}: two batches or more, of two pairs or more.")
    arms = {name: _arm(options, changes) for name, changes in CONTRASTS.items()}
    if biases := list(arms["pairs"].biases):
        raise ArmError(
            f"Arm {options.arm!r} changes gradients with {biases}; what is measured here is the loss's own."
        )
    model, tokenizer = load_model(arms["pairs"].model)
    found, directions = [], {}
    for name, arm in tqdm(arms.items(), desc="Contrasts", unit="contrast"):
        with tempfile.TemporaryDirectory() as folder:
            settings = {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": options.batch}
            rows = load_splits(arm.data)[0]
            trainer = make_trainer(arm, copy.deepcopy(model), tokenizer, rows, Path(folder), **settings)
            trainer.initialise_vectors()
            gradients = _gradients(trainer, options.pairs // options.batch)
        directions[name] = gradients.mean(dim=0)
        found.append({"contrast": name, **noise(gradients)})
    for row in found:
        row["cosine_with_pairs"] = float(
            torch.nn.functional.cosine_similarity(directions[row["contrast"]], directions["pairs"], dim=0)
        )
    return found


def _arm(options: argparse.Namespace, changes: Sequence[str]) -> Arm:
    values = {"model.name": options.model, "data.name": options.task, "data.train": options.pairs, "data.test": 1}
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


def noise(gradients: Tensor) -> dict[str, float]:
    """Signal and noise of batch gradients `(batches, parameters)`; see the module."""
    mean = gradients.mean(dim=0)
    variance = float((gradients - mean).square().sum() / (len(gradients) - 1))
    signal = float(mean.square().sum()) - variance / len(gradients)
    return {
        "signal": signal,
        "noise": variance,
        "ratio": variance / signal if signal > 0 else float("inf"),
        "cosine_of_a_batch": float(torch.nn.functional.cosine_similarity(gradients, mean[None], dim=1).mean()),
    }


def summarise(options: argparse.Namespace, found: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        f"# Noise of the gradient: {Path(options.task).name}, {options.arm}",
        "",
        f"{options.pairs} pairs in batches of {options.batch}, before training.",
        "",
        "| contrast | noise / signal | cosine of a batch with the mean | cosine of the mean with that of pairs |",
        "|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['contrast']} | {row['ratio']:.2f} | {row['cosine_of_a_batch']:.2f} "
            f"| {row['cosine_with_pairs']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
