"""The tables of an arm's file: their keys, types and defaults, without slow imports.

The text under a field is its help in `steertune train --help`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

PathName = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
"""A path or a Hub name: not empty, and without NUL, which no file system allows."""


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_regular_expression)]
"""A regular expression."""
LARGEST = 2**31 - 1
"""The largest count: larger ones overflow inside libraries."""
LARGEST_STRENGTH = 1e6
"""The largest strength that can be set before there is a vector; useful strengths are mostly below 100."""
Strength = Annotated[float, Field(ge=-LARGEST_STRENGTH, le=LARGEST_STRENGTH, allow_inf_nan=False)]
"""How much of a vector is added: 1 as trained, 0 the base model, negative the opposite."""


def _each_once(values: list[float]) -> list[float]:
    if repeated := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{repeated[0]:g} occurs twice. Give each value once")
    return values


Strengths = Annotated[list[Strength], AfterValidator(_each_once)]
"""Strengths at which something is measured."""

Part = Literal["prompt", "chosen", "rejected", "completion"]
Columns = Mapping[Part, str]
"""Where each part of an example comes from: the name of a column, or a text with `{column}` for its value."""


class Table(BaseModel):
    """A table of a TOML file. Unknown keys and values of the wrong type are errors: `"8"` is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class ModelTable(Table):
    """`[model]`: the base model."""

    name: PathName = "embedded"
    """`embedded`, a Hub name, or a local folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    revision: Annotated[str, Field(pattern=r"^[\w+-][\w./+-]*$")] | None = None
    """Branch, tag or commit of a Hub model."""
    threads: int | None = Field(default=None, ge=1, le=LARGEST)
    """CPU threads, like `--threads`."""

    @model_validator(mode="after")
    def _has_revisions(self) -> ModelTable:
        if self.revision is None:
            return self
        if self.name == "embedded" or Path(self.name).is_dir():
            where = f"revision={self.revision!r}: {self.name!r}"
            raise ValueError(f"{where} is not a Hub name, so it has no revisions. Remove it")
        if ".." in self.revision.split("/"):  # the Hub's cache makes a file of this name
            raise ValueError(f"revision={self.revision!r} must be a branch, a tag or a commit")
        return self


class DataTable(Table):
    """`[data]`: the examples."""

    name: PathName
    """An embedded task, a Hub name, or a local file or folder (json, jsonl, csv, parquet). A single file is divided: a
    fifth of its rows, at least 8, is held out."""
    columns: dict[Part, str] = {}
    """Column of each part: prompt, chosen, rejected, completion; or a text with `{column}`. Recognised by default."""
    format: Literal["auto", "conversation", "text"] = "auto"
    """What texts become: messages, or plain text. `auto`: messages if the model has a chat template; texts of the
    columns prompt, chosen, rejected and completion stay text if white space separates prompt and answer."""
    train: int = Field(default=32, ge=1, le=LARGEST)
    """Number of training examples; for a single file, at most as many as it has."""
    test: int = Field(default=40, ge=1, le=LARGEST)
    """Number of test examples; for a single file, at most as many as it has."""
    near_duplicates: float = Field(default=0.8, gt=0, le=1)
    """Prompts with at least this similarity must not be in both training and test data; 1: only the same words."""
    drop_near_duplicates: bool = False
    """Drop training examples that resemble a test example, instead of raising an error."""
    train_split: PathName = "train"
    """Split that training examples are drawn from."""
    test_split: PathName = "test"
    """Split that test examples are taken from."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed for drawing training examples, and for training."""
    pairing: Literal["own", "shuffled"] = "own"
    """`shuffled`: every training prompt gets the rejected answer of another prompt."""
    times: int = Field(default=1, ge=1)
    """Multiplies the number of training examples: without rejected answers, two examples are as long as one pair."""


class EvaluationTable(Table):
    """`[evaluation]`: what is measured for the page at the end."""

    strengths: Strengths = [-1.0, 0.0, 0.5, 1.0, 2.0]
    """Strengths at which test pairs are evaluated."""
    generations: int = Field(default=3, ge=0, le=LARGEST)
    """Number of test prompts that are answered."""
    new_tokens: int = Field(default=40, ge=1, le=LARGEST)
    """Maximum length of an answer, in tokens."""
    batch_size: int = Field(default=8, ge=1, le=LARGEST)
    """Number of answers in a batch."""


class OutputTable(Table):
    """`[output]`: where the run is saved."""

    folder: PathName | None = None
    """Folder of the run; by default `runs/ARM-TASK`."""


class CardTable(Table):
    """`[card]`: the parts of the adapter's model card that cannot be measured."""

    behaviour: str | None = None
    """What the adapter makes the model do, and on what."""
    problem: str | None = None
    """The question it was made for, its baselines, and what would count against it."""
    safety: str | None = None
    """What to check before others use it, in addition to what every card says."""


class ArmTables(Table):
    """The tables of an arm, without its ingredients (`lab/ingredients/`)."""

    name: str
    """Name of the arm; by default that of its file."""
    model: ModelTable = ModelTable()
    data: DataTable
    adapter: dict[str, Any] = {"type": "steering_vector"}
    """`type` is a PEFT method in lower case, or `none` for full finetuning; the other keys are that method's."""
    loss: dict[str, Any] = {"name": "dpo"}
    """`name` is a file of `losses/`, or `upstream` for TRL's own loss; the other keys are that loss's."""
    trainer: dict[str, Any] = {}
    """Any field of TRL's `DPOConfig` (pairs) or `SFTConfig` (demonstrations)."""
    evaluation: EvaluationTable = EvaluationTable()
    output: OutputTable = OutputTable()
    card: CardTable = CardTable()
