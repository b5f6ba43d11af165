"""Inspect runs on a steered model in its own process, and monitors score its answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_monitors import monitor_of
from served import save_home

inspect_ai = pytest.importorskip("inspect_ai", reason="pip install inspect-ai")

from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.scorer import includes  # noqa: E402
from inspect_ai.solver import generate  # noqa: E402

from steertune.adapters import monitors  # noqa: E402
from steertune.recipes import inspect_provider  # noqa: E402
from steertune.recipes.lab.files import ArmError  # noqa: E402
from steertune.recipes.serve import Request, Server, load_vectors  # noqa: E402

PROMPT = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = save_home(tmp_path_factory.mktemp("served"))
    vectors, tokenizer = load_vectors({"warm": folder / "warm"})
    monitors.save(monitor_of(vectors.model, tokenizer), folder / "odd")
    return folder


def test_an_evaluation_at_two_strengths(home, tmp_path, monkeypatch):
    """The answers are the service's, and the scores those of the monitor."""
    monkeypatch.chdir(tmp_path)
    server = Server(*load_vectors({"warm": home / "warm"}))
    for strength in (2.0, -2.0):
        [answer] = server.answers([Request(prompt=PROMPT, vector="warm", strength=strength, new_tokens=6)])
        task = inspect_ai.Task(
            dataset=[Sample("the cat", target=answer.split()[0]), Sample("we go", target="zzz")],
            solver=generate(),
            scorer=[includes(), inspect_provider.monitor("odd")],
        )
        model = inspect_ai.model.get_model(
            "steertune/base+warm",
            strength=strength,
            vectors=f"warm={home / 'warm'}",
            monitors=f"odd={home / 'odd'}",
            memoize=False,
        )
        [log] = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none", temperature=0, max_tokens=6)
        assert log.status == "success", log.error
        assert log.samples[0].output.completion.strip() == answer
        assert [sample.scores["includes"].value for sample in log.samples] == ["C", "I"]
        for sample in log.samples:
            reading = sample.output.metadata["monitors"]["odd"]
            value = sample.scores["monitor"].value
            assert value["score"] == pytest.approx(reading["score"]) and value["flagged"] == float(reading["flagged"])


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("base+wram", {}, "Did you mean 'warm'"),
        ("base+warm", {"strength": "much"}, "finite number"),
        ("base+warm@1e38", {}, "more than the model can add"),
        ("base+warm", {"monitors": "base"}, "is not a monitor"),
        ("base+warm", {"vectors": "warm"}, "NAME=FOLDER"),
    ],
)
def test_what_is_not_there_is_said_at_once(name, options, says, home, monkeypatch):
    monkeypatch.chdir(home)
    with pytest.raises((ArmError, monitors.MonitorError), match=says):
        inspect_provider.SteeredModel(name, **{"vectors": "warm=warm", **options})
