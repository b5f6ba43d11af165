"""What an adapter folder holds, and whether it fits a model.

    python -m steertune.recipes.info runs/vector_dpo-cautious_advice/adapter
    python -m steertune.recipes.info my-vector --model embedded --json

Every tensor is checked as it is when the adapter is loaded. `--model` loads the base model
too, puts the vector on it, and says where it can be exported to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from steertune.adapters import exports
from steertune.adapters.exports import ExportError
from steertune.adapters.saved import read_tensors
from steertune.recipes.lab.command_line import Argument, Option, Result, Threads, command
from steertune.recipes.lab.data import adapter_config, load_steered
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.processes import begin

_SWITCHES = ("form", "rank", "layers", "tied", "site", "norm", "norm_value", "positions", "init", "init_scale")


@command
def main(
    folder: Annotated[Path, Argument(help="adapter folder")],
    model: Annotated[
        str | None, Option(help="also try it on this base: embedded, a local folder or a Hub name")
    ] = None,
    threads: Threads = None,
) -> Result:
    """Describe an adapter; a folder that is no usable adapter, or not of the model, is an error."""
    data = describe(folder)
    if model is not None:
        begin(threads, only_one=True)
        data |= tried(folder, model)
    return Result(data, _lines(data))


def describe(folder: Path) -> dict[str, Any]:
    """The adapter's switches, its base model, and the length of every vector.

    Raises:
        ArmError: the folder holds no steering vector, or a broken one.
    """
    config = adapter_config(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise ArmError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: there is a configuration, and no vector.")
    tensors = read_tensors(weights)
    base = config.base_fingerprint or {}
    return {
        "base model": config.base_model_name_or_path,
        "made for": {name: base.get(name) for name in ("model_type", "hidden_size", "num_layers")},
        "switches": {name: getattr(config, name) for name in _SWITCHES},
        "lengths": {key.removeprefix("base_model.model."): float(t.norm()) for key, t in sorted(tensors.items())},
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "PEFT version": config.peft_version,
    }


def tried(folder: Path, name: str) -> dict[str, Any]:
    """What can be said with the base model at hand: that it fits, and where it can be exported to.

    Raises:
        ArmError: it is not of this model.
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


def _lines(found: dict[str, Any]) -> str:
    lines = []
    for name, value in found.items():
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
