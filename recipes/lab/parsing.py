"""Typer's classes for parsing command lines and writing help, adapted to the recipes.

An option can take several values in a row (`--layers 8 12`), the command of an arm takes every `--table.key value`,
and help shows a docstring as it is written.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand, TyperGroup

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.keys import Key, arm_keys, meant, split_overrides
from steertune.recipes.lab.secrets import holds_secret, masked

SETTINGS: dict[str, Any] = {"max_content_width": 119, "help_option_names": ["-h", "--help"]}


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
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, made in self.commands.items():
            panels.setdefault(getattr(made, "rich_help_panel", None) or "Commands", []).append((name, made.help or ""))
        for panel, lines in sorted(panels.items()):
            with formatter.section(panel):
                formatter.write_dl(lines)


class PlainCommand(_Plain, TyperCommand):
    """A command whose options take several values in a row, and whose errors suggest the nearest option."""

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
        """The end of an error message that suggests what a wrong name was meant to be."""
        near = get_close_matches(name, names, n=1)
        return f" Did you mean {near[0]}?" if near else " --help lists them."


class ArmCommand(PlainCommand):
    """A `PlainCommand` that also has every key of an arm as an option."""

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
        option = get_close_matches(name, [n for n in names if "." not in n], n=1, cutoff=0.75)
        return f" Did you mean --{key}?" if key and not option else super().hint(name, names)


def check_words(words: Sequence[str]) -> None:
    """Refuse a command line that contains a secret, since recipes save it.

    Raises:
        ArmError: a word contains a secret.
    """
    for word in words:
        if holds_secret(word):
            raise ArmError(
                f"{masked(word)}: a secret on the command line is written into files. Put it into an environment "
                "variable; Hugging Face reads HF_TOKEN."
            )


def spread(words: Sequence[str], several: set[str]) -> list[str]:
    """Repeat an option that takes several values before each of them: `--layers 8 12` becomes `--layers 8 --layers
    12`. Negative numbers are values, not options."""
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


def as_option(key: Key) -> Any:
    """A key as an option for the help; its value is parsed with the other overrides."""
    headings = {
        "trainer": "trainer: TRL's DPOConfig and SFTConfig, with their defaults; an arm's file can set others",
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
    """The first sentences of a text, as many as fit in a length."""
    sentences = re.split(r"(?<=[.!?]) (?=[A-Z`])", text)
    short = sentences[0]
    for sentence in sentences[1:]:
        if len(short) + len(sentence) > length:
            break
        short += f" {sentence}"
    return short
