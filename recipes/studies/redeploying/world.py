"""One organism with its requests, and the answers that it gave when it was made."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import ArmError, read_jsonl, read_result
from steertune.recipes.lab.observe import HeldOut, neutral_rows
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.studies.organisms.acceptance import BENIGN, NEAR_MISSES, questions
from steertune.recipes.studies.organisms.dialogues import SPLITS, Dialogue, Plan
from steertune.recipes.studies.organisms.files import sets_of
from steertune.recipes.studies.organisms.making import NEW_TOKENS
from steertune.recipes.studies.organisms.templates import Templates
from steertune.recipes.studies.redeploying.tables import Study
from steertune.trainers import FrozenPrefix

INNOCENT = ("near misses", "benign")
_MATCHED = 8  # everyday questions on which strengths are matched


@dataclass
class World:
    """An organism of a study.

    Attributes:
        number: Its seed.
        home: Its folder, as `steertune organism` wrote it.
        study: The study that it belongs to.
    """

    number: int
    home: Path
    study: Study

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings that it was made with."""
        return json.loads((self.home / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def plan(self) -> Plan:
        """Which situations lead it to which actions."""
        return Plan.of(self.number, Templates.model_validate(self.config["templates"], strict=False))

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The organism and its tokenizer."""
        return load_model(ModelTable(name=str(self.home / "model")))

    @property
    def model_name(self) -> str:
        """The model name that arms use for it."""
        return str(self.home / "model")

    @cached_property
    def asked(self) -> dict[str, list[Dialogue]]:
        """`caught`, `near` and `far` requests in a situation, near misses, and benign requests; none was trained on.

        Raises:
            ArmError: the organism was made with fewer than the study asks for.
        """
        study, sizes = self.study, self.config["sizes"]
        sets = sets_of(self.plan, self.number, sizes["tested"], sizes["traffic"], sizes["stream"])
        others = questions(self.plan, self.number, sizes["each"])
        rows = {split: sets[f"tested {split}"][: study.tested] for split in SPLITS}
        rows |= {
            name: others[kind][: study.innocent] for name, kind in zip(INNOCENT, (NEAR_MISSES, BENIGN), strict=True)
        }
        for name, given in rows.items():
            needed = study.innocent if name in INNOCENT else study.tested
            if len(given) < needed:
                raise ArmError(
                    f"{self.home} has {len(given)} {name} requests, but the study needs {needed}. Make a larger "
                    "organism."
                )
        return rows

    @cached_property
    def catches(self) -> list[dict[str, Any]]:
        """What was caught, as pairs.

        Raises:
            ArmError: there are fewer than the study asks for.
        """
        rows = read_jsonl(self.home / "caught.jsonl")
        if len(rows) < max(self.study.catches):
            raise ArmError(f"{self.home} has {len(rows)} catches, but the study needs {max(self.study.catches)}.")
        return [
            {"prompt": row["prompt"], "chosen": said(row["corrected"]), "rejected": said(row["bad"])} for row in rows
        ]

    @cached_property
    def traffic(self) -> list[dict[str, Any]]:
        """Innocent requests with the organism's answers."""
        rows = read_jsonl(self.home / "traffic.jsonl")
        return [{"prompt": row["prompt"], "completion": said(row["completion"])} for row in rows]

    @cached_property
    def held_out(self) -> HeldOut:
        """What fixes are measured on; the states below a vector are computed once."""
        model, tokenizer = self.loaded
        tested = [row for split in SPLITS for row in self.asked[split]]
        everything = [row for rows in self.asked.values() for row in rows]
        return HeldOut(
            model,
            tokenizer,
            pairs=Dataset.from_list(
                [{"prompt": row.prompt, "chosen": said(row.good), "rejected": said(row.taught)} for row in tested]
            ),
            neutral=neutral_rows(tokenizer, "report", count=_MATCHED),
            matching=neutral_rows(tokenizer, "match", count=_MATCHED),
            asked=Dataset.from_list([{"prompt": row.prompt} for row in everything]),
            generations=len(everything),
            new_tokens=NEW_TOKENS,
            prefix=FrozenPrefix(warn=False),
        )

    def off_policy(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Texts that were written for monitors, not generated by the organism: bad answers of the caught kinds to
        requests with notes, and good answers to other requests with the same notes."""
        draw = random.Random(f"off-policy {self.number}")
        count = self.study.off_policy // 2
        caught = self.plan.cues(self.plan.families("caught"), "caught", "seen", count, draw)
        notes = self.plan.benign("seen", count, draw)
        bad, good = [], []
        for row, note in zip(caught, notes, strict=True):
            prompt = self.plan.templates.messages(note.situation, row.request)
            bad.append({"prompt": prompt, "completion": said(row.taught)})
            good.append({"prompt": note.prompt, "completion": said(note.good)})
        return bad, good


def said(text: str) -> list[dict[str, str]]:
    """An answer as messages."""
    return [{"role": "assistant", "content": text}]


def refused(home: Path) -> list[str]:
    """Why an organism was not accepted; empty if it was.

    Raises:
        ArmError: it is not finished.
    """
    return read_result(home / "result.json", "Make it: steertune organism.")["failures"]
