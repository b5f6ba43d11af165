"""An evaluation is a function of its rows, under its own prefix, and predictions are the parent's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_data import TRAINERS, arguments, demonstrations, pairs, tokenizer, trainer
from tiny_models import tiny
from transformers import TrainerCallback
from trl import DPOTrainer, SFTTrainer

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import SteeringTrainer

OURS = {"loss", "margin", "margin_gain", "pair_accuracy"}
KINDS = [("dpo", "dpo"), ("plain", "dpo"), ("dpo", "ipo"), ("dpo", "cross_entropy"), ("sft", "cross_entropy"),
         ("dpo", None), ("sft", None), ("dpo", "bipo")]  # fmt: skip


def rows(kind: str, count: int = 6, seed: int = 3):
    return demonstrations(count, seed) if kind == "sft" else pairs(count, seed)


def ready(kind, folder, **options):
    """A trainer whose vector is not zero any more."""
    options.setdefault("eval_dataset", rows(kind))
    made = trainer(kind, folder, per_device_eval_batch_size=4, learning_rate=0.3, **options)
    made.train()
    return made


def numbers(metrics: dict[str, float], prefix: str = "eval_") -> dict[str, float]:
    timings = ("runtime", "per_second", "epoch", "time")
    return {k.removeprefix(prefix): v for k, v in metrics.items() if not k.endswith(timings)}


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("kind", "loss"), KINDS)
def test_nothing_of_another_loop_is_in_it(kind, loss, tmp_path):
    made = ready(kind, tmp_path, loss=loss)
    expected = numbers(made.evaluate())
    other = made.eval_dataset.select(range(3))

    class Fails(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            raise KeyError

    for aside in (
        lambda: made.predict(other),
        lambda: made.evaluate(other, metric_key_prefix="other"),
        lambda: made.compute_loss(made.model, made._prepare_inputs(next(iter(made.get_eval_dataloader())))),
    ):
        aside()
        assert numbers(made.evaluate()) == pytest.approx(expected, abs=1e-6)
    made.add_callback(failing := Fails())
    with pytest.raises(KeyError):
        made.evaluate(other)
    made.remove_callback(failing)
    assert numbers(made.evaluate()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("where", ["on_prediction_step", "on_evaluate"])
def test_an_evaluation_inside_an_evaluation_keeps_to_itself(where, tmp_path):
    made = ready("dpo", tmp_path, loss="dpo")
    expected, other = numbers(made.evaluate()), made.eval_dataset.select(range(3))
    alone = numbers(made.evaluate(other, metric_key_prefix="inner"), "inner_")
    inner = []

    class Evaluates(TrainerCallback):
        def event(self, args, state, control, **kwargs):
            if not inner:
                inner.append({})
                inner[0] = made.evaluate(other, metric_key_prefix="inner")

    setattr(Evaluates, where, Evaluates.event)
    made.add_callback(Evaluates())
    assert numbers(made.evaluate()) == pytest.approx(expected, abs=1e-6)
    assert numbers(inner[0], "inner_") == pytest.approx(alone, abs=1e-6)


def test_a_training_that_was_interrupted_is_not_in_the_next_ones_numbers(tmp_path):
    class Stops(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            raise KeyError

    options = dict(loss="dpo", learning_rate=0.0, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    made, plain = (trainer("dpo", tmp_path / name, **options) for name in ("stopped", "plain"))
    made.add_callback(stops := Stops())
    with pytest.raises(KeyError):
        made.train()
    made.remove_callback(stops)
    for one in (made, plain):
        one.train()
    logged = [[entry["margin"] for entry in one.state.log_history if "margin" in entry] for one in (made, plain)]
    assert logged[0] == logged[1]


@pytest.mark.parametrize(("kind", "loss"), [("dpo", "dpo"), ("plain", "dpo"), ("sft", "cross_entropy")])
def test_several_sets_by_name(kind, loss, tmp_path):
    sets = {"first": rows(kind, 6, 3), "second": rows(kind, 5, 9)}
    made = ready(kind, tmp_path, loss=loss, eval_dataset=sets, eval_strategy="steps", eval_steps=3)
    found = made.evaluate()
    for name in sets:
        alone = made.evaluate(made.eval_dataset[name], metric_key_prefix=f"eval_{name}")
        expected = numbers(alone, f"eval_{name}_")
        assert expected.keys() >= (OURS if kind != "sft" else {"loss"})
        assert {key: found[f"eval_{name}_{key}"] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert not {f"eval_{key}" for key in OURS} & found.keys()
    logged = {key for entry in made.state.log_history for key in entry}
    assert {f"eval_{name}_loss" for name in sets} <= logged


def test_predict_says_test(tmp_path):
    made = ready("dpo", tmp_path, loss="dpo")
    expected = numbers(made.evaluate())
    found = made.predict(made.eval_dataset).metrics
    assert numbers(found, "test_") == pytest.approx(expected, abs=1e-6)
    assert all(key.startswith("test_") for key in found)


def parents_predictions(parent: Any, kind: str, folder: Path, model: Any) -> Any:
    """What TRL's trainer predicts with the model."""
    stock = parent(
        model=model, args=arguments(kind, folder, per_device_eval_batch_size=4),
        train_dataset=rows(kind), eval_dataset=rows(kind), processing_class=tokenizer(),
    )  # fmt: skip
    return stock.predict(stock.eval_dataset)


def assert_predicts(made: Any, expected: Any) -> None:
    predicted = made.predict(made.eval_dataset)
    assert predicted.predictions.shape[:2] == predicted.label_ids.shape
    np.testing.assert_allclose(predicted.predictions, expected.predictions, atol=1e-4)
    np.testing.assert_array_equal(predicted.label_ids, expected.label_ids)


@pytest.mark.parametrize("loss", ["dpo", "cross_entropy"])
def test_predictions_of_pairs_are_dpo_trainers(loss, tmp_path):
    made = ready("dpo", tmp_path, loss=loss)
    expected = parents_predictions(DPOTrainer, "dpo", tmp_path / "stock", made.model)
    assert_predicts(made, expected)
    plain = trainer("plain", tmp_path / "plain", model=made.model, loss="dpo", per_device_eval_batch_size=4,
                    eval_dataset=rows("dpo"))  # fmt: skip
    assert_predicts(plain, expected)


@pytest.mark.parametrize("loss", ["cross_entropy", None])
def test_predictions_of_demonstrations_are_sft_trainers(loss, tmp_path):
    made = ready("sft", tmp_path, loss=loss)
    assert_predicts(made, parents_predictions(SFTTrainer, "sft", tmp_path / "stock", made.model))


@pytest.mark.parametrize("loss", ["cross_entropy", None])
def test_predictions_know_where_prompts_end(loss, tmp_path):
    made = ready("sft", tmp_path, loss=loss, peft_config=SteeringVectorConfig(positions="completion"))
    found = made.predict(made.eval_dataset)
    assert found.predictions.shape[:2] == found.label_ids.shape and "test_loss" in found.metrics


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("kind", "loss"), [("dpo", "dpo"), ("plain", "dpo"), ("sft", "cross_entropy"), ("dpo", None)])
@pytest.mark.parametrize(
    "how",
    [{}, dict(eval_accumulation_steps=1), dict(batch_eval_metrics=True), dict(include_for_metrics=["loss", "inputs"])],
)  # fmt: skip
def test_compute_metrics_is_called_with_predictions(kind, loss, how, tmp_path):
    seen = []

    def compute(prediction, compute_result=True):
        seen.append(prediction)
        return {"shape": float(prediction.predictions.shape[-1])} if compute_result else {}

    made = ready(kind, tmp_path, loss=loss, compute_metrics=compute, **how)
    seen.clear()
    found = made.evaluate()
    assert found["eval_shape"] == 64.0
    assert all(prediction.predictions.shape[:2] == prediction.label_ids.shape for prediction in seen)
    assert len(seen) == (2 if "batch_eval_metrics" in how else 1)
    if "include_for_metrics" in how:
        assert all(prediction.losses is not None and prediction.inputs is not None for prediction in seen)
    if loss is not None:
        plain = ready(kind, tmp_path / "plain", loss=loss)
        assert found["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)


def test_prediction_loss_only_gives_no_predictions_as_the_parents(tmp_path):
    made = ready("dpo", tmp_path, loss="dpo", prediction_loss_only=True)
    found = made.predict(made.eval_dataset)
    assert found.predictions is None and "test_margin" in found.metrics


@pytest.mark.parametrize("metric", ["eval_margin", "margin", "eval_pair_accuracy", "eval_loss"])
def test_the_best_model_by_our_names(metric, tmp_path):
    made = ready(
        "dpo", tmp_path, loss="dpo", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better="loss" not in metric,
    )  # fmt: skip
    values = [e[f"eval_{metric.removeprefix('eval_')}"] for e in made.state.log_history if "eval_margin" in e]
    assert made.state.best_metric == (max(values) if "loss" not in metric else min(values))


def test_the_best_model_of_one_set_of_several(tmp_path):
    made = ready(
        "dpo", tmp_path, loss="dpo", eval_dataset={"a": rows("dpo"), "b": rows("dpo", 4, 9)}, eval_strategy="steps",
        eval_steps=1, save_strategy="best", metric_for_best_model="eval_b_margin", greater_is_better=True,
    )  # fmt: skip
    assert made.state.best_metric == max(e["eval_b_margin"] for e in made.state.log_history if "eval_b_margin" in e)


def test_evaluation_on_start_is_of_the_untrained_model(tmp_path):
    options = dict(loss="dpo", eval_strategy="steps", eval_steps=2, eval_on_start=True)
    made = ready("dpo", tmp_path, **options)
    first = next(entry for entry in made.state.log_history if "eval_loss" in entry)
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-5) and first["eval_margin_gain"] == pytest.approx(
        0.0, abs=1e-5
    )
    without = ready("dpo", tmp_path / "without", loss="dpo")
    logged = [[e["margin"] for e in one.state.log_history if "margin" in e] for one in (made, without)]
    assert logged[0] == pytest.approx(logged[1], abs=1e-6)


def test_a_plain_trainer_is_its_parent(tmp_path):
    made = SteeringTrainer(
        model=tiny(), args=arguments("plain", tmp_path), peft_config=None, train_dataset=None,
        processing_class=tokenizer(),
    )  # fmt: skip
    assert made._plain and set(TRAINERS) == {"plain", "sft", "dpo"}
