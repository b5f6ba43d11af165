"""The request of a sweep, checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from steertune.adapters.types import Site
from steertune.recipes.lab.arm import Arm, load_arm, make_arm
from steertune.recipes.lab.files import ArmError, read_result
from steertune.recipes.lab.ingredients import check_recipe
from steertune.recipes.lab.limits import Limits
from steertune.recipes.lab.splits import SplitTable
from steertune.recipes.lab.tables import ModelTable, Part, Strength

SCALABLE = ("steering_vector", "lora")


class SweepTable(BaseModel, extra="forbid", strict=True):
    """The whole request, saved as `config.json` in the sweep's folder."""

    task: str
    columns: dict[Part, str] = {}
    format: Literal["auto", "conversation", "text"] = "auto"
    model: ModelTable
    direction: str | None = None
    """A file of `adapters/directions/`; None if an arm is trained."""
    arm: Arm | None = None
    """The arm that is trained at every layer; None for a direction."""
    layers: list[int] = Field(min_length=1)
    sites: list[Site] = Field(min_length=1)
    strengths: list[Strength] = Field(min_length=1)
    train: int = Field(ge=1)
    splits: SplitTable
    seed: int = Field(default=0, ge=0, lt=2**32)
    scorer: dict[str, Any] | None = None
    """How the behaviour of generated answers is scored; None if it is not."""
    generations: int = Field(ge=0)
    """How many neutral prompts are answered to measure repetition and, with a scorer, how many of the task's."""
    new_tokens: int = Field(ge=1)
    limits: Limits = Limits()

    @field_validator("strengths")
    @classmethod
    def _strengths(cls, values: list[float]) -> list[float]:
        if 0 in values:
            raise ValueError(f"{values}: 0 is the base model, which is always measured. Leave it out")
        return sorted(set(values))

    @property
    def what(self) -> str:
        """A description of what is swept."""
        return f"the direction `{self.direction}`" if self.arm is None else f"the arm `{self.arm.name}`"


def read_arm(name: str, overrides: list[str]) -> Arm:
    """The arm of this name, of a TOML file, or of a folder that `train` wrote (or the adapter folder in it).

    Raises:
        ArmError: it does not exist, has no strength, or cannot be placed at a layer.
    """
    folder = Path(name)
    if folder.is_dir():
        if overrides:
            raise ArmError(f"{name} is a folder, whose arm is used as it was trained. Remove {overrides}.")
        file = next((f for f in (folder / "config.json", folder.parent / "config.json") if f.is_file()), None)
        tables = None if file is None else read_result(file, "Train the arm again.")
        if tables is None or "adapter" not in tables:
            raise ArmError(
                f"{name} does not say how it was trained: there is no config.json of a training run in it or beside "
                "it. Give the arm itself, or a direction."
            )
        arm = make_arm(tables)
        check_recipe(arm, "sweep")
    else:
        arm = load_arm(name, overrides, recipe="sweep")
    kind = arm.adapter.get("type", "steering_vector")
    if kind not in SCALABLE:
        raise ArmError(f"Arm {arm.name!r} (adapter {kind!r}) has no strength to sweep. Use {' or '.join(SCALABLE)}.")
    return arm


def at(arm: Arm, site: Site, layer: int) -> Arm:
    """The arm with its adapter at one place.

    Raises:
        ArmError: a LoRA is placed at another site than `block`.
    """
    if arm.adapter.get("type", "steering_vector") == "lora":
        if site != "block":
            raise ArmError(f"--sites {site}: a LoRA changes the matrices of a block. Leave --sites out.")
        place: dict[str, Any] = {"layers_to_transform": [layer]}
    else:
        place = {"layers": layer, "site": site}
    return arm.model_copy(update={"adapter": {**arm.adapter, **place}})
