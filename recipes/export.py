"""A trained vector for another tool: stock PEFT, llama.cpp, lm-eval, repeng, plain weights.

    python -m steertune.recipes.export runs/vector_dpo-cautious_advice/adapter --to peft --output my-export
    python -m steertune.recipes.export my.gguf --from gguf --model embedded --output my-adapter

What is written is loaded again in a fresh process without this package, and believed only if it gives the same logits
on some prompts; otherwise nothing is left, and the reason is printed. `--from` makes an adapter of a control vector.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steertune.adapters import exports
from steertune.adapters.exports import ExportError
from steertune.adapters.exports.gguf import read
from steertune.recipes.lab import embedded
from steertune.recipes.lab.arm import ModelTable
from steertune.recipes.lab.data import load_model, load_steered
from steertune.recipes.lab.files import read_text
from steertune.recipes.lab.processes import command

_PROMPTS = (
    "Should I quit my job and travel the world?",
    "The capital of France is",
    "Write one sentence about rain.",
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="adapter folder; with --from, a file")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=exports.names(), metavar="TARGET", help=f"one of {', '.join(exports.names())}")
    way.add_argument("--from", dest="origin", choices=["gguf"], help="make an adapter of a control vector")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--strength", type=float, default=1.0, help="baked into the export (1)")
    parser.add_argument("--model", help="base model: embedded, a local folder or a Hub name (the adapter's own)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line, to compare logits on")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    if not math.isfinite(options.strength) or options.strength == 0:
        raise ExportError(f"--strength {options.strength:g}: a finite number that is not 0 is baked into the export.")
    result = _import(options) if options.origin else _export(options)
    print(json.dumps(result) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0


def _export(options: argparse.Namespace) -> dict[str, Any]:
    steered, tokenizer, name = load_steered(options.source, options.model, options.dtype)
    is_embedded = name == "embedded"
    base, called = (str(embedded.plain_copy()), embedded.MODEL_NAME) if is_embedded else (name, name)
    lines = read_text(options.prompts).splitlines() if options.prompts else _PROMPTS
    inputs = [tokenizer(line)["input_ids"] for line in lines if line.strip()]
    made = exports.export(steered, options.to, options.output, base, inputs, options.strength, called)
    return {
        "target": made.target,
        "folder": str(made.folder),
        "largest difference of a logit": made.error,
        "largest effect on a logit": made.effect,
        "how to load it": str(made.folder / "README.md"),
    }


def _import(options: argparse.Namespace) -> dict[str, Any]:
    if options.model is None:
        raise ExportError("--from needs --model: a control vector does not say which model it was made for.")
    if options.output.exists():
        raise ExportError(f"{options.output} is there already. Choose a new folder.")
    vectors = {layer: options.strength * vector for layer, vector in read(options.source).items()}
    model, _ = load_model(ModelTable(name=options.model))
    exports.adapter_of(model, vectors).save_pretrained(str(options.output))
    return {"folder": str(options.output), "layers": sorted(vectors)}


if __name__ == "__main__":
    sys.exit(main())
