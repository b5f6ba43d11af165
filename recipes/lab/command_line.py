"""The command line of a recipe, made from the signature of a function.

    @command
    def main(folder: Annotated[Path, Argument(help="adapter folder")], threads: Threads = None) -> Result:
        ...
        return Result({"accuracy": 0.9}, "accuracy 0.9")

is then called with the words of a command line, `main(["my-vector", "--threads", "2"])`, and returns the exit code: 0
or that of the result, 2 for wrong input (after one line on standard error), 130 after an interrupt. Its help is the
docstring of the module. A function that returns a `Result` has `--json`. Two parameters are not options: `overrides`
takes every `--table.key value` of an arm, and `words` is the command line as it was typed.

Nothing slow is imported here, so that help, completion and errors appear at once.
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
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from typer.core import TyperCommand
from typer.main import get_command

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.keys import arm_keys
from steertune.recipes.lab.options import Choice, Count, Option, whole_number  # noqa: F401  studies.swap
from steertune.recipes.lab.parsing import SETTINGS, ArmCommand, PlainCommand, RootGroup, as_option
from steertune.recipes.lab.secrets import masked

T = TypeVar("T")
INTERRUPTED, CLOSED = 130, 141
"""A shell's exit codes for a process that was ended by SIGINT or SIGPIPE."""
_FULL = re.compile(r"os error 28|No space left|PytorchStreamWriter failed|unexpected pos")


@dataclass(frozen=True)
class Result:
    """The result of a command.

    Attributes:
        data: What `--json` prints.
        text: What is printed otherwise; empty if the command has printed it already.
        code: The exit code.
    """

    data: Any
    text: str
    code: int = 0


class Command:
    """A function as a command: called with words, it returns the exit code.

    Attributes:
        function: The function.
        name: The command's name: that of its file, or that of the function if a file has several commands.
    """

    def __init__(self, function: Callable[..., Result | int | None], name: str | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = name or Path(inspect.getfile(function)).stem

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run the command; `argv` is the command line, by default that of this process."""
        return run(self.build(), f"steertune {self.name}", sys.argv[1:] if argv is None else argv)

    def build(self, help: str | None = None) -> TyperCommand:
        """The command for typer; `help` replaces the module's docstring."""
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        takes_arm = "overrides" in inspect.signature(self.function).parameters
        text = help or self.function.__globals__["__doc__"] or ""
        app.command(self.name, cls=ArmCommand if takes_arm else PlainCommand, help=text, context_settings=SETTINGS)(
            self._callback()
        )
        made = get_command(app)
        assert isinstance(made, TyperCommand)
        return made

    def _callback(self) -> Callable[..., int]:
        """The function for typer, with the signature from which it reads the options."""
        signature = inspect.signature(self.function, eval_str=True)
        special = {"overrides", "words"} & {*signature.parameters}
        options = [p for p in signature.parameters.values() if p.name not in special]
        added: dict[str, Any] = {"context": typer.Context}
        if Result in (signature.return_annotation, *get_args(signature.return_annotation)):
            added["as_json"] = Annotated[
                bool, Option("--json", help="print the result as JSON, and everything else to standard error")
            ]
        if "overrides" in special:
            added |= {f"key_{i}": as_option(key) for i, key in enumerate(arm_keys().values())}

        def called(context: typer.Context, **given: Any) -> int:
            arguments = {parameter.name: given[parameter.name] for parameter in options}
            arguments |= {name: context.meta[name] for name in special}
            return self._guarded(arguments, given.get("as_json", False))

        kind = inspect.Parameter.KEYWORD_ONLY
        defaults = {"context": inspect.Parameter.empty, "as_json": False}
        parameters = [p.replace(kind=kind) for p in options]
        parameters += [
            inspect.Parameter(name, kind, annotation=annotation, default=defaults.get(name))
            for name, annotation in added.items()
        ]
        signed: Any = called
        signed.__signature__ = inspect.Signature(parameters, return_annotation=int)
        signed.__annotations__ = {p.name: p.annotation for p in parameters}
        return signed

    def _guarded(self, arguments: dict[str, Any], as_json: bool) -> int:
        """Call the function, print its result, and return the exit code."""
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = outcome(functools.partial(self.function, **arguments))
        if not isinstance(result, Result):
            return result or 0
        if as_json or result.text:
            print(json.dumps(result.data, indent=1) if as_json else result.text)
        return result.code


class Group:
    """Several commands of one file; the first word of the command line selects the command."""

    def __init__(self, *functions: Callable[..., Result | int | None]) -> None:
        self.functions = functions
        self.name = Path(inspect.getfile(functions[0])).stem

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run a command; `argv` is the command line, by default that of this process."""
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


command = Command
"""Turns a function into a command that is named after its file."""
group = Group
"""Turns functions of a file into subcommands of a command that is named after the file."""


def run(made: Any, called: str, words: Sequence[str]) -> int:
    """Run a typer command; if its words are wrong, print one line on standard error. `called` is the name of the
    command."""
    try:
        return made.main(args=list(words), prog_name=called, standalone_mode=False) or 0
    except typer.TyperException as error:
        message = error.format_message()
    except ArmError as error:
        message = str(error)
    print(masked(f"{called}: {message}"), file=sys.stderr)
    return 2


def outcome(function: Callable[[], T]) -> T | int:
    """Call a function and return its result. If its input is wrong, disk or memory is full, or the user interrupts it,
    print one line and return an exit code.

    With `python -X dev` wrong input ends in a traceback; internal errors always do.
    """
    try:
        return function()
    except KeyboardInterrupt:
        saved = "The same command continues where it stopped, or starts over if nothing was saved yet."
        print(f"\nInterrupted. {saved}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except Exception as error:
        advice = _advice(error)
        if sys.flags.dev_mode or advice is None:
            raise
        print(masked(f"{type(error).__name__}: {error}{advice}"), file=sys.stderr)
        return 2


def _advice(error: Exception) -> str | None:
    """A hint to add to an error that the user can fix; None for an internal error.

    Every ValueError and OSError is taken as wrong input, and so is a model that computes NaN or infinity.
    """
    if _FULL.search(str(error)):
        return " Is the disk full? Make room; the same command continues where it stopped."
    if type(error).__name__ == "OutOfMemoryError":
        return " Use fewer rows at a time, or a smaller model."
    if isinstance(error, RuntimeError):
        from steertune.trainers import NonFiniteError

        return "" if isinstance(error, NonFiniteError) else None
    return "" if isinstance(error, ValueError | OSError) else None
