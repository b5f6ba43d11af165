"""Reinforcement learning with vectors on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reinforcement_cases
from launching import launch
from tiny_models import steered, tiny

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    steered(tiny(), layers=1).save_pretrained(str(tmp_path / "vector"))
    return tmp_path


def test_processes_share_the_groups_and_train_one_vector(folder):
    done = launch("cpu_ddp", reinforcement_cases.__file__, str(folder), "grpo", "rloo")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(next(folder.glob(f"*-{rank}.json")).read_text()) for rank in (0, 1))
    for kind in ("grpo", "rloo"):
        assert first[kind]["vector"] == second[kind]["vector"] and any(first[kind]["vector"]), kind
        assert first[kind]["rewards"] == second[kind]["rewards"] and len(first[kind]["rewards"]) == 2
    # two of a group's four completions are on each process, and each strength draws two of the four
    assert first["grpo"]["strengths"] == second["grpo"]["strengths"] == [0.0, 1.0] * 2


def test_sharded_weights_are_refused_by_name(folder):
    pytest.importorskip("deepspeed")
    done = launch("cpu_zero3", reinforcement_cases.__file__, str(folder), "grpo")
    assert done.returncode == 0, done.stderr[-3000:]
    for file in folder.glob("*.json"):
        assert "FSDP and ZeRO-3 shard" in json.loads(file.read_text())["grpo"]["refused"]
    assert len([*folder.glob("*.json")]) == 2
