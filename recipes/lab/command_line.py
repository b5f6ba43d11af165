"""The command line of a recipe, made from the signature of a function.

    @command
    def main(folder: Annotated[Path, Argument(help="adapter folder")], threads: Threads = None) -> Result:
        ...
        return Result({"accuracy": 0.9}, "accuracy 0.9")

is then called with words, `main(["my-vector", "--threads", "2"])`, and returns the exit code: 0, that of the result, 2
for input that is wrong (one line on standard error says what), 130 after an interrupt. Its help is the docstring of
the module. A function that returns a `Result` has `--json`. Two parameters are not options: `overrides` takes every
`--table.key value` of an arm, and `words` is the command line as it was typed.

Nothing that takes long is imported here, so that help, completion and errors come at once.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer
from typer import Argument, Option
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from steertune.recipes.lab.files import ArmError, nearest
from steertune.recipes.lab.keys import Key, arm_keys, meant, split_overrides
from steertune.recipes.lab.paths import CONFIGS
from steertune.recipes.lab.secrets import holds_secret, masked
from steertune.recipes.lab.tables import Part

T = TypeVar("T")
INTERRUPTED, CLOSED = 130, 141
"""Exit codes of a shell for a process that SIGINT or SIGPIPE ended."""
_FULL = re.compile(r"os error 28|No space left|PytorchStreamWriter failed|unexpected pos")
SETTINGS: dict[str, Any] = {"max_content_width": 119, "help_option_names": ["-h", "--help"]}


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        data: What `--json` prints.
        text: What is printed otherwise; empty where the command has printed it already.
        code: The exit code.
    """

    data: Any
    text: str
    code: int = 0


def whole_number(value: str | int) -> int:
    """A number that counts something: whole, and 1 or more. Typer reads defaults with it too."""
    text = str(value)
    # more digits than a count has are not even read: Python refuses 4300
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


Threads = Annotated[int | None, Count("CPU threads (OMP_NUM_THREADS, else the cores that this process may use)")]
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
    """What `--columns` says.

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


class Command:
    """A function as a command: called with words, it returns the exit code.

    Attributes:
        function: The function.
        name: The command's name, which is that of its file; one of several in a file has the function's own.
    """

    def __init__(self, function: Callable[..., Result | int | None], name: str | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = name or Path(inspect.getfile(function)).stem

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run the command; `argv` is the command line, None: that of this process."""
        return run(self.build(), f"steertune {self.name}", sys.argv[1:] if argv is None else argv)

    def build(self, help: str | None = None) -> TyperCommand:
        """The command for typer; `help` takes the place of the module's docstring."""
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        takes_arm = "overrides" in inspect.signature(self.function).parameters
        text = help or self.function.__globals__["__doc__"] or ""
        app.command(self.name, cls=_ArmCommand if takes_arm else _Command, help=text, context_settings=SETTINGS)(
            self._callback()
        )
        made = get_command(app)
        assert isinstance(made, TyperCommand)
        return made

    def _callback(self) -> Callable[..., int]:
        """What typer calls, under the signature that it reads the options from."""
        signature = inspect.signature(self.function, eval_str=True)
        special = {"overrides", "words"} & {*signature.parameters}
        own = [p for p in signature.parameters.values() if p.name not in special]
        added: dict[str, Any] = {"context": typer.Context}
        if Result in (signature.return_annotation, *get_args(signature.return_annotation)):
            added["as_json"] = Annotated[
                bool, Option("--json", help="print the result as JSON, and all else to standard error")
            ]
        if "overrides" in special:
            added |= {f"key_{i}": _as_option(key) for i, key in enumerate(arm_keys().values())}

        def called(context: typer.Context, **given: Any) -> int:
            arguments = {parameter.name: given[parameter.name] for parameter in own}
            arguments |= {name: context.meta[name] for name in special}
            return self._guarded(arguments, given.get("as_json", False))

        kind = inspect.Parameter.KEYWORD_ONLY
        defaults = {"context": inspect.Parameter.empty, "as_json": False}
        parameters = [p.replace(kind=kind) for p in own]
        parameters += [
            inspect.Parameter(name, kind, annotation=annotation, default=defaults.get(name))
            for name, annotation in added.items()
        ]
        signed: Any = called
        signed.__signature__ = inspect.Signature(parameters, return_annotation=int)
        signed.__annotations__ = {p.name: p.annotation for p in parameters}
        return signed

    def _guarded(self, arguments: dict[str, Any], as_json: bool) -> int:
        """Call the function, print what it found, and return the exit code."""
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = outcome(functools.partial(self.function, **arguments))
        if not isinstance(result, Result):
            return result or 0
        if as_json or result.text:
            print(json.dumps(result.data, indent=1) if as_json else result.text)
        return result.code


def outcome(function: Callable[[], T]) -> T | int:
    """What a function returns; if its input is wrong, disk or memory is full, or the user interrupts it, a line says
    so and this is the exit code.

    With `python -X dev` wrong input ends in the traceback, as errors that no input should cause always do.
    """
    try:
        return function()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except Exception as error:
        advice = _advice(error)
        if sys.flags.dev_mode or advice is None:
            raise
        print(masked(f"{type(error).__name__}: {error}{advice}"), file=sys.stderr)
        return 2


def command(function: Callable[..., Result | int | None]) -> Command:
    """Make a command of a function, which is named by its file."""
    return Command(function)


class Group:
    """Several commands of one file, called with words of which the first names the command."""

    def __init__(self, functions: Sequence[Callable[..., Result | int | None]]) -> None:
        self.functions = functions
        self.name = Path(inspect.getfile(functions[0])).stem

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run a command; `argv` is the command line, None: that of this process."""
        return run(self.build(), f"steertune {self.name}", sys.argv[1:] if argv is None else argv)

    def build(self) -> Any:
        """The group for typer; the help of a command is its function's docstring."""
        app = typer.Typer(
            add_completion=False,
            rich_markup_mode=None,
            help=self.functions[0].__globals__["__doc__"],
            context_settings=SETTINGS,
        )
        app.callback(cls=RootGroup)(lambda: None)
        group: Any = get_command(app)
        for function in self.functions:
            name = function.__name__.replace("_", "-")
            group.add_command(Command(function, name).build(inspect.getdoc(function)))
        return group


def group(*functions: Callable[..., Result | int | None]) -> Group:
    """Make a command of a file whose functions are its subcommands."""
    return Group(functions)


def run(made: Any, called: str, words: Sequence[str]) -> int:
    """Run a command of typer's; what is wrong with its words is one line on standard error.

    Args:
        made: The command.
        called: What stands before its words.
        words: The command line.
    """
    try:
        return made.main(args=list(words), prog_name=called, standalone_mode=False) or 0
    except typer.TyperException as error:
        message = error.format_message()
    except ArmError as error:
        message = str(error)
    print(masked(f"{called}: {message}"), file=sys.stderr)
    return 2


class _Plain:
    """Help that shows the docstring as it is written, and options under the heading of their group."""

    def format_help_text(self: Any, ctx: Any, formatter: Any) -> None:
        formatter.write_paragraph()
        formatter.write(f"{inspect.cleandoc(self.help or '')}\n")

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=40)


class RootGroup(_Plain, TyperGroup):
    """Several commands under one name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl([(name, made.help or "") for name, made in self.commands.items()])


class _Command(_Plain, TyperCommand):
    """A command whose options take several values in a row, and which knows the name that was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["words"] = list(args)
        check_words(args)
        names = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        for word in args:
            name = word.partition("=")[0]
            if word.startswith("--") and len(word) > 2 and name not in names:
                raise typer.TyperException(f"No such option: {name}.{self.hint(name, names)}")
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        return super().parse_args(ctx, spread(args, several))

    def hint(self, name: str, names: set[str]) -> str:
        """What a wrong name was meant to be."""
        near = get_close_matches(name, names, n=1)
        return f" Did you mean {near[0]}?" if near else " --help lists them."


class _ArmCommand(_Command):
    """The same with every key of an arm as an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        check_words(args)
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts} - {f"--{k}" for k in arm_keys()}
        rest, ctx.meta["overrides"] = split_overrides(args, own)
        typed = list(args)
        parsed = super().parse_args(ctx, rest)
        ctx.meta["words"] = typed
        return parsed

    def hint(self, name: str, names: set[str]) -> str:
        key = meant(name.removeprefix("--"))
        own = get_close_matches(name, [n for n in names if "." not in n], n=1, cutoff=0.75)
        return f" Did you mean --{key}?" if key and not own else super().hint(name, names)


def check_words(words: Sequence[str]) -> None:
    """Refuse a command line that no recipe could keep: one with a secret in it.

    Raises:
        ArmError: a word holds a secret, or a byte that is not of UTF-8.
    """
    for word in words:
        if holds_secret(word):
            raise ArmError(
                f"{masked(word)}: a secret on the command line is written into files. Put it into an environment "
                "variable; Hugging Face reads HF_TOKEN."
            )


def spread(words: Sequence[str], several: set[str]) -> list[str]:
    """Words in which an option that takes several values stands before each: `--layers 8 12` is `--layers 8 --layers
    12`. Numbers below 0 are values."""
    result: list[str] = []
    option: str | None = None
    for i, word in enumerate(words):
        is_name = word.startswith("-") and not re.fullmatch(r"-[\d.].*", word)
        if is_name and word in several:
            option = word
            if i + 1 == len(words) or words[i + 1].startswith("--"):
                result.append(word)  # typer says that the value is missing
        elif is_name or option is None:
            option = None
            result.append(word)
        else:
            result += [option, word]
    return result


def _as_option(key: Key) -> Any:
    """A key as an option of the help; its value is read with all overrides."""
    headings = {
        "trainer": "trainer: TRL's DPOConfig and SFTConfig, with their defaults; an arm's file may set others",
    }
    text = f"{_short(key.text)} [{key.default}]" if key.default else _short(key.text)
    return Annotated[
        str | None,
        Option(
            f"--{key.name}",
            help=text,
            metavar=key.type,
            rich_help_panel=headings.get(key.group, key.group),
            show_default=False,
        ),
    ]


def _short(text: str, length: int = 200) -> str:
    """The first sentences of a text, as many as the length has room for."""
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z`])", text)
    short = sentences[0]
    for sentence in sentences[1:]:
        if len(short) + len(sentence) > length:
            break
        short += f" {sentence}"
    return short


def _advice(error: Exception) -> str | None:
    """What an error that the user can mend needs beside its own words; None for an error of the program.

    Wrong input explains every ValueError and OSError, and a model that computes NaN or infinity.
    """
    if _FULL.search(str(error)):
        return " Is the disk full? Make room; the same command continues where it stopped."
    if type(error).__name__ == "OutOfMemoryError":
        return " Take fewer rows at a time, or a smaller model."
    if isinstance(error, RuntimeError):
        from steertune.trainers import NonFiniteError

        return "" if isinstance(error, NonFiniteError) else None
    return "" if isinstance(error, ValueError | OSError) else None
