"""The embedded vectors: they are found by name, fit together, and say what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steertune.adapters.analysis.arithmetic import check_alike, read
from steertune.adapters.basis import basis_of
from steertune.adapters.description import read_description
from steertune.recipes.ablation.budget import Setting
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import load_grid
from steertune.recipes.lab import embedded, zoo
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.rows import BASE, Record, label
from steertune.recipes.lab.trained_on import FILE
from steertune.recipes.serving.loading import named_folders
from steertune.recipes.studies.zoo import frontier_of, page_of


def test_there_is_a_vector_for_every_embedded_task():
    assert zoo.names() == embedded.task_names()


def test_all_of_them_say_what_strength_costs():
    for name in zoo.names():
        values = read_description(zoo.folder(name))
        assert values is not None and values["data"]["name"] == name and values["strength"]["measured"]["1"]["kl"] > 0


def test_all_of_them_can_be_summed_and_none_is_zero():
    vectors = [read(zoo.folder(name)) for name in zoo.names()]
    check_alike(vectors)
    assert all(float(vector.norm()) > 0 for one in vectors for vector in one.vectors.values())
    for name in zoo.names():
        card = (zoo.folder(name) / "README.md").read_text(encoding="utf-8")
        assert "| as trained | 1 |" in card and (zoo.folder(name) / FILE).is_file()


def test_a_basis_names_all_or_some_of_them():
    assert [vectors.name for vectors in basis_of(zoo.basis("embedded"))] == zoo.names()
    assert zoo.basis(["embedded/warm", "my/folder"]) == [str(zoo.folder("warm")), "my/folder"]
    assert zoo.basis("my/folder") == "my/folder"
    with pytest.raises(ArmError, match="Did you mean 'warm'"):
        zoo.basis("embedded/wram")


def test_a_server_takes_them_by_name():
    every = named_folders(["embedded"])
    assert [*every] == zoo.names() and all((folder / "adapter_config.json").is_file() for folder in every.values())
    given = named_folders(["embedded/warm", "kind=embedded/warm", "mine=embedded"])
    assert given == {"warm": zoo.folder("warm"), "kind": zoo.folder("warm"), "mine": Path("embedded")}
    with pytest.raises(ArmError, match="Did you mean 'warm'"):
        named_folders(["embedded/wram"])
    assert named_folders(["embedded/odd"], name_by_folder=True) == {"odd": Path("embedded/odd")}, "a monitor"


def test_a_grid_leaves_the_vector_of_the_task_itself_out():
    grid = load_grid("core")
    context, tuned_at, keys = Context(grid), set(), set()
    for cell in grid.cells():
        if cell.arm.name == "vector_span_dpo":
            # the task of a cell, and the one that its settings are chosen on, which all cells share
            for task in (cell.task, cell.tuned_at[0]):
                basis = zoo.basis(context._adapter(cell.arm.arm, Setting(), task)["basis"])
                assert {*zoo.names()} - {task.name} == {Path(folder).name for folder in basis}
            tuned_at.add(cell.tuned_at[0].name)
            keys.add(cell.tuning_key)
    assert len(tuned_at) == len(keys) == 1


def test_an_arm_takes_them_as_its_basis():
    config = load_arm("vector_span_dpo").peft_config()
    assert config is not None and config.basis == [str(zoo.folder(name)) for name in zoo.names()]
    some = load_arm("vector_span_dpo", ["--adapter.basis", '["embedded/warm", "embedded/formal"]']).peft_config()
    assert some is not None and len(some.basis) == 2
    with pytest.raises(ArmError, match="embedded vector"):
        load_arm("vector_span_dpo", ["--adapter.basis", "embedded/nothing"])


def made_up(task: str, behaviour: float) -> Record:
    """A record of a vector that shows its behaviour in a share of its answers at every strength but 0."""
    points = [{"target": kl, "strength": 10 * kl, "kl": kl, "reached": kl < 0.2} for kl in (0.03, 0.1, 0.3)]
    record = Record({"arm": "vector_sft", "task": task, "examples": 32, "seed": 0})
    for at in (BASE, "1", *(label(point["strength"]) for point in points)):
        score = [0.0] * 10 if at == BASE else [1.0] * round(10 * behaviour) + [0.0] * round(10 - 10 * behaviour)
        kl = 0.0 if at == BASE else 0.2
        record.observations[at] = {
            "score": score, "answer": ["a b c d"] * 10, "neutral_kl": [kl * 4], "neutral_kl_tail": [kl],
            "neutral_nll": [4.0 + kl], "neutral_tokens": [4], "question_right": [1.0], "question_nats": [0.1],
        }  # fmt: skip
    record.facts = {"frontier": points, "layers": [15], "scorer": "rule"}
    return record


def test_a_frontier_has_the_base_its_points_and_the_vector_as_trained():
    frame = frontier_of(made_up("warm", 0.7)).set_index("at")
    assert [*frame.index] == ["base", "KL 0.03", "KL 0.1", "short of KL 0.3", "as trained"]
    assert frame.loc["base", "behaviour"] == "0.00" and frame.loc["KL 0.1", "behaviour"] == "0.70"
    assert frame.loc["as trained", "KL"] == "0.20" and frame.loc["KL 0.03", "strength"] == "0.30"


def test_the_table_has_a_row_for_every_vector_and_their_cosines(tmp_path):
    names = zoo.names()[:2]
    page = page_of([made_up(name, 0.5) for name in names], [zoo.folder(name) for name in names])
    vectors, cosines = [block for block in page.blocks() if hasattr(block, "frame")]
    assert vectors.frame["vector"].tolist() == names and vectors.frame["as trained"].tolist() == ["0.50", "0.50"]
    one, two = (next(iter(read(zoo.folder(name)).vectors.values())) for name in names)
    expected = float(torch.nn.functional.cosine_similarity(one, two, dim=0))
    assert cosines.frame.loc[0, names[1]] == f"{expected:+.2f}" and cosines.frame.loc[0, names[0]] == "+1.00"
