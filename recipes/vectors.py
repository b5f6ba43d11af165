"""Combine vectors of adapter folders, compare them, and measure whether two of them work together.

    steertune vectors add cautious warm --output both                  # also subtract, average; --weights 1 0.5
    steertune vectors project-out cautious warm --output cautious-only # remove warm's direction from cautious
    steertune vectors orthogonalise cautious warm --output apart       # apart/cautious, apart/warm
    steertune vectors similarity cautious warm formal                  # cosines, layer by layer
    steertune vectors together cautious warm --data cautious_advice warm_tone

Arithmetic loads no model. The result is an ordinary adapter folder, whose model card says what it was made from.
`together` measures each vector alone and both at once on the data of each.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from steertune.adapters.analysis import arithmetic
from steertune.adapters.analysis.arithmetic import VectorError, Vectors
from steertune.adapters.card import Card
from steertune.adapters.description import write_description
from steertune.recipes.lab import trained_on
from steertune.recipes.lab.command_line import Result, group
from steertune.recipes.lab.options import Argument, ColumnNames, Count, Option, Threads, columns_of

Folders = Annotated[list[Path], Argument(help="adapter folders")]
Output = Annotated[Path, Option(help="a new folder")]
Missing = Annotated[
    Literal["refuse", "zero"], Option(help="for a layer that only some vectors steer: refuse it, or use zeros")
]
Weights = Annotated[list[float] | None, Option(help="one weight for each folder (1)", metavar="NUMBER ...")]


def add(folders: Folders, output: Output, weights: Weights = None, missing: Missing = "refuse") -> Result:
    """The sum, or with --weights a weighted sum; a single folder is scaled by its weight."""
    return _combined(folders, weights or [1.0] * len(folders), output, missing)


def average(folders: Folders, output: Output, weights: Weights = None, missing: Missing = "refuse") -> Result:
    """The mean, or with --weights the weighted mean."""
    _several(folders, "average")
    weights = weights or [1.0] * len(folders)
    if len(weights) == len(folders) and sum(weights) == 0:
        raise VectorError(f"--weights {weights} add up to 0, so they have no mean. Change one of them.")
    return _combined(folders, [weight / sum(weights) for weight in weights], output, missing)


def subtract(folders: Folders, output: Output, missing: Missing = "refuse") -> Result:
    """The first vector minus the others."""
    _several(folders, "subtract")
    return _combined(folders, [1.0, *[-1.0] * (len(folders) - 1)], output, missing)


def project_out(folders: Folders, output: Output, missing: Missing = "refuse") -> Result:
    """The first vector without its part in the span of the others."""
    _several(folders, "project-out")
    sets = _read(folders)
    made = arithmetic.project_out(sets[0], sets[1:], missing, output.name)
    formula = f"{sets[0].name} without the span of {', '.join(one.name for one in sets[1:])}"
    return _saved(made, output, formula, sets, folders)


def orthogonalise(folders: Folders, output: Output, missing: Missing = "refuse") -> Result:
    """Remove from each vector the directions of those before it (most important first); --output gets a folder for
    each."""
    _several(folders, "orthogonalise")
    sets = _read(folders)
    if output.exists():
        raise VectorError(f"{output} exists already. Choose a new folder.")
    saved = []
    for i, made in enumerate(arithmetic.orthogonalise(sets, missing)):
        before = ", ".join(one.name for one in sets[:i])
        formula = f"{made.name} without the span of {before}" if before else f"{made.name}, as it was"
        saved.append(_saved(made, output / made.name, formula, sets[: i + 1], folders[: i + 1]))
    return Result({"adapters": [one.data for one in saved]}, "\n\n".join(one.text for one in saved))


def similarity(folders: Folders) -> Result:
    """The cosine of every pair of vectors, layer by layer."""
    _several(folders, "similarity")
    sets = _read(folders)
    cosines = arithmetic.similarity(sets)
    names = [one.name for one in sets]
    lines = []
    for layer, matrix in cosines.items():
        lines += [f"layer {layer}", ""]
        lines += ["| | " + " | ".join(names) + " | length |", "|---" * (len(names) + 2) + "|"]
        for one, row in zip(sets, matrix.tolist(), strict=True):
            length = float(one.vectors[layer].norm()) if layer in one.vectors else 0.0
            values = ["-" if value != value else f"{value:+.3f}" for value in row]
            lines.append(f"| {one.name} | " + " | ".join(values) + f" | {length:.4g} |")
        lines.append("")
    plain = {layer: [[None if v != v else v for v in row] for row in m.tolist()] for layer, m in cosines.items()}
    return Result({"names": names, "cosines": plain}, "\n".join(lines).rstrip())


def together(
    folders: Folders,
    data: Annotated[tuple[str, str], Option(help="pairs of the first vector, and of the second")],
    strengths: Annotated[tuple[float, float], Option(help="strength of each")] = (1.0, 1.0),
    columns: ColumnNames = None,
    rows: Annotated[int | None, Count("test pairs of each (40, or as many as there are)")] = None,
    model: Annotated[str | None, Option(help="embedded, a local folder or a Hub name (the adapters' own)")] = None,
    threads: Threads = None,
) -> Result:
    """Measure each vector alone and both together, on the data of both."""
    from steertune.recipes.ablation.two_vectors import measure, summarise

    if len(folders) != 2:
        raise VectorError(f"together needs two folders, one vector for each data set (got {len(folders)}).")
    result = measure(folders, data, strengths, rows, model, threads, columns_of(columns))
    return Result(result, summarise(result))


main = group(add, average, subtract, project_out, orthogonalise, similarity, together)


def _several(folders: Sequence[Path], name: str) -> None:
    """Raise an ArmError for a single folder."""
    if len(folders) < 2:
        raise VectorError(f"{name} needs two folders or more (got {len(folders)}).")


def _combined(folders: Sequence[Path], weights: list[float], output: Path, missing: Missing) -> Result:
    """Save a weighted sum."""
    sets = _read(folders)
    made = arithmetic.combine(sets, weights, missing, output.name)
    formula = " + ".join(f"{weight:g} × {one.name}" for weight, one in zip(weights, sets, strict=True))
    return _saved(made, output, formula, sets, folders)


def _saved(made: Vectors, folder: Path, formula: str, sets: Sequence[Vectors], parents: Sequence[Path]) -> Result:
    """Write an adapter with its card, and return the lengths of its vectors."""
    arithmetic.write(made, folder, _card(made, formula, sets))
    # rows that a parent was trained on are not held out for the result
    rows_of_parents = [trained_on.read(parent) for parent in parents]
    if None not in rows_of_parents:
        trained_on.write(folder, [rows for of_parent in rows_of_parents for rows in of_parent or ()])
    write_description(folder)
    lengths = {layer: float(made.vectors[layer].norm()) for layer in made.layers}
    before = {one.name: {layer: float(one.vectors[layer].norm()) for layer in one.layers} for one in sets}
    table = [f"layer {layer}: length {length:.4g}" for layer, length in lengths.items()]
    data = {"folder": str(folder), "formula": formula, "lengths": lengths, "lengths before": before}
    return Result(data, "\n".join([f"{folder} = {formula}", *(f"  {line}" for line in table)]))


def _card(made: Vectors, formula: str, sets: Sequence[Vectors]) -> Card:
    """The card of a vector that was computed but not measured."""
    parents = [f"- `{one.name}`, weights with SHA-256 `{one.sha256}`" for one in sets]
    return Card(
        title=made.name,
        behaviour=f"Computed as {formula}. Its effect was not measured: a sum of vectors need not do what each one "
        "does.",
        data="None of its own; the adapters it was made of have theirs.",
        made="\n".join([f"`{formula}`, layer by layer, of", "", *parents]),
        advice="Layers are those of the adapters it was made of. Measure strengths again: "
        "`steertune vectors together`, or held-out pairs of yours.",
    )


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
