"""Find out whether a checkpoint has a constant vector baked in: which one, where, and how to remove it.

    steertune audit downloaded-model
    steertune audit downloaded-model --base HuggingFaceTB/SmolLM2-135M-Instruct --vectors my-vector
    steertune audit downloaded-model --output clean

A steering vector can be made part of a model, as a bias that every tool then loads silently (`steertune export --to
merged` writes one). Without `--base`, a bias is suspicious if it is zero in most blocks, or far longer in one than in
the others; with `--base`, every difference is found. A bias counts only if the model's forward pass shows that it adds
the same vector at every token. `--vectors` compares the findings with your own vectors. `--output` writes the
checkpoint without the vectors that are certain, and these as an adapter, and compares both together with the original.

The exit code is 1 if something is found. Only biases are searched: with `--base`, weight matrices that were changed
are listed, but not explained.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cosine_similarity

from steertune.adapters import exports
from steertune.adapters.analysis.audit import Audit, Constant, audit, without
from steertune.adapters.description import write_description
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import adapter_config, load_model, load_steered
from steertune.recipes.lab.files import ArmError, reasons
from steertune.recipes.lab.options import Argument, Option, Threads
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.tables import ModelTable

_SHOWN = 8  # how many differing parameters are listed


@command
def main(
    model: Annotated[str, Argument(help="checkpoint: embedded, a local folder or a Hub name")],
    base: Annotated[str | None, Option(help="the model from which it was made")] = None,
    vectors: Annotated[
        list[Path] | None, Option(metavar="FOLDER ...", help="adapters to compare the findings with")
    ] = None,
    output: Annotated[Path | None, Option(help="a new folder for the checkpoint without the vector")] = None,
    threads: Threads = None,
) -> Result:
    """Audit a checkpoint."""
    for folder in vectors or []:
        adapter_config(folder)
    if output is not None and output.exists():
        raise ArmError(f"--output {output} exists already. Choose a new folder.")
    begin(threads, only_one=True)
    checkpoint, tokenizer = _load(model)
    with progress("Audit"):
        result = audit(checkpoint, None if base is None else _load(base)[0])
    by_folder = {folder: _vectors(folder, base) for folder in vectors or []} if result.constants else {}
    listed = [{**_facts(one), "matches": _matches(one, by_folder)} for one in result.constants]
    data: dict[str, Any] = {"model": model, "base": base, "constants": listed, "changed": result.changed}
    if output is not None:
        data["output"] = _undo(checkpoint, tokenizer, result, output)
    return Result(data, _text(data, result), 1 if result.constants else 0)


def _load(name: str) -> tuple[Any, Any]:
    """A checkpoint in fp32, and its tokenizer.

    Raises:
        ArmError: it is an adapter, or not a model.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise ArmError(f"{name} is an adapter folder, not a checkpoint. `steertune info` describes it.")
    try:
        return load_model(ModelTable(name=name))
    except ValidationError as error:
        raise ArmError(reasons(error)) from error


def _vectors(folder: Path, base: str | None) -> dict[int, Tensor]:
    """The vectors that an adapter adds, by block; empty if they are not constant."""
    model, *_ = load_steered(folder, base)
    try:
        return exports.constant_vectors(model).by_layer
    except exports.ExportError as error:
        raise ArmError(f"--vectors {folder}: {error}") from error


def _facts(constant: Constant) -> dict[str, Any]:
    return {
        "parameter": constant.parameter,
        "layer": constant.layer,
        "site": constant.site,
        "length": float(constant.vector.norm()),
        "why": constant.why,
        "certain": constant.certain,
    }


def _matches(constant: Constant, vectors: dict[Path, dict[int, Tensor]]) -> list[dict[str, Any]]:
    """Cosine and strength of the known vectors at the same layer."""
    matches = []
    for folder, by_layer in vectors.items():
        if (unit := by_layer.get(constant.layer)) is not None:
            vector = constant.vector.cpu()
            cosine = float(cosine_similarity(unit, vector, dim=0))
            matches.append({"folder": str(folder), "cosine": cosine, "strength": float(unit @ vector / (unit @ unit))})
    return matches


@torch.no_grad()
def _undo(model: Any, tokenizer: Any, result: Audit, output: Path) -> dict[str, Any]:
    """Write the checkpoint without the certain vectors, and these as an adapter; return a comparison of both together
    with the original.

    Raises:
        ArmError: no vector is certain.
    """
    constants = [one for one in result.constants if one.certain]
    if not constants:
        raise ArmError("--output: no constant vector is certain, so nothing was removed. Give --base.")
    ids = torch.arange(3, 19)[None]
    original = model(input_ids=ids).logits
    without(model, constants)
    clean = model(input_ids=ids).logits
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    facts: dict[str, Any] = {
        "model": str(output / "model"),
        "largest change of a logit": float((clean - original).abs().max()),
    }
    if {one.site for one in constants} != {"block"}:
        return {**facts, "adapter": None}
    layers = {one.layer for one in constants}
    vectors = {layer: sum_of([one.vector for one in constants if one.layer == layer]) for layer in layers}
    model.name_or_path = model.config.name_or_path = str(output / "model")
    steered = exports.adapter_of(model, vectors)
    steered.save_pretrained(str(output / "adapter"))
    write_description(output / "adapter")
    gap = float((steered(input_ids=ids).logits - original).abs().max())
    return {**facts, "adapter": str(output / "adapter"), "largest difference of both together": gap}


def sum_of(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of some vectors, `(d,)`."""
    return torch.stack(list(vectors)).sum(dim=0)


def _text(data: dict[str, Any], result: Audit) -> str:
    lines = []
    for one in data["constants"]:
        where = (
            f"the output of block {one['layer']}" if one["site"] == "block" else f"attention of block {one['layer']}"
        )
        lines.append(
            f"{one['parameter']} adds a vector of length {one['length']:.4g} to {where} at every token: {one['why']}."
        )
        if not one["certain"]:
            lines.append("  It may belong to the model. Give --base to be certain.")
        lines += [
            f"  {match['folder']}: cosine {match['cosine']:.4f}, so it is that vector at strength "
            f"{match['strength']:.4g}."
            if match["cosine"] ** 2 > 0.99**2
            else f"  {match['folder']}: cosine {match['cosine']:.4f}, another vector."
            for match in one["matches"]
        ]
    if not result.constants:
        lines.append("No constant vector is baked in.")
    if result.changed:
        names = sorted(result.changed, key=lambda name: -result.changed[name])[:_SHOWN]
        more = f" and {len(result.changed) - len(names)} more" if len(result.changed) > len(names) else ""
        lines.append(f"Other parameters differ from the base model's: {', '.join(names)}{more}.")
    if "output" in data:
        lines += [f"{name}: {value}" for name, value in data["output"].items()]
    elif any(one.certain for one in result.constants):
        lines.append("--output FOLDER writes the checkpoint without it, and the vector as an adapter.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
