"""Arms that learn a planted problem, the value of every measure, and how near they come to the teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peft import get_peft_config, get_peft_model
from torch import Tensor

from steertune.adapters import directions
from steertune.losses import get_loss
from steertune.recipes.ablation.kl_search import strengths_at
from steertune.recipes.lab import measures
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.likelihood import answer_logps
from steertune.recipes.lab.measures import Array, Missing, Seen
from steertune.recipes.lab.observe import HeldOut
from steertune.recipes.lab.scorers import Scorer, as_rows
from steertune.recipes.studies.planting.plants import KL, LARGEST, Planted
from steertune.recipes.studies.planting.worlds import World
from steertune.trainers import Batch, ModelAt, scaled, share_weights

TRUTH = "truth"
"""The name, in an arm's record, of the KL from the teacher to the arm, per answer."""
_AT = "matched"
_PAIR = ["prompt", "chosen", "rejected"]
_LORA = {"type": "lora", "r": 1, "lora_alpha": 15, "target_modules": ["down_proj"]}


def arms(world: World) -> dict[str, dict[str, Any]]:
    """The arms by name: `[adapter]`, `[loss]` and the learning rate of each, which answers it rejects, whether it
    starts from a direction in closed form, and whether it also learns other versions of the chosen answers."""
    tiny = world.name == "tiny"
    rate, lora_rate, sgd_rate = (0.01, 0.03, 0.03) if tiny else (0.02, 3e-3, 0.1)
    vector = {"type": "steering_vector", "layers": [world.layer]}
    lora = {**_LORA, "layers_to_transform": [world.layer]}
    pairs = {"adapter": vector, "loss": "dpo", "options": {"beta": 1.0 if tiny else 0.1}, "rate": rate}
    chosen = {"adapter": vector, "loss": "cross_entropy", "rate": rate}
    return {
        "pairs": pairs,
        "chosen": chosen,
        "wrong layer": {**pairs, "adapter": {**vector, "layers": [world.wrong_layer]}},
        "lora": {**pairs, "adapter": lora, "rate": lora_rate},
        "all layers": {**pairs, "adapter": {**vector, "layers": "all"}},
        "preserve": {**pairs, "adapter": {**vector, "norm": "preserve"}},
        "sgd": {**pairs, "optimiser": "SGD", "rate": sgd_rate},
        "opposed": {**pairs, "rejected": "opposed"},
        "values": {**pairs, "adapter": {**lora, "target_modules": ["v_proj", "o_proj"]}, "rate": lora_rate},
        "queries": {**pairs, "adapter": {**lora, "target_modules": ["q_proj", "k_proj"]}, "rate": lora_rate},
        "started": {**chosen, "start": "mean_difference"},
        "unlikelihood": {**pairs, "loss": "unlikelihood", "options": {}},
        "versions": {**chosen, "versions": True},
    }


TWINS = ("pairs", "chosen")
"""Arms that are trained twice, on two draws of the data: no measure should tell the two apart."""
COMPARISONS = {
    "contrast": ("pairs", "chosen"),
    "layer": ("pairs", "wrong layer"),
    "form": ("pairs", "lora"),
    "layers": ("pairs", "all layers"),
    "norm": ("pairs", "preserve"),
    "optimiser": ("pairs", "sgd"),
    "rejected": ("pairs", "opposed"),
    "sites": ("values", "queries"),
    "start": ("chosen", "started"),
    "loss": ("pairs", "unlikelihood"),
    "augmentation": ("chosen", "versions"),
}
"""What is compared, and the two arms."""


def names_of(factors: Sequence[str], twins: bool) -> list[str]:
    """The arms that factors compare; with `twins`, also second trainings of `TWINS` where these are among them."""
    names = [*dict.fromkeys(arm for factor in factors for arm in COMPARISONS[factor])]
    return names + [twin(name) for name in TWINS if twins and {*TWINS} <= {*names}]


def twin(name: str) -> str:
    """The name of the second training of an arm."""
    return f"{name} again"


def students(world: World, task: Planted, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """Train the arms of these names, and the twins among them; name -> model."""
    models = {}
    for name in names:
        plain = name.removesuffix(" again")
        table = arms(world)[plain]
        rows = _pairs_of(table, task.train if name == plain else task.again)
        models[name] = trained(world, table, rows.shuffle(seed=seed), seed)
    return models


def _pairs_of(table: Mapping[str, Any], rows: Dataset) -> Dataset:
    """The pairs that an arm learns, of all that are drawn for a task."""
    if other := table.get("rejected"):
        rows = rows.remove_columns("rejected").rename_column(other, "rejected")
    if table.get("versions"):
        versions = rows.remove_columns("chosen").rename_column("version", "chosen")
        rows = concatenate_datasets([part.select_columns(_PAIR) for part in (rows, versions)])
    return rows.select_columns(_PAIR)


def trained(world: World, table: Mapping[str, Any], rows: Dataset, seed: int) -> Any:
    """An arm trained on pairs: the library's adapter and loss in a plain loop, since a study trains hundreds. `table`
    is one of `arms`; rows are read in their order."""
    options = {"peft_type": table["adapter"]["type"].upper(), "task_type": "CAUSAL_LM"}
    adapter = {name: value for name, value in table["adapter"].items() if name != "type"}
    config, loss = get_peft_config({**options, **adapter}), get_loss(table["loss"], **table.get("options", {}))
    torch.manual_seed(seed)
    base = copy.deepcopy(world.model) if table["adapter"]["type"] == "lora" else share_weights(world.model)
    model: Any = get_peft_model(base, config)
    shown, steps = batches(world.tokenizer, rows, world.sizes.rows), world.sizes.steps
    if start := table.get("start"):
        pairs = [{**batch.inputs, "labels": batch.labels} for batch in shown]
        directions.compute(start, model, pairs, adapter["layers"]).write(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = getattr(torch.optim, table.get("optimiser", "AdamW"))(parameters, lr=table["rate"], weight_decay=0.0)
    for step in range(steps):
        batch = shown[step % len(shown)]
        batch = batch if loss.needs.pairs else batch.chosen
        value = loss(ModelAt(model, model, batch)).sum() / batch.count(loss.needs.unit)
        optimizer.zero_grad()
        value.backward()
        optimizer.param_groups[0]["lr"] = table["rate"] * (1 - step / steps)
        optimizer.step()
    return model.eval()


def measured(
    world: World, task: Planted, models: Mapping[str, Any], held_out: HeldOut, pairs_alone: bool = False
) -> dict[str, dict[str, Array]]:
    """For every arm, every measure's values on the test rows and the truth on fresh prompts, at the same KL to the
    base. `held_out` holds the neutral text. With `pairs_alone` there is no truth, and only measures of pairs are
    computed."""
    shared = replace(
        held_out,
        pairs=task.test.select_columns(_PAIR),
        asked=task.test.select_columns(["prompt"]),
        generations=0 if pairs_alone else len(task.test),
        new_tokens=world.sizes.new_tokens,
        scorer=_likelihood_ratio(world, task.teacher),
        shared={},
    )
    observers = ("pairs",) if pairs_alone else ("pairs", "neutral", "answers")
    names = [name for name in measures.served_by(*observers) if measures.get(name).better]
    truth = None if pairs_alone else _Truth(world, task)
    base = evaluate_base(shared, names)["0"] | (truth.of_base if truth is not None else {})
    results = {}
    for name, model in models.items():
        [point], _ = strengths_at(model, shared, [KL], LARGEST, world.batch)
        seen = evaluate(model, shared, names, {_AT: point.strength})[_AT]
        nearness = {}
        if truth is not None:
            with scaled(model, point.strength):
                nearness, fidelity = truth.of(model)
            seen |= fidelity
        values = {key: _values(key, Seen(seen, Seen(base))) for key in [*names, "fidelity"]}
        results[name] = {key: of_rows for key, of_rows in values.items() if of_rows.size} | nearness
    return results


class _Truth:
    """How far models are from the teacher, along answers of the teacher, which are tokenised once for all of them."""

    def __init__(self, world: World, task: Planted) -> None:
        self._shown = {part: batches(world.tokenizer, getattr(task, part), world.batch) for part in ("asked", "fresh")}
        self._targets = {part: _logps(task.teacher, shown) for part, shown in self._shown.items()}
        self.of_base = _prompted(self._targets["asked"], _logps(world.model, self._shown["asked"]), None)
        """The observations of `fidelity` for the base."""

    def of(self, model: Any) -> tuple[dict[str, Array], dict[str, list[float]]]:
        """KL from the teacher on fresh prompts, and the observations of `fidelity` on the test prompts."""
        asked, fresh = (_logps(model, self._shown[part]) for part in ("asked", "fresh"))
        kl = np.array([_kl(t, s) for t, s in zip(self._targets["fresh"], fresh, strict=True)])
        return {TRUTH: kl}, _prompted(self._targets["asked"], asked, self.of_base["prompted_base_nats"])


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
    """A scorer that knows the teacher: how much likelier an answer is for it than for the base, per token."""

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
