"""How the behaviour of a task is recognised: the file `behaviour.toml` in its folder.

[scorer]                                  # scores generated answers by default
kind = "rule"
pattern = '\\?\\s*$'

[opposites]                               # instructions for the scorer `logprob` and the measure `instructed_loss`
positive = "End your answer with a question."
negative = "Do not ask anything in your answer."

[undo]                                    # removes the behaviour from a text, if a rule can (`undone_loss`)
pattern = '\\s*[^.!?]*\\?\\s*$'
replacement = ""
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from steertune.recipes.lab.embedded import task_folder
from steertune.recipes.lab.files import ArmError, read_toml, reasons
from steertune.recipes.lab.tables import Pattern


class Opposites(BaseModel, extra="forbid", strict=True):
    """`[opposites]`: an instruction that asks for the behaviour, and one that asks for its opposite."""

    positive: str = Field(min_length=1)
    negative: str = Field(min_length=1)


class Undo(BaseModel, extra="forbid", strict=True):
    """`[undo]`: a substitution."""

    pattern: Pattern = Field(min_length=1)
    """A case-insensitive regular expression; every match is replaced."""
    replacement: str = ""

    def apply(self, text: str) -> str:
        """The text without the behaviour."""
        return re.sub(self.pattern, self.replacement, text, flags=re.IGNORECASE).strip()


class Behaviour(BaseModel, extra="forbid", strict=True):
    """The whole file. A task without one has no rule, no opposite instructions, and nothing to undo."""

    scorer: dict[str, Any] | None = None
    opposites: Opposites | None = None
    undo: Undo | None = None

    def scorer_table(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """A scorer's table, completed with the task's defaults: its scorer, its pattern for `rule`, and its opposite
        instructions for `logprob`. The default is a classifier."""
        given = dict(table) or self.scorer or {"kind": "classifier"}
        defaults: dict[str, Any] = {}
        if self.scorer is not None and self.scorer.get("kind") == given.get("kind"):
            defaults = self.scorer
        elif self.opposites is not None and given.get("kind") == "logprob":
            defaults = self.opposites.model_dump()
        return {**defaults, **given}


def read_behaviour(task: str) -> Behaviour:
    """The `behaviour.toml` of an embedded task or of a task's folder; an empty one if the file does not exist.

    Raises:
        ArmError: the file has unknown keys or values of the wrong type.
    """
    file = task_folder(task) / "behaviour.toml"
    if not file.is_file():
        return Behaviour()
    try:
        return Behaviour(**read_toml(file))
    except ValidationError as error:
        raise ArmError(f"{file}: {reasons(error)}") from error
