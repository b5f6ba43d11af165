"""Export a trained vector for another tool: stock PEFT, llama.cpp, lm-eval, repeng, plain weights.

    python -m steertune.recipes.export runs/vector_dpo-cautious_advice/adapter --to peft --output my-export
    python -m steertune.recipes.export my.gguf --from gguf --model embedded --output my-adapter
    python -m steertune.recipes.export steer.pt --from lm_eval --model embedded --output my-adapter

The export is loaded again in a fresh process without this package, and kept only if it gives the same logits on some
prompts; otherwise it is removed, and the reason is printed. `--from` makes an adapter from a file of another tool, and
refuses files that an adapter would apply differently.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

from steertune.adapters import exports
from steertune.adapters.description import check_constant, write_description
from steertune.adapters.exports import ExportError
from steertune.adapters.exports.gguf import read_facts
from steertune.recipes.lab import embedded
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model, load_steered
from steertune.recipes.lab.files import read_text
from steertune.recipes.lab.options import Argument, Base, Choice, DType, Option, Threads
from steertune.recipes.lab.paths import modules_in
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.tables import ModelTable

_PROMPTS = (
    "Should I quit my job and travel the world?",
    "The capital of France is",
    "Write one sentence about rain.",
)


@command
def main(
    source: Annotated[Path, Argument(help="adapter folder; with --from, a file")],
    output: Annotated[Path, Option(help="a new folder")],
    to: Annotated[str | None, Choice(modules_in("adapters/exports"), "the tool it is for")] = None,
    origin: Annotated[
        str | None, Choice(modules_in("adapters/exports"), "make an adapter from a file of this tool", "--from")
    ] = None,
    strength: Annotated[float, Option(help="baked into the export")] = 1.0,
    model: Base = None,
    dtype: DType = "float32",
    prompts: Annotated[Path | None, Option(help="text file with one prompt per line, to compare logits on")] = None,
    threads: Threads = None,
) -> Result:
    """Write the export, or the adapter."""
    if (to is None) == (origin is None):
        raise ExportError("Give either --to TOOL, to export an adapter, or --from TOOL, to make one.")
    if not math.isfinite(strength) or strength == 0:
        raise ExportError(f"--strength {strength:g} must be a finite number that is not 0.")
    begin(threads, only_one=True)
    if to is None:
        assert origin is not None
        data = _import(source, origin, output, strength, model)
    else:
        data = _export(source, output, to, strength, model, dtype, prompts)
    return Result(data, "\n".join(f"{name}: {value}" for name, value in data.items()))


def _export(
    source: Path, output: Path, target: str, strength: float, model: str | None, dtype: str, prompts: Path | None
) -> dict[str, Any]:
    lines = read_text(prompts).splitlines() if prompts else _PROMPTS
    steered, tokenizer, name = load_steered(source, model, dtype)
    is_embedded = name == "embedded"
    base, called = (str(embedded.plain_copy()), embedded.MODEL_NAME) if is_embedded else (name, name)
    inputs = [tokenizer(line)["input_ids"] for line in lines if line.strip()]
    with progress("Export") as bar, bar.step("write, load again without this package, and compare"):
        made = exports.export(steered, target, output, base, inputs, strength, called, tokenizer)
    return {
        "target": made.target,
        "folder": str(made.folder),
        "largest difference of a logit": made.error,
        "largest effect on a logit": made.effect,
        "how to load it": str(made.folder / "README.md"),
    }


def _import(source: Path, origin: str, output: Path, strength: float, base: str | None) -> dict[str, Any]:
    if base is None:
        raise ExportError("--from needs --model: files of other tools do not say which model they were made for.")
    if output.exists():
        raise ExportError(f"{output} exists already. Choose a new folder.")
    if not (source.is_file() or source.is_dir()):
        raise ExportError(f"{source}: there is no such file or folder (the file does not exist, or it is a pipe).")
    if not (reader := exports.get(origin)).can_read:
        raise ExportError(f"--from {origin}: {reader.not_read}")
    facts = exports.description_of(source) or (read_facts(source) if origin == "gguf" and source.is_file() else None)
    model, _ = load_model(ModelTable(name=base))
    vectors = {layer: strength * vector for layer, vector in reader.read(source, model).items()}
    if facts is not None:
        check_constant(facts, model, str(source))
    exports.adapter_of(model, vectors).save_pretrained(str(output))
    write_description(output)
    return {"folder": str(output), "layers": sorted(vectors)}


if __name__ == "__main__":
    sys.exit(main())
