"""Distil a prompt into an adapter: what the model does behind it, it then does without (Askell et al. 2112.00861).

    python -m steertune.recipes.distill vector_distillation
    python -m steertune.recipes.distill lora_distillation --views.good.text "Answer like a pirate."
    python -m steertune.recipes.distill vector_contrast_distillation      # demonstrations, each with a bad answer

The prompt is the arm's view `good`: an instruction, demonstrations, a contrast prompt. The prompted model answers the
training prompts; at these answers the arm learns its distributions (loss `context_distillation`) or its states
(`prompted`). On test prompts, at what the prompted model says there,

    fidelity = 1 - KL(prompted ‖ distilled) / KL(prompted ‖ base)

is 1 where the adapter does what the prompt does, 0 where it does as much as nothing, and negative where it does harm.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from datasets import Dataset
from torch import Tensor
from transformers import set_seed

from steertune.losses import Outputs
from steertune.recipes.lab.arm import Arm, load_arm, parse_arm, refuse_augmentation
from steertune.recipes.lab.data import load_model, load_splits
from steertune.recipes.lab.files import ArmError, read_rows, write_rows, write_whole
from steertune.recipes.lab.measures import (
    batches,
    check_context,
    generate,
    neutral_logps,
    pair_margins,
    prompt_lengths,
    side_effects,
)
from steertune.recipes.lab.processes import begin, command
from steertune.recipes.lab.training import claim, fit, make_trainer
from steertune.trainers import ModelAt, View, share_weights, tokenise
from steertune.trainers.views import Views

DEFAULT_ARM = "vector_distillation"
_TEMPERATURE = 1.0
_SEEN, _TEST = 0, 1  # seeds of the answers to training and test prompts


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known, overrides = parse_arm(parser, argv, DEFAULT_ARM)
    run(load_arm(known.arm, overrides))
    return 0


def run(arm: Arm) -> dict[str, Any]:
    """Distil the arm's prompt and measure it, in the arm's output folder; return what `result.json` holds.

    Raises:
        ArmError: an arm without a prompt to distil, without an adapter or with a `[augmentation]`, data without
            prompts, a folder that holds something else.
        ViewError: demonstrations that are test rows, or fewer than asked for.
    """
    _check(arm)
    started = time.monotonic()
    begin(arm.model.threads)
    state = PartialState()
    folder = Path(arm.output.folder or f"runs/distill-{arm.name}-{arm.data.name.strip('./').replace('/', '-')}")
    claim(folder, arm, state.is_main_process)
    set_seed(arm.data.seed)
    train, test = load_splits(arm.data)
    if missing := [rows.column_names for rows in (train, test) if "prompt" not in rows.column_names]:
        raise ArmError(f"data.name={arm.data.name!r}: distillation answers prompts, the rows have {missing[0]}.")
    arm = _with_pool(arm, train)
    view = arm.view_objects()["good"].for_evaluation(train.to_list(), test.to_list())
    loaded: tuple[Any, Any] = load_model(arm.model)
    model, tokenizer = loaded
    model.to(state.device)
    if _are_pairs(test):
        check_context(model, tokenizer, _shown(view, test), 0, "[views.good] of test pairs")
    seen = answered(arm, model, tokenizer, view, train, _SEEN, folder / "answers.jsonl")
    held_out = answered(arm, model, tokenizer, view, test, _TEST, folder / "test_answers.jsonl")

    trainer = make_trainer(arm, share_weights(model), tokenizer, seen, folder)
    seconds = fit(trainer, folder)
    adapted = trainer.accelerator.unwrap_model(trainer.model).eval()
    result = {
        "name": arm.name,
        "arm": {"adapter": arm.adapter, "loss": arm.loss},
        "train_prompts": len(seen),
        "test_prompts": len(held_out),
        **fidelity(adapted, tokenizer, held_out, view, arm.evaluation.batch_size),
        **_preference(arm, adapted, tokenizer, view, test),
        "side_effects": side_effects(neutral_logps(adapted, tokenizer), neutral_logps(model, tokenizer)),
        "tokens": _tokens(tokenizer, view, test),
        "train_seconds": seconds,
    }
    result["generations"] = _generations(arm, model, adapted, tokenizer, view, test)
    result["seconds"] = time.monotonic() - started
    trainer.save_model(str(folder / "adapter"))
    if state.is_main_process:
        write_whole(folder / "page.md", page(result))
        write_whole(folder / "result.json", json.dumps(result, indent=1))  # last: it says that the run is finished
        print(f"\n{page(result)}\nThis page: {folder / 'page.md'}")
    return result


def answered(
    arm: Arm, model: Any, tokenizer: Any, view: View, rows: Dataset, seed: int, file: Path | None = None
) -> Dataset:
    """Prompts, and what the prompted model says to each (a sample); processes share them.

    Args:
        arm: How long and how many at a time.
        model: The base model.
        tokenizer: Its tokenizer.
        view: The prompt.
        rows: With a column `prompt`.
        seed: Of the samples.
        file: Where the answers are kept; those of an interrupted run are read.

    Raises:
        ArmError: the prompted model has nothing to say to any prompt.
    """
    if file is not None and all(gather_object([file.exists()])):
        return Dataset.from_list(read_rows(file, "Delete it, and the prompts are answered again."))
    shown: list[Any] = [row["prompt"] for row in view(rows.to_list())]
    check_context(model, tokenizer, Dataset.from_dict({"prompt": shown}), arm.evaluation.new_tokens, "[views.good]")
    size, length = arm.evaluation.batch_size, arm.evaluation.new_tokens
    with PartialState().split_between_processes(list(range(0, len(shown), size))) as own:
        said = {
            i: generate(model, tokenizer, shown[i : i + size], length, _TEMPERATURE, seed + 7 * i)
            for i in tqdm(own, desc="Prompted answers", unit="batch")
        }
    # by batch: of fewer batches than processes, several have the last one
    everywhere = dict(gather_object(list(said.items())))
    found = [text for i in sorted(everywhere) for text in everywhere[i]]
    kept = [{"prompt": p, "completion": _said(p, text)} for p, text in zip(rows["prompt"], found, strict=True) if text]
    if not kept:
        raise ArmError("The prompted model answered nothing at all: is [views.good] a prompt for this model?")
    if file is not None and PartialState().is_main_process:
        write_rows(file, kept)
    return Dataset.from_list(kept)


@torch.no_grad()
def fidelity(model: Any, tokenizer: Any, rows: Dataset, view: View, batch_size: int = 8) -> dict[str, float]:
    """How near the adapted and the base model come to the prompted one, at the answers of `rows`.

    Returns:
        `kl_base` and `kl`: mean KL(prompted ‖ base) and KL(prompted ‖ distilled) per token, in nats; `fidelity`;
        `agreement_base` and `agreement`: share of tokens at which the likeliest one is the prompted model's.
    """
    views = Views({"good": view}, tokenizer, getattr(model.config, "max_position_embeddings", None))
    views.add(rows, tokenise(rows, tokenizer))
    found: list[Tensor] = []
    for batch in tqdm(batches(tokenizer, rows, batch_size), desc="Fidelity", unit="batch"):
        at = ModelAt(model, model, batch.to(model.device), views=views)
        prompted = at(0.0, view="good", distribution=True)
        sides = [at(strength, distribution=True) for strength in (0.0, 1.0)]
        found.append(torch.stack([value for side in sides for value in _compared(prompted, side)]).cpu())
    kl_base, agreement_base, kl, agreement = torch.cat(found, dim=1).mean(dim=1).tolist()
    return {
        "fidelity": 1 - kl / kl_base,
        "kl_base": kl_base,
        "kl": kl,
        "agreement_base": agreement_base,
        "agreement": agreement,
    }


def _compared(prompted: Outputs, other: Outputs) -> tuple[Tensor, Tensor]:
    p, q = prompted.distribution, other.distribution
    assert p is not None and q is not None  # they were asked for
    return (p.exp() * (p - q)).sum(dim=-1), (p.argmax(dim=-1) == q.argmax(dim=-1)).to(p.dtype)


def _preference(arm: Arm, model: Any, tokenizer: Any, view: View, test: Dataset) -> dict[str, Any]:
    """Held-out pair accuracy of the base, the prompted and the distilled model, where the data are pairs."""
    if not _are_pairs(test):
        return {}
    size = arm.evaluation.batch_size
    plain = pair_margins(model, tokenizer, test, [0.0, 1.0], size)
    prompted = pair_margins(model, tokenizer, _shown(view, test), [0.0], size)
    margins = {"base": plain[0.0], "prompted": prompted[0.0], "distilled": plain[1.0]}
    return {"accuracy": {name: float((values > 0).float().mean()) for name, values in margins.items()}}


def _are_pairs(rows: Dataset) -> bool:
    return {"chosen", "rejected"} <= set(rows.column_names)


def _shown(view: View, rows: Dataset) -> Dataset:
    return Dataset.from_list([dict(row) for row in view(rows.to_list())])


def _tokens(tokenizer: Any, view: View, test: Dataset) -> dict[str, float]:
    """Mean tokens of a request, as it is and behind the prompt."""
    shown = [row["prompt"] for row in view(test.to_list())]
    plain, prompted = (sum(prompt_lengths(tokenizer, prompts)) / len(test) for prompts in (test["prompt"], shown))
    return {"plain": plain, "prompted": prompted, "saved": prompted - plain}


def _generations(
    arm: Arm, model: Any, adapted: Any, tokenizer: Any, view: View, test: Dataset
) -> list[dict[str, str]]:
    few = test.select(range(min(arm.evaluation.generations, len(test))))
    if not len(few):
        return []
    plain, shown = few["prompt"], [row["prompt"] for row in view(few.to_list())]
    sides = {"base": (model, plain), "prompted": (model, shown), "distilled": (adapted, plain)}
    texts = {n: generate(m, tokenizer, prompts, arm.evaluation.new_tokens) for n, (m, prompts) in sides.items()}
    asked = [p if isinstance(p, str) else p[-1]["content"] for p in plain]
    return [{"prompt": p, **{name: texts[name][i] for name in sides}} for i, p in enumerate(asked)]


def page(result: dict[str, Any]) -> str:
    """What came of it, in Markdown."""
    tokens, effects = result["tokens"], result["side_effects"]
    rows = [
        ("KL(prompted ‖ it) per token, nats", f"{result['kl_base']:.3f}", "0", f"{result['kl']:.3f}"),
        ("likeliest token as prompted", f"{result['agreement_base']:.3f}", "1", f"{result['agreement']:.3f}"),
        ("tokens of a request", f"{tokens['plain']:.0f}", f"{tokens['prompted']:.0f}", f"{tokens['plain']:.0f}"),
    ]  # fmt: skip
    if "accuracy" in result:
        base, prompted, distilled = (f"{result['accuracy'][name]:.3f}" for name in ("base", "prompted", "distilled"))
        rows.append(("held-out pair accuracy", base, prompted, distilled))
    lines = [
        f"# {result['name']}: a prompt, distilled",
        "",
        f"Fidelity **{result['fidelity']:.3f}** on {result['test_prompts']} test prompts, after "
        f"{result['train_prompts']} training prompts; **{tokens['saved']:.0f} tokens saved** per request.",
        "",
        "| | base | prompted | distilled |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"On neutral text: KL(distilled ‖ base) {effects['kl']:.4f} nats a token, perplexity "
        f"{effects['base_perplexity']:.2f} before and {effects['perplexity']:.2f} after.",
        "",
    ]
    for row in result["generations"]:
        lines += [f"**{row['prompt']}**", ""]
        lines += [f"- {name}: {row[name]}" for name in ("base", "prompted", "distilled")] + [""]
    return "\n".join(lines)


def _check(arm: Arm) -> None:
    loss = arm.loss_object()
    if loss is None or {*loss.needs.views} - {"neutral"} != {"good"} or loss.needs.pairs:
        raise ArmError(
            f"loss.name={arm.loss.get('name')!r} learns no prompt: choose context_distillation or prompted."
        )
    if "good" not in arm.views or arm.views["good"].get("name") not in ("instruction", "demonstrations"):
        raise ArmError('[views.good] is the prompt: name = "instruction" or "demonstrations".')
    if arm.peft_config() is None or arm.trainer.get("max_steps") == 0:
        raise ArmError('adapter.type="none" or trainer.max_steps=0: distillation trains an adapter.')
    refuse_augmentation(arm, "distill")


def _with_pool(arm: Arm, train: Dataset) -> Arm:
    """Demonstrations are training examples, also in front of test prompts."""
    good = arm.views["good"]
    if good["name"] != "demonstrations":
        return arm
    return arm.model_copy(update={"views": {**arm.views, "good": {**good, "pool": tuple(train.to_list())}}})


def _said(prompt: Any, text: str) -> Any:
    """An answer in the prompt's format."""
    if isinstance(prompt, str):
        return text if prompt[-1:].isspace() else f" {text}"
    return [{"role": "assistant", "content": text}]


if __name__ == "__main__":
    sys.exit(main())
