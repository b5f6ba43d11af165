"""A measure and an ingredient are one file each, which works in every recipe and on every page."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import tiny_data
from tiny_grids import make_tables

from steertune.recipes import ablate, distill, sweep, train
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.lab import ingredients, measures
from steertune.recipes.lab.arm import load_arm, make_arm
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.rows import Record

MEASURES = {
    "confidence": '''
"""How far apart the answers of a pair are, whichever is ahead."""

import numpy as np

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("confidence in held-out pairs", unit="nats", needs=["pairs"])
def confidence(seen: Seen) -> Array:
    """`|margin|`, `(pairs,)`."""
    return np.abs(seen["margin"])
''',
    "entropy": '''
"""How undecided the model is about the first token of an answer."""

import torch

from steertune.recipes.lab.measures import Array, Seen, measure


@torch.no_grad()
def look(model, held_out):
    texts = ["the cat" for _ in held_out.neutral]
    ids = held_out.tokenizer(texts, return_tensors="pt")["input_ids"]
    return torch.distributions.Categorical(logits=model(input_ids=ids).logits[:, -1]).entropy().tolist()


@measure("entropy of the next token", unit="nats", observe=look)
def entropy(seen: Seen) -> Array:
    """`(neutral rows,)`."""
    return seen["entropy"]
''',
}
LABEL_NOISE = '''
"""Some examples are learned the wrong way round."""

from typing import ClassVar

from datasets import Dataset
from pydantic import Field

from steertune.recipes.lab.ingredients import Ingredient, Training


class LabelNoise(Ingredient):
    """`[label_noise]`: a share of the pairs have their answers swapped, or of demonstrations those of others."""

    order: ClassVar[int] = 5
    trained: ClassVar[list[tuple[str, int]]] = []

    share: float = Field(default=0.0, ge=0, le=1)

    def apply(self, training: Training) -> None:
        rows = training.rows.to_list()
        swapped = rows[: round(self.share * len(rows))]
        for row, other in zip(swapped, [*swapped[1:], *swapped[:1]], strict=True):
            if "chosen" in row:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            else:
                row["completion"] = other["completion"]
        training.rows = Dataset.from_list(rows)
        training.notes["label_noise"] = f"{len(swapped)} of {len(rows)} examples are wrong."
        self.trained.append((training.arm.name, len(swapped)))
'''
ARM = """
[data]
name = "{task}"
[adapter]
type = "steering_vector"
layers = 1
[loss]
name = "dpo"
[trainer]
max_steps = 4
per_device_train_batch_size = 4
learning_rate = 0.3
[label_noise]
share = {share}
"""


@pytest.fixture(autouse=True)
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The new files, in a folder beside those that are there; gives the ingredient's class."""
    for package, files in ((measures, MEASURES), (ingredients, {"label_noise": LABEL_NOISE})):
        folder = tmp_path / package.__name__.rpartition(".")[2]
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text.lstrip())
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    caches = (measures.names, measures.get, ingredients.kinds)
    for cached in caches:
        cached.cache_clear()
    importlib.invalidate_caches()
    yield ingredients.kinds()["label_noise"]
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()
    for module in ("measures.confidence", "measures.entropy", "ingredients.label_noise"):
        sys.modules.pop(f"steertune.recipes.lab.{module}", None)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A tiny model, a task, and two arms that differ in the ingredient alone."""
    tiny_data.save_model(tmp_path / "model", max_position_embeddings=512, vocab_size=22)
    task = tiny_data.save_task(tmp_path / "pairs", **tiny_data.cats_and_dogs())
    for name, share in (("clean", 0), ("wrong", 1)):
        (tmp_path / f"{name}.toml").write_text(ARM.format(task=task, share=share))
    return tmp_path


def overrides(home: Path, run: str, **more: object) -> list[str]:
    options = {
        "model.name": home / "model",
        "model.threads": 1,
        "data.train": 8,
        "data.test": 8,
        "evaluation.new_tokens": 4,
        "evaluation.strengths": "[1.0]",
        "output.folder": home / run,
        **more,
    }
    return [f"--{key}={value}" for key, value in options.items()]


def assert_measured(record: Record, page: Path, strength: float | str = 1) -> None:
    """The new measures are in the record and on the page."""
    for name in MEASURES:
        assert record.value(name, strength) > 0 and record.value(name) > 0
        assert measures.get(name).title in page.read_text()


def test_in_train(home, added):
    records = {}
    for name in ("clean", "wrong"):
        assert train.main([str(home / f"{name}.toml"), *overrides(home, name)]) == 0
        records[name] = Record.read(home / name / "result.json")
        assert_measured(records[name], home / name / "page.md")
    assert added.trained == [("clean", 0), ("wrong", 8)]
    assert records["clean"].value("margin_gain", 1) > 0 > records["wrong"].value("margin_gain", 1)
    assert "8 of 8 examples are wrong." in (home / "wrong" / "page.md").read_text()


def test_in_a_sweep(home, added):
    words = [home / "pairs", "--model", home / "model", "--train", 8, "--validation", 8, "--test", 8, "--layers", 1, 2,
             "--strengths", 1, "--generations", 0, "--folder", home / "run", "--arm", home / "wrong.toml"]  # fmt: skip
    assert sweep.main([str(word) for word in words]) == 0
    assert added.trained == [("wrong", 8), ("wrong", 8)]
    result = json.loads((home / "run" / "result.json").read_text())
    for record in (Record.from_json(one, home) for one in result["records"]):
        assert record.value("margin_gain", 1) < 0
        assert_measured(record, home / "run" / "page.md")


def test_in_distill(home, added):
    file = home / "distilled.toml"
    file.write_text('extends = "vector_distillation"\n[label_noise]\nshare = 1\n[views.good]\ntext = "you stay now "')
    more = {"data.name": home / "pairs", "trainer.max_steps": 2}
    assert distill.main([str(file), *overrides(home, "run", **more)]) == 0
    record = Record.read(home / "run" / "result.json")
    assert added.trained == [("distilled", record.facts["train_prompts"])]
    assert_measured(record, home / "run" / "page.md")


def test_in_a_grid(home, added, tmp_path_factory):
    tables = make_tables(tmp_path_factory.mktemp("grid"))
    del tables["factors"], tables["base"]
    tables |= {
        "arms": [str(home / "clean.toml"), str(home / "wrong.toml")],
        "design": {"kind": "arms"},
        "claim": {"better": "clean", "than": "wrong", "measure": "confidence", "strength": "tuned"},
        "seeds": [0],
        "budget": {"trials": 1, "steps": [2]},
    }
    grid = make_grid(tables)
    cells = {cell.arm.name: cell for cell in grid.cells()}
    assert ablate.run([*cells.values()], Context(grid), home / "grid", show=False) == []
    records = {name: Record.read(home / "grid" / cell.path / "cell.json") for name, cell in cells.items()}
    for record in records.values():
        for name in MEASURES:
            assert record.value(name, "tuned") > 0
    assert records["wrong"].facts["notes"] == {"label_noise": "4 of 4 examples are wrong."}
    assert cells["clean"].key != cells["wrong"].key
    kept = cells["clean"].key
    (home / "clean.toml").write_text((home / "clean.toml").read_text().partition("[label_noise]")[0])
    assert {cell.key for cell in make_grid(tables).cells() if cell.arm.name == "clean"} == {kept}, "a default is none"


def test_an_ingredient_says_who_cannot_honour_it(home, added, monkeypatch):
    monkeypatch.setattr(added, "refused_by", {"train": "labels are right there."})
    with pytest.raises(ArmError, match=r"Arm 'wrong' has a table \[label_noise\]: labels are right there"):
        load_arm(home / "wrong.toml", recipe="train")
    load_arm(home / "clean.toml", recipe="train")
    load_arm(home / "wrong.toml", recipe="sweep")
    with pytest.raises(ArmError, match="share"):
        make_arm({"name": "a", "data": {"name": "warm_tone"}, "label_noise": {"share": 2}})
