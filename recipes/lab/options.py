"""The options that several commands share, and the kinds of options that these are built from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import typer
from typer import Argument, Option

from steertune.recipes.lab.files import ArmError, nearest
from steertune.recipes.lab.paths import CONFIGS
from steertune.recipes.lab.tables import Part

__all__ = ["LAYERS", "Argument", "ArmName", "Base", "Choice", "ColumnNames", "Count", "DType", "Device", "Layers",
           "Option", "Threads", "arm_names", "columns_of", "grid_names", "whole_number"]  # fmt: skip


def whole_number(value: str | int) -> int:
    """Parse a whole number of 1 or more. Typer also calls it with defaults."""
    text = str(value)
    # longer numbers are not parsed: Python refuses more than 4300 digits
    if not text.isascii() or not text.isdigit() or len(text) > 10 or not 1 <= int(text) <= 2**31:
        raise typer.BadParameter(f"{text!r:.80} must be a whole number of 1 or more")
    return int(text)


def Count(help: str, **settings: Any) -> Any:
    """An option that takes a whole number of 1 or more."""
    return Option(parser=whole_number, metavar="N", help=help, **settings)


def Choice(names: Sequence[str], help: str, *flags: str, **settings: Any) -> Any:
    """An option that takes one of some names."""

    def chosen(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} must be one of {', '.join(names)}.{nearest(text, names)}")
        return text

    def completions(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    metavar = settings.pop("metavar", "|".join(names))
    return Option(*flags, parser=chosen, autocompletion=completions, metavar=metavar, help=help, **settings)


Layers = Annotated[list[str], Option(help="indices, fractions of the depth, or 'all'", metavar="LAYER ...")]
"""`--layers` of commands that compare layers."""
LAYERS = ["0.1", "0.25", "0.4", "0.55", "0.7", "0.85"]
"""Its default."""
Threads = Annotated[int | None, Count("CPU threads (OMP_NUM_THREADS, else the cores that this process can use)")]
"""`--threads` of every command that computes."""
Base = Annotated[str | None, Option(help="base model: embedded, a local folder or a Hub name (the adapter's own)")]
"""`--model` of every command that loads an adapter."""
DType = Annotated[Literal["float32", "bfloat16", "float16"], Option(help="number format of the base model")]
Device = Annotated[str | None, Option(help="where the model runs (cuda if there is a GPU, else cpu)")]
ColumnNames = Annotated[
    list[str] | None,
    Option(
        help="what each part of an example is: prompt=question chosen=good rejected=bad, each the name of a column or "
        "a text with {column} (recognised)",
        metavar="PART=COLUMN ...",
    ),
]
"""`--columns` of every command that reads examples and takes no arm."""


def columns_of(words: Sequence[str] | None) -> dict[Part, str]:
    """Parse the value of `--columns`.

    Raises:
        ArmError: a word is not written as `part=column`, or names another part.
    """
    columns: dict[Part, str] = {}
    for word in words or ():
        part, equals, column = word.partition("=")
        if not equals or part not in get_args(Part):
            raise ArmError(
                f"--columns {word!r} must be written PART=COLUMN, where PART is one of {', '.join(get_args(Part))}."
                f"{nearest(part, get_args(Part))}"
            )
        if part in columns:
            raise ArmError(f"--columns names {part} twice: {columns[part]!r} and {column!r}. Name it once.")
        columns[part] = column  # pyright: ignore[reportArgumentType]
    return columns


def arm_names(incomplete: str) -> list[str]:
    """Names of the arms that are shipped, for completion."""
    return [file.stem for file in sorted((CONFIGS / "arms").glob(f"{incomplete}*.toml"))]


def grid_names(incomplete: str) -> list[str]:
    """Names of the grids that are shipped, for completion."""
    return [file.stem for file in sorted((CONFIGS / "grids").glob(f"{incomplete}*.toml"))]


ArmName = Annotated[
    str, Argument(help="a .toml file, or a name in recipes/configs/arms/", autocompletion=arm_names, metavar="ARM")
]
"""The arm that a command trains."""
