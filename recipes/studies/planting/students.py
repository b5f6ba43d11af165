"""Arms that learn a planted problem, the value of every measure, and how near they come to the teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_config, get_peft_model
from torch import Tensor

import steertune.adapters  # noqa: F401  registers the method with PEFT
from steertune.losses import get_loss
from steertune.recipes.ablation.kl_search import strengths_at
from steertune.recipes.lab import measures
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.likelihood import answer_logps
from steertune.recipes.lab.measures import Array, Missing, Seen
from steertune.recipes.lab.observe import HeldOut
from steertune.recipes.lab.scorers import Scorer, as_rows
from steertune.recipes.studies.planting.contrasts import KL, LARGEST, Planted
from steertune.recipes.studies.planting.worlds import World
from steertune.trainers import Batch, ModelAt, scaled, share_weights

TRUTH = "truth"
"""What an arm's record calls the KL from the teacher to it, per answer."""
_AT = "matched"
_ROWS = 16  # pairs in a training step
_LORA = {"type": "lora", "r": 1, "lora_alpha": 15, "target_modules": ["down_proj"]}


def arms(world: World) -> dict[str, dict[str, Any]]:
    """The arms by name: `[adapter]`, `[loss]` and the learning rate of each."""
    vector = {"type": "steering_vector", "layers": [world.layer]}
    wrong = {"type": "steering_vector", "layers": [world.wrong_layer]}
    pairs = {"loss": "dpo", "options": {"beta": 1.0 if world.name == "tiny" else 0.1}}
    rate, lora_rate = (0.01, 0.03) if world.name == "tiny" else (2e-3, 1e-3)
    return {
        "pairs": {"adapter": vector, **pairs, "rate": rate},
        "chosen": {"adapter": vector, "loss": "cross_entropy", "rate": rate},
        "wrong layer": {"adapter": wrong, **pairs, "rate": rate},
        "lora": {"adapter": {**_LORA, "layers_to_transform": [world.layer]}, **pairs, "rate": lora_rate},
    }


TWINS = ("pairs", "chosen")
"""Arms that are trained twice, on two draws of the data: no measure may tell the two apart."""
COMPARISONS = {"contrast": ("pairs", "chosen"), "layer": ("pairs", "wrong layer"), "form": ("pairs", "lora")}
"""What is compared, and the two arms."""


def twin(name: str) -> str:
    """What the second training of an arm is called."""
    return f"{name} again"


def students(world: World, task: Planted, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """Train the arms of these names, and the twins among them; name -> model."""
    models = {}
    for name in names:
        plain = name.removesuffix(" again")
        rows = task.train if name == plain else task.again
        models[name] = trained(world, arms(world)[plain], rows.shuffle(seed=seed), seed)
    return models


def trained(world: World, table: Mapping[str, Any], rows: Dataset, seed: int) -> Any:
    """An arm trained on pairs: the library's adapter and loss in a plain loop, since a study makes hundreds. `table`
    is one of `arms`; rows are seen in their order."""
    options = {"peft_type": table["adapter"]["type"].upper(), "task_type": "CAUSAL_LM"}
    adapter = {name: value for name, value in table["adapter"].items() if name != "type"}
    config, loss = get_peft_config({**options, **adapter}), get_loss(table["loss"], **table.get("options", {}))
    torch.manual_seed(seed)
    base = copy.deepcopy(world.model) if table["adapter"]["type"] == "lora" else share_weights(world.model)
    model: Any = get_peft_model(base, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=table["rate"], weight_decay=0.0)
    shown, steps = batches(world.tokenizer, rows, _ROWS), world.sizes.steps
    for step in range(steps):
        batch = shown[step % len(shown)]
        batch = batch if loss.needs.pairs else batch.chosen
        value = loss(ModelAt(model, model, batch)).sum() / batch.count(loss.needs.unit)
        optimizer.zero_grad()
        value.backward()
        optimizer.param_groups[0]["lr"] = table["rate"] * (1 - step / steps)
        optimizer.step()
    return model.eval()


def measured(world: World, task: Planted, models: Mapping[str, Any], held_out: HeldOut) -> dict[str, dict[str, Array]]:
    """Per arm, every measure's values on the test rows and the truth on fresh prompts, at the same KL to the base.
    `held_out` holds the neutral text."""
    shared = replace(
        held_out,
        pairs=task.test,
        asked=task.test.select_columns(["prompt"]),
        generations=len(task.test),
        new_tokens=world.sizes.new_tokens,
        scorer=_likelihood_ratio(world, task.teacher),
        shared={},
    )
    names = [name for name in measures.served_by("pairs", "neutral", "answers") if measures.get(name).better]
    # answers of the teacher, tokenised once for all arms
    shown = {part: batches(world.tokenizer, getattr(task, part), world.batch) for part in ("asked", "fresh")}
    targets = {part: _logps(task.teacher, of_part) for part, of_part in shown.items()}
    base = evaluate_base(shared, names)["0"] | _prompted(targets["asked"], _logps(world.model, shown["asked"]), None)
    results = {}
    for name, model in models.items():
        [point], _ = strengths_at(model, shared, [KL], LARGEST, world.batch)
        observed = evaluate(model, shared, names, {_AT: point.strength})[_AT]
        with scaled(model, point.strength):
            asked, fresh = (_logps(model, shown[part]) for part in ("asked", "fresh"))
        observed |= _prompted(targets["asked"], asked, base["prompted_base_nats"])
        seen = Seen(observed, Seen(base))
        results[name] = {key: seen_values for key in [*names, "fidelity"] if (seen_values := _values(key, seen)).size}
        results[name][TRUTH] = np.array([_kl(t, s) for t, s in zip(targets["fresh"], fresh, strict=True)])
    return results


def _values(name: str, seen: Seen) -> Array:
    try:
        return measures.get(name).values(seen)
    except Missing:
        return np.array([])


def _logps(model: Any, shown: Sequence[Batch]) -> list[Tensor]:
    """Log-probabilities of all tokens along every answer, `(T, V)` each."""
    return [logps for logps, _ in answer_logps(model, shown)]


def _kl(teacher: Tensor, student: Tensor) -> float:
    """Mean KL(teacher || student) over an answer's tokens, from `(T, V)`."""
    return float((teacher.exp() * (teacher - student)).sum(dim=-1).mean())


def _prompted(teacher: Sequence[Tensor], model: Sequence[Tensor], base: list[float] | None) -> dict[str, list[float]]:
    """The observations of `fidelity`, with the teacher in place of a prompted model."""
    tokens = [float(len(logps)) for logps in teacher]
    nats = [_kl(t, m) * count for t, m, count in zip(teacher, model, tokens, strict=True)]
    return {"prompted_nats": nats, "prompted_base_nats": nats if base is None else base, "prompted_tokens": tokens}


def _likelihood_ratio(world: World, teacher: Any) -> Scorer:
    """The judge that knows the teacher: how much likelier an answer is for it than for the base, per token."""

    @torch.no_grad()
    def score(prompts: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        written = [i for i, text in enumerate(texts) if text.strip()]
        pairs = [(prompts[i].strip(), texts[i]) for i in written]
        if world.name == "tiny":  # its prompts end with a space
            rows = world.rows([f"{prompt} " for prompt, _ in pairs], completion=[text for _, text in pairs])
        else:
            rows = as_rows(world.tokenizer, pairs)
        values: list[float | None] = [None] * len(texts)
        shown = batches(world.tokenizer, rows, world.batch) if written else []
        for side, sign in ((teacher, 1.0), (world.model, -1.0)):
            for i, (logps_TV, targets_T) in zip(written, answer_logps(side, shown), strict=True):
                values[i] = (values[i] or 0.0) + sign * float(logps_TV.gather(1, targets_T[:, None]).mean())
        return values

    return Scorer(score, "likelihood ratio of the teacher to the base")
