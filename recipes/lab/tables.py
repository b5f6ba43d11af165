"""The tables of an arm's file: their keys, types and defaults, without anything that takes long to import.

The text under a field is what `steertune train --help` says of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Table(BaseModel):
    """A table of a TOML file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelTable(Table):
    """`[model]`: the base model."""

    name: str = "embedded"
    """`embedded`, a Hub name, or a local folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads, as `--threads`."""


class DataTable(Table):
    """`[data]`: the examples."""

    name: str
    """An embedded task, a Hub name, or a local file or folder (json, jsonl, csv, parquet)."""
    train: int = Field(default=32, ge=1)
    """Number of training examples."""
    test: int = Field(default=40, ge=1)
    """Number of test examples."""
    train_split: str = "train"
    """Split that training examples are drawn from."""
    test_split: str = "test"
    """Split that test examples are taken from."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the draw of training examples, and of training."""
    pairing: Literal["own", "shuffled"] = "own"
    """`shuffled`: every training prompt gets the rejected answer of another prompt."""
    times: int = Field(default=1, ge=1)
    """Train on so many times as many examples: without rejected answers, two examples are as long as one pair."""


class EvaluationTable(Table):
    """`[evaluation]`: what the page at the end shows."""

    strengths: list[Annotated[float, Field(allow_inf_nan=False)]] = [-1.0, 0.0, 0.5, 1.0, 2.0]
    """Strengths at which test pairs are evaluated."""
    generations: int = Field(default=3, ge=0)
    """Number of test prompts that are answered."""
    new_tokens: int = Field(default=40, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(default=8, ge=1)
    """Answers in a batch."""


class OutputTable(Table):
    """`[output]`: where the run is kept."""

    folder: str | None = None
    """Folder of the run; left out: `runs/ARM-TASK`."""


class CardTable(Table):
    """`[card]`: what the adapter's model card says that no measurement can."""

    behaviour: str | None = None
    """What the adapter makes the model do, and on what."""
    problem: str | None = None
    """The question it was made for, its baselines, and what would count against it."""
    safety: str | None = None
    """What to check before others use it, beside what every card says."""


class ArmTables(Table):
    """The tables of an arm, but for those of its ingredients (`lab/ingredients/`)."""

    name: str
    """Name of the arm; left out: that of its file."""
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
