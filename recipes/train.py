"""Train one arm and see what it did.

    accelerate launch recipes/train.py
    accelerate launch -m steertune.recipes.train vector_dpo --data.name my_pairs.jsonl --adapter.layers 12

Every key of the arm can be set as `--table.key value`: `--data.name` (an embedded task, a file or folder of pairs, a
Hub name), `--model.name`, `--adapter.layers`, `--loss.name`, `--trainer.max_steps`, `--output.folder`, ...
Ends with a page: preference on held-out pairs before, after and at other strengths, side effects, generations, cost.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

from steertune.adapters.card import write_card
from steertune.recipes.lab.arm import Arm, ArmError, load_arm, parse_arm
from steertune.recipes.lab.augmentation import grown
from steertune.recipes.lab.cards import of_training
from steertune.recipes.lab.data import load_model, load_splits
from steertune.recipes.lab.measures import (
    batches,
    generate,
    neutral_logps,
    pair_margins,
    peak_memory_gb,
    side_effects,
)
from steertune.recipes.lab.page import strength_plot, write_page
from steertune.recipes.lab.processes import begin, command
from steertune.recipes.lab.training import claim, fit, make_trainer, write_whole
from steertune.trainers import ModelAt, scalable, scaled

DEFAULT_ARM = "vector_dpo"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print result.json in the end, all else to standard error")
    known, overrides = parse_arm(parser, argv, DEFAULT_ARM)
    arm = load_arm(known.arm, overrides)
    if not known.json:
        run(arm)
        return 0
    with redirect_stdout(sys.stderr):
        result = run(arm)
    if PartialState().is_main_process:
        print(json.dumps(result))
    return 0


def run(arm: Arm) -> dict[str, Any]:
    """Train and evaluate an arm in its output folder; return what `result.json` holds.

    A run that was interrupted goes on at its last checkpoint; a folder with another arm or a finished run is refused.

    Raises:
        ArmError: the folder holds something else, or the arm is a prompt.
    """
    if arm.prompt:
        raise ArmError(f"Arm {arm.name!r} is a prompt: there is nothing to train. Compare it with others in a grid.")
    started = time.monotonic()
    begin(arm.model.threads)
    state = PartialState()
    folder = Path(arm.output.folder or f"runs/{arm.name}-{arm.data.name.strip('./').replace('/', '-')}")
    claim(folder, arm, state.is_main_process)
    set_seed(arm.data.seed)
    train, test = load_splits(arm.data)
    model, tokenizer = load_model(arm.model)
    say = print if state.is_main_process else (lambda *_: None)
    asked = arm.augmenter()
    if asked is not None:
        more = grown(train, *asked, seed=arm.data.seed, model=model, tokenizer=tokenizer, apart=[test])
        train = more.rows
        say(more.note)
    say(_plan(arm, model, tokenizer, train, test, state.num_processes))

    before = _look(arm, model, tokenizer, test, [1.0])
    trainer = make_trainer(arm, model, tokenizer, train, folder)
    seconds = fit(trainer, folder)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    trainer.save_model(str(folder / "adapter"))  # every process: sharded weights are gathered, the first one writes
    others = [s for s in arm.evaluation.strengths if s not in (0.0, 1.0)] if scalable(model) else []
    after = _look(arm, model, tokenizer, test, [1.0, *others])
    result = _result(arm, train, test, before, after)
    result["cost"] = {
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "steps": trainer.state.global_step,
        "train_seconds": seconds,
        "total_seconds": time.monotonic() - started,
        "peak_memory_gb": peak_memory_gb(),
        "processes": state.num_processes,
    }
    result["use"] = _use(arm, folder)
    if state.is_main_process:
        if result["strengths"]:
            strength_plot(result["strengths"], folder / "strengths.png")
        page = write_page(folder, result)
        if (folder / "adapter" / "adapter_config.json").is_file():
            write_card(folder / "adapter", of_training(arm, result))
        write_whole(folder / "result.json", json.dumps(result, indent=2))  # last: it says that the run is finished
        say(f"\n{page.read_text(encoding='utf-8')}\nThis page: {page}")
    return result


@dataclass(frozen=True)
class Look:
    """A model seen at some strengths: pair margins, answers to the first test prompts, and neutral text at 1."""

    margins: dict[float, torch.Tensor]
    answers: dict[float, list[str]]
    neutral: list[tuple[torch.Tensor, torch.Tensor]]


def _look(arm: Arm, model: Any, tokenizer: Any, test: Dataset, strengths: list[float]) -> Look:
    prompts = _prompts(arm, test)
    answers = {}
    for strength in [s for s in strengths if s in (1.0, -1.0)] if prompts else []:
        with scaled(model, strength):
            answers[strength] = generate(model, tokenizer, prompts, arm.evaluation.new_tokens)
    margins = {}
    if "chosen" in test.column_names:
        margins = pair_margins(model, tokenizer, test, strengths, arm.evaluation.batch_size)
    return Look(margins, answers, neutral_logps(model, tokenizer))


def _prompts(arm: Arm, test: Dataset) -> list[Any]:
    return test["prompt"][: arm.evaluation.generations] if "prompt" in test.column_names else []


def _result(arm: Arm, train: Dataset, test: Dataset, before: Look, after: Look) -> dict[str, Any]:
    margins = {**({0.0: before.margins[1.0]} if before.margins else {}), **after.margins}
    answers = {"base": before.answers.get(1.0, [])}
    answers |= {f"strength {s:g}": texts for s, texts in after.answers.items()}
    prompts = [p if isinstance(p, str) else p[-1]["content"] for p in _prompts(arm, test)]
    return {
        "name": arm.name,
        "what": f"{arm.adapter}, loss {arm.loss}, {len(train)} examples of {arm.data.name}, base {arm.model.name}.",
        "test_examples": len(test),
        "strengths": [_row(s, margins[s], margins[0.0]) for s in sorted(margins)],
        "side_effects": side_effects(after.neutral, before.neutral),
        "generations": [{"prompt": p, **{k: v[i] for k, v in answers.items()}} for i, p in enumerate(prompts)],
    }


def _plan(arm: Arm, model: Any, tokenizer: Any, train: Dataset, test: Dataset, processes: int) -> str:
    """What will be done, and how long it will take, from one timed forward pass."""
    pairs = max(1, arm.evaluation.batch_size // 2)
    [batch] = batches(tokenizer, test.select(range(min(pairs, len(test)))), pairs)
    with torch.no_grad():
        ModelAt(model, model, batch)(1.0)  # the first pass warms up
        start = time.monotonic()
        ModelAt(model, model, batch)(1.0)
    row = (time.monotonic() - start) / len(batch.labels)
    steps = arm.trainer.get("max_steps", 0)
    rows = 2 * arm.trainer.get("per_device_train_batch_size", 8) * arm.trainer.get("gradient_accumulation_steps", 1)
    # forward, reference forward and a backward of about the same price; evaluation: every strength, and generations
    training = steps * rows * row * 3
    evaluation = (2 * len(test) * (1 + len(arm.evaluation.strengths)) + 40 * arm.evaluation.generations) * row
    return (
        f"Arm {arm.name}: adapter {arm.adapter}, loss {arm.loss}\n"
        f"  {len(train)} training examples and {len(test)} test pairs of {arm.data.name}, base {arm.model.name}, "
        f"{processes} process(es)\n"
        f"  about {(training + evaluation) / 60:.1f} minutes: training {training:.0f} s ({steps} steps), "
        f"evaluation {evaluation:.0f} s"
    )


def _row(strength: float, margins: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    return {
        "strength": strength,
        "pair_accuracy": float((margins > 0).float().mean()),
        "margin": float(margins.mean()),
        "moved_wrong": float((margins < base).float().mean()),
    }


def _use(arm: Arm, folder: Path) -> list[str]:
    if arm.adapter.get("type") == "none":
        return [
            "from transformers import AutoModelForCausalLM",
            f'model = AutoModelForCausalLM.from_pretrained("{folder}/adapter")',
        ]
    embedded = arm.model.name == "embedded"
    lines = ["import steertune.adapters  # makes the method known to PEFT", "from peft import PeftModel"]
    lines += [
        "from steertune.recipes.lab.embedded import load_model"
        if embedded
        else "from transformers import AutoModelForCausalLM",
        "",
    ]
    base = "load_model()" if embedded else f'AutoModelForCausalLM.from_pretrained("{arm.model.name}")'
    return [*lines, f'model = PeftModel.from_pretrained({base}, "{folder}/adapter")']


if __name__ == "__main__":
    sys.exit(main())
