"""Describe an adapter folder, and check whether it fits a model.

    python -m steertune.recipes.info runs/vector_dpo-cautious_advice/adapter
    python -m steertune.recipes.info my-vector --model embedded --json
    steertune info my-vector --data cautious_advice --loss dpo

Every tensor is checked as when the adapter is loaded. `--model` also loads the base model, adds the vector to it, and
lists the possible exports.

`--data` adds three numbers of inductive bias (`lab/inductive_bias.py`), also for a LoRA: how small a change reaches
the training loss, how much noise the solution tolerates, and how much more it changes neutral text than a random
direction does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from pydantic import ValidationError

from steertune import losses
from steertune.adapters import exports, steering_layers
from steertune.adapters.description import read_description
from steertune.adapters.exports import ExportError
from steertune.adapters.saved import read_tensors
from steertune.recipes.lab import embedded
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import adapter_config, load_data, load_model, load_steered
from steertune.recipes.lab.files import ArmError, reasons
from steertune.recipes.lab.forms import has_template, readable
from steertune.recipes.lab.inductive_bias import SCALES, SIZES, inductive_bias
from steertune.recipes.lab.observe import neutral_rows
from steertune.recipes.lab.options import Argument, ColumnNames, Count, Option, Threads, columns_of
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.tables import DataTable, ModelTable

_SWITCHES = ("form", "rank", "layers", "tied", "site", "norm", "norm_value", "positions", "init", "init_scale")
_NEUTRAL = 8  # rows of neutral text on which random directions are compared with the adapter


@command
def main(
    folder: Annotated[Path, Argument(help="adapter folder")],
    model: Annotated[
        str | None, Option(help="also try the adapter on this base: embedded, a local folder or a Hub name")
    ] = None,
    data: Annotated[str | None, Option(help="training data, as data.name: measure the inductive bias on it")] = None,
    columns: ColumnNames = None,
    loss: Annotated[str, Option(help="with --data: a file of losses/", metavar="NAME")] = "cross_entropy",
    rows: Annotated[int, Count("with --data: number of training rows, drawn as in the recipes")] = 16,
    seed: Annotated[int, Option(help="with --data: seed of the rows, the noise and the random directions")] = 0,
    threads: Threads = None,
) -> Result:
    """Describe an adapter; an unusable folder, or an adapter of another model, is an error."""
    if data is None:
        _check_unused({"columns": columns, "loss": loss != "cross_entropy", "rows": rows != 16, "seed": seed != 0})
    lora = data is not None and _is_lora(folder)
    facts = {} if lora else describe(folder)
    if data is None and model is None:
        return Result(facts, _lines(facts))
    begin(threads, only_one=True)
    if model is not None and not lora:
        facts |= tried(folder, model)
    if data is not None:
        try:
            table = DataTable(name=data, columns=columns_of(columns), train=rows, test=1, seed=seed)
        except ValidationError as error:
            raise ArmError(reasons(error)) from error
        with progress("Inductive bias"):
            facts |= biases(folder, model, table, loss)
    return Result(facts, _lines(facts))


def _check_unused(options: dict[str, Any]) -> None:
    """Raise an ArmError for an option that is only used with `--data`."""
    if given := [f"--{name}" for name, value in options.items() if value]:
        raise ArmError(f"{given[0]} is only used with --data. Add --data, or remove {given[0]}.")


def describe(folder: Path) -> dict[str, Any]:
    """The adapter's switches, its base model, and the length of every vector.

    Raises:
        ArmError: the folder holds no steering vector, or a broken one.
    """
    config = adapter_config(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise ArmError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: there is a configuration but no vector.")
    tensors = read_tensors(weights)
    base = config.base_fingerprint or {}
    return {
        "base model": config.base_model_name_or_path,
        "made for": {name: base.get(name) for name in ("model_type", "hidden_size", "num_layers")},
        "switches": {name: getattr(config, name) for name in _SWITCHES},
        "lengths": {key.removeprefix("base_model.model."): float(t.norm()) for key, t in sorted(tensors.items())},
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "PEFT version": config.peft_version,
        **_described(folder),
    }


def _described(folder: Path) -> dict[str, Any]:
    """Strength and data from the description in the folder, if there is one."""
    try:
        values = read_description(folder)
    except ValueError as error:
        raise ArmError(str(error)) from error
    if values is None:
        return {}
    strength, data = values["strength"] or {}, values["data"] or {}
    costs = {
        f"measured at strength {at}": {name: round(mean, 4) for name, mean in means.items()}
        for at, means in strength.get("measured", {}).items()
    }
    return {"recommended strength": strength.get("recommended"), "data": data or None, **costs}


def tried(folder: Path, name: str) -> dict[str, Any]:
    """Whether the adapter fits a base model, and its possible exports.

    Raises:
        ArmError: it belongs to another model.
    """
    model, *_ = load_steered(folder, name)
    reasons = {}
    for target in exports.names():
        try:
            exports.get(target).check(exports.constant_vectors(model), model)
            reasons[target] = "yes"
        except ExportError as error:
            reasons[target] = f"no: {error}"
    return {"fits": name, "exports": reasons}


def _is_lora(folder: Path) -> bool:
    """Whether a folder is that of a LoRA."""
    return (folder / CONFIG_NAME).is_file() and PeftConfig.from_pretrained(str(folder)).peft_type == "LORA"


def biases(folder: Path, name: str | None, table: DataTable, loss: str) -> dict[str, Any]:
    """The three numbers of inductive bias, and the data behind them.

    Raises:
        ArmError: the data are unknown, or do not fit the loss.
        ValueError: an unknown loss.
    """
    trained = losses.get_loss(loss)
    model, tokenizer = _trainable(folder, name)
    rows = readable(load_data(table, lambda: has_template(tokenizer)).train, tokenizer)
    neutral = neutral_rows(tokenizer, count=_NEUTRAL)
    bias = inductive_bias(model, tokenizer, rows, trained, neutral, table.seed)
    by_size = zip(SIZES, bias.stability.losses, strict=True)
    by_scale = zip(SCALES, bias.efficiency.losses, strict=True)
    return {
        "inductive bias": {
            "efficiency, area under the loss": bias.efficiency.area,
            "stability, rise of the loss": bias.stability.rise,
            "significance, times a random direction": bias.significance.ratio,
        },
        "norm of the parameters": bias.efficiency.norm,
        f"{loss} by share of the solution": {f"{scale:g}": value for scale, value in by_scale},
        f"{loss} by relative size of noise": {f"{size:g}": value for size, value in by_size},
        "KL on neutral text": bias.significance.kl,
        "KL of random directions": {
            f"{share:.0%}": float(np.quantile(bias.significance.random, share)) for share in (0.05, 0.5, 0.95)
        },
        "p of a random direction": bias.significance.p,
    }


def _trainable(folder: Path, name: str | None) -> tuple[PeftModel, Any]:
    """A steering vector or a LoRA on its base model, in evaluation mode, with its tokenizer.

    Raises:
        ArmError: no base model is named, or it is the wrong one.
    """
    if not _is_lora(folder):
        model, tokenizer, _ = load_steered(folder, name)
        for layer in steering_layers(model):
            for key, config in layer.config.items():
                for kind in config.parameter_names:
                    # the vectors of a span are fixed
                    layer.parameter(key, kind).requires_grad_(not (config.form == "span" and kind == "w"))
        return model, tokenizer
    called = name or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not called:
        raise ArmError(f"{folder} does not name its base model: give --model.")
    base, tokenizer = load_model(ModelTable(name=embedded.local_name(called)))
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval(), tokenizer


def _lines(facts: dict[str, Any]) -> str:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [
                f"{name}:",
                *(f"  {k}: {v:.4g}" if isinstance(v, float) else f"  {k}: {v}" for k, v in value.items()),
            ]
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
