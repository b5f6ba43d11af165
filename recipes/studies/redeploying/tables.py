"""The tables of a study: organisms, numbers of catches, arms, claim and card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from steertune.recipes.lab.arm import Arm, load_arm
from steertune.recipes.lab.files import ArmError, nearest, read_toml, reasons
from steertune.recipes.lab.tables import Table
from steertune.recipes.studies.organisms.dialogues import Split

HERE = Path(__file__).parent
NOTHING = "nothing"
"""The arm that is not trained: the organism as it is."""


class Fix(Table):
    """One arm: the name of an arm's file, what is changed in it, and whether it is trained."""

    arm: str
    change: list[str] = []
    untrained: bool = False


class Claim(Table):
    """What the study decides: `better` has a lower bad rate than `than` in a split, by more than the margin."""

    better: str
    than: str
    split: Split
    margin: float = Field(ge=0)
    harm: float = Field(ge=0)
    most_catches: int = Field(ge=1)


class Monitors(Table):
    """How monitors are made."""

    methods: list[str]
    poolings: list[str]
    innocent: list[int]


class Study(Table):
    """The whole file."""

    name: str
    organisms: list[int] = Field(min_length=1)
    catches: list[int] = Field(min_length=1)
    kl: float = Field(gt=0)
    largest: float = Field(gt=0)
    tested: int = Field(ge=1)
    innocent: int = Field(ge=1)
    off_policy: int = Field(ge=4)
    card: dict[Literal["problem", "hypothesis", "against", "baselines", "limits"], str]
    claim: Claim
    trainer: dict[str, Any]
    arms: dict[str, Fix]
    monitors: Monitors

    @model_validator(mode="after")
    def _claims_arms_of_its_own(self) -> Study:
        for arm in (self.claim.better, self.claim.than):
            if arm not in self.arms:
                raise ValueError(f"the claim names {arm!r}, which is not an arm.{nearest(arm, [*self.arms])}")
        if max(self.catches) > 16 or min(self.catches) < 1:
            raise ValueError(f"catches={self.catches} must be 1 to 16, since an organism comes with 16 catches")
        return self

    def arm_of(self, name: str, model: str, seed: int) -> Arm:
        """The arm of that name, with the study's budget.

        Raises:
            ArmError: there is no such file, or a key is wrong.
        """
        fix = self.arms[name]
        budget = {"max_steps": 0} if fix.untrained else self.trainer
        words = [*fix.change, "--model.name", model, "--data.name", "caught", "--data.seed", str(seed)]
        for key, value in budget.items():
            words += [f"--trainer.{key}", str(value)]
        return load_arm(fix.arm, words)


def read_study(name: str) -> Study:
    """A study by the name of a file in this folder, or by its path.

    Raises:
        ArmError: there is no such file, or a value in it is wrong.
    """
    file = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    if not file.is_file():
        names = sorted(one.stem for one in HERE.glob("*.toml"))
        raise ArmError(f"There is no study {name!r}. Choose one of {names}, or a .toml file.{nearest(name, names)}")
    try:
        return Study.model_validate(read_toml(file), strict=False)
    except ValidationError as error:
        raise ArmError(f"{file}: {reasons(error)}") from error
