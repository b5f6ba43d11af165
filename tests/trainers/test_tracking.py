"""`report_to`: every tracker gets the metrics that the log has."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import tiny_data
from transformers.integrations.integration_utils import rewrite_logs

from steertune.adapters import SteeringVectorConfig

OURS = {"train/pair_accuracy", "train/margin", "train/margin_gain", "train/vector/norm", "train/loss"}
OURS |= {"train/vector/share_of_residual", "train/vector/cos_mean_difference"}


def trained(folder, tracker: str):
    return tiny_data.trained(
        "dpo",
        folder,
        loss="dpo",
        peft_config=SteeringVectorConfig(layers=2),
        report_to=tracker,
        eval_dataset=tiny_data.pairs(4, seed=1),
        eval_strategy="steps",
        eval_steps=3,
        run_name="mine",
    )


def logged(trainer) -> dict[tuple[str, int], float]:
    """What the log holds, as transformers' trackers call it."""
    found = {}
    for entry in trainer.state.log_history:
        numbers = {k: v for k, v in entry.items() if k != "step"}
        found |= {(name, entry["step"]): v for name, v in rewrite_logs(numbers).items()}
    return found


def check(trainer, seen: dict[tuple[str, int], float]) -> None:
    expected = logged(trainer)
    for name in OURS | {"eval/margin", "eval/pair_accuracy", "eval/loss"}:
        values = {key: value for key, value in expected.items() if key[0] == name}
        assert values and {key: seen.get(key) for key in values} == pytest.approx(values, rel=1e-5), name


def test_tensorboard(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trained(tmp_path / "out", "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    names = events.Tags()["scalars"]
    check(trainer, {(name, event.step): event.value for name in names for event in events.Scalars(name)})


class Tracker(types.ModuleType):
    """What transformers' callbacks call of `wandb` and `trackio`: init, config, log, finish."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__, self.__version__ = ModuleSpec(name, None), "99.0"
        self.run, self.config, self.logged = None, _Config(), []
        self.context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))

    def init(self, **options):
        self.options = options
        self.run = types.SimpleNamespace(
            _label=lambda **_: None, id="1", name="mine", url="", summary={}, log_artifact=lambda *_, **__: None
        )
        return self.run

    def log(self, values, **_):
        self.logged.append(values)

    def finish(self, **_):
        self.run = None

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _Config(dict):
    def update(self, values, **_):
        super().update(values)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio(name, tmp_path, monkeypatch):
    """Their packages want a server or a login: transformers' callbacks write into a stand-in of their interface."""
    tracker = Tracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    error = types.SimpleNamespace(ConfigError=ValueError)  # the one name that transformers imports from inside wandb
    for inner in ("sdk", "sdk.lib", "sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, f"{name}.{inner}", error)
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: True)
    monkeypatch.setenv("WANDB_LOG_MODEL", "false")
    trainer = trained(tmp_path / "out", name)
    seen = {}
    for values in tracker.logged:
        step = values.get("train/global_step")
        seen |= {(key, step): value for key, value in values.items() if step is not None}
    check(trainer, seen)
    assert "learning_rate" in tracker.config
