"""Several vectors: arithmetic on adapter folders, how alike they are, and whether two work together.

    steertune vectors add cautious warm --output both                  # also subtract, average; --weights 1 0.5
    steertune vectors project-out cautious warm --output cautious-only # take warm's direction out of cautious
    steertune vectors orthogonalise cautious warm --output apart       # apart/cautious, apart/warm
    steertune vectors similarity cautious warm formal                  # cosines, layer by layer
    steertune vectors together cautious warm --data cautious_advice warm_tone

Arithmetic loads no model. What comes out is an ordinary adapter folder with a model card that says what it was made
of. `together` measures each vector alone and both at once on the data of each: does the pair do what each did?
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steertune.adapters import arithmetic
from steertune.adapters.arithmetic import VectorError, Vectors
from steertune.adapters.card import Card
from steertune.recipes.lab.processes import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for vectors that cannot be put together."""
    options = _parser().parse_args(argv)
    result = options.run(options)
    print(json.dumps(result, indent=1) if options.json else result["text"])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vectors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str, saves: bool = True) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text)
        own.add_argument("folders", nargs="+", type=Path, help="adapter folders")
        own.add_argument("--json", action="store_true", help="print the result as JSON")
        own.set_defaults(run=run)
        if saves:
            own.add_argument("--output", type=Path, required=True, help="a new folder")
            own.add_argument(
                "--missing",
                choices=["refuse", "zero"],
                default="refuse",
                help="a layer that not all of them steer is refused, or zeros there (refuse)",
            )
        return own

    for name, text in (
        ("add", "the sum, or with --weights any weighted sum; one folder and one weight scale it"),
        ("average", "the mean, or with --weights the weighted mean"),
    ):
        own = add(name, _sum, text)
        own.add_argument("--weights", nargs="+", type=float, help="one a folder (1)")
    add("subtract", _sum, "the first minus the others")
    add("project-out", _project, "the first without what lies in the span of the others")
    add("orthogonalise", _orthogonalise, "each without what lies along those before it; a folder each in --output")
    add("similarity", _similarity, "cosine of every two, layer by layer", saves=False)
    own = add("together", _together, "does the pair do what each does alone, on the data of both?", saves=False)
    own.add_argument("--data", nargs=2, required=True, help="pairs of the first vector, and of the second")
    own.add_argument("--strengths", nargs=2, type=float, default=[1.0, 1.0], help="(1 1)")
    own.add_argument("--rows", type=int, default=40, help="test pairs of each (40)")
    own.add_argument("--model", help="base model: embedded, a local folder or a Hub name (the adapters' own)")
    own.add_argument("--threads", type=int, help="CPU threads (all cores)")
    return parser


def _sum(options: argparse.Namespace) -> dict[str, Any]:
    sets, count = _read(options.folders), len(options.folders)
    if options.command != "add" and count < 2:
        raise VectorError(f"{options.command} needs two folders or more; this is {count}.")
    weights: list[float] = getattr(options, "weights", None) or [1.0] * count
    if options.command == "subtract":
        weights = [1.0, *[-1.0] * (count - 1)]
    if options.command == "average":
        if len(weights) == count and sum(weights) == 0:
            raise VectorError(f"--weights {weights} add up to 0: there is no mean of them.")
        weights = [weight / sum(weights) for weight in weights]
    made = arithmetic.combine(sets, weights, options.missing, options.output.name)
    formula = " + ".join(f"{weight:g} × {one.name}" for weight, one in zip(weights, sets, strict=True))
    return _saved(options, made, options.output, formula, sets)


def _project(options: argparse.Namespace) -> dict[str, Any]:
    sets = _read(options.folders)
    if len(sets) < 2:
        raise VectorError("project-out needs what is projected and one folder or more whose directions are taken out.")
    made = arithmetic.project_out(sets[0], sets[1:], options.missing, options.output.name)
    formula = f"{sets[0].name} without the span of {', '.join(one.name for one in sets[1:])}"
    return _saved(options, made, options.output, formula, sets)


def _orthogonalise(options: argparse.Namespace) -> dict[str, Any]:
    sets = _read(options.folders)
    if len(sets) < 2:
        raise VectorError("orthogonalise needs two folders or more, the most important first.")
    if options.output.exists():
        raise VectorError(f"{options.output} is there already. Choose a new folder.")
    saved = []
    for i, made in enumerate(arithmetic.orthogonalise(sets, options.missing)):
        before = ", ".join(one.name for one in sets[:i])
        formula = f"{made.name} without the span of {before}" if before else f"{made.name}, as it was"
        saved.append(_saved(options, made, options.output / made.name, formula, sets[: i + 1]))
    return {"adapters": saved, "text": "\n\n".join(one["text"] for one in saved)}


def _saved(
    options: argparse.Namespace, made: Vectors, folder: Path, formula: str, sets: Sequence[Vectors]
) -> dict[str, Any]:
    arithmetic.write(made, folder, _card(made, formula, sets))
    lengths = {layer: float(made.vectors[layer].norm()) for layer in made.layers}
    before = {one.name: {layer: float(one.vectors[layer].norm()) for layer in one.layers} for one in sets}
    table = [f"layer {layer}: length {length:.4g}" for layer, length in lengths.items()]
    return {
        "folder": str(folder),
        "formula": formula,
        "lengths": lengths,
        "lengths before": before,
        "text": "\n".join([f"{folder} = {formula}", *(f"  {line}" for line in table)]),
    }


def _card(made: Vectors, formula: str, sets: Sequence[Vectors]) -> Card:
    """What is known of a vector that was computed and never measured."""
    parents = [f"- `{one.name}`, weights with SHA-256 `{one.sha256}`" for one in sets]
    return Card(
        title=made.name,
        behaviour=f"Computed as {formula}. What it does was not measured: a sum of vectors need not do what each did.",
        data="None of its own; the adapters it was made of have theirs.",
        made="\n".join([f"`{formula}`, layer by layer, of", "", *parents]),
        advice="Layers are those of the adapters it was made of. Measure strengths again: "
        "`steertune vectors together`, or held-out pairs of yours.",
    )


def _similarity(options: argparse.Namespace) -> dict[str, Any]:
    sets = _read(options.folders)
    if len(sets) < 2:
        raise VectorError("similarity needs two folders or more.")
    found = arithmetic.similarity(sets)
    names = [one.name for one in sets]
    lines = []
    for layer, cosines in found.items():
        lines += [f"layer {layer}", ""]
        lines += ["| | " + " | ".join(names) + " | length |", "|---" * (len(names) + 2) + "|"]
        for one, row in zip(sets, cosines.tolist(), strict=True):
            length = float(one.vectors[layer].norm()) if layer in one.vectors else 0.0
            values = ["-" if value != value else f"{value:+.3f}" for value in row]
            lines.append(f"| {one.name} | " + " | ".join(values) + f" | {length:.4g} |")
        lines.append("")
    plain = {layer: [[None if v != v else v for v in row] for row in m.tolist()] for layer, m in found.items()}
    return {"names": names, "cosines": plain, "text": "\n".join(lines).rstrip()}


def _together(options: argparse.Namespace) -> dict[str, Any]:
    from steertune.recipes.ablation.two_vectors import measure, summarise

    if len(options.folders) != 2:
        raise VectorError(
            f"together needs two folders, the vector of each data set; these are {len(options.folders)}."
        )
    result = measure(options.folders, options.data, options.strengths, options.rows, options.model, options.threads)
    return {**result, "text": summarise(result)}


def _read(folders: Sequence[Path]) -> list[Vectors]:
    """The vectors of the folders, under the shortest names that tell them apart."""
    names = [folder.name for folder in folders]
    for depth in range(2, 5):  # `runs/a/adapter` and `runs/b/adapter` are a-adapter and b-adapter
        if len(set(names)) == len(names):
            break
        names = ["-".join(folder.resolve().parts[-depth:]) for folder in folders]
    return [
        dataclasses.replace(arithmetic.read(folder), name=name) for folder, name in zip(folders, names, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
