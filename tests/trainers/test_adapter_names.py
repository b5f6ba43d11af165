"""Adapters of any name, and models that are made when training begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from broken_files import flip_last
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_data import arguments, demonstrations, losses, pairs, same, tokenizer, trainer, values
from tiny_models import tiny

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import CheckpointError, SteeringTrainer

CONFIGS = {
    "vector": lambda: SteeringVectorConfig(init="random"),
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
}
CASES = [("plain", "bipo"), ("plain", "cross_entropy"), ("sft", "cross_entropy"), ("sft", None), ("dpo", "dpo"),
         ("dpo", None)]  # fmt: skip


def named(adapter: str, name: str) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny(), CONFIGS[adapter](), adapter_name=name)


def made(kind: str, loss: str | None, adapter: str, name: str, folder: Path, **options: Any) -> Any:
    return trainer(
        kind,
        folder,
        model=named(adapter, name),
        loss=loss,
        max_steps=3,
        save_strategy="steps",
        save_steps=2,
        **options,
    )


@pytest.mark.thinned(3)
@pytest.mark.parametrize("adapter", CONFIGS)
@pytest.mark.parametrize(("kind", "loss"), CASES)
def test_the_name_changes_nothing(kind, loss, adapter, tmp_path):
    """Same losses (so the same reference copy) and weights, a checkpoint to resume from, and a card."""
    default, style = (made(kind, loss, adapter, name, tmp_path / name) for name in ("default", "style"))
    for each in (default, style):
        each.train()
    assert losses(style) == losses(default)
    renamed = {name.replace(".style.", ".default."): value for name, value in values(style.model).items()}
    assert same(renamed, values(default.model))
    assert (tmp_path / "style" / "checkpoint-2" / "style" / "adapter_model.safetensors").is_file()
    again = made(kind, loss, adapter, "style", tmp_path / "style")
    again.train(resume_from_checkpoint=True)
    assert same(values(again.model), values(style.model))
    style.save_model(str(tmp_path / "saved"))
    assert "steps of" in (tmp_path / "saved" / "style" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path / "saved" / "style"))
    assert same({n.replace(".default.", ".style."): v for n, v in loaded.state_dict().items() if ".default." in n},
                {n: v for n, v in style.model.state_dict().items() if ".style." in n})  # fmt: skip


def test_a_start_from_data_reaches_an_adapter_of_another_name(tmp_path):
    config = SteeringVectorConfig(init="mean_difference")
    model = get_peft_model(tiny(), config, adapter_name="style")
    other = trainer("plain", tmp_path, model=model, loss="dpo")
    plain = trainer("plain", tmp_path, loss="dpo", peft_config=SteeringVectorConfig(init="mean_difference"))
    for each in (other, plain):
        each.initialise_vectors()
    [one], [two] = values(other.model).values(), values(plain.model).values()
    assert torch.equal(one, two) and one.norm() > 0


def test_a_flipped_bit_in_the_folder_of_an_adapter_is_noticed(tmp_path):
    made("plain", "dpo", "vector", "style", tmp_path).train()
    flip_last(tmp_path / "checkpoint-2" / "style" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="was changed after"):
        made("plain", "dpo", "vector", "style", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_another_name_is_refused(tmp_path):
    made("plain", "dpo", "vector", "style", tmp_path).train()
    with pytest.raises(CheckpointError, match="has no adapter 'other'.*Give the adapter the name it had"):
        made("plain", "dpo", "vector", "other", tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("loss", ["dpo", None])
def test_dpo_beside_another_default_is_refused(loss, tmp_path):
    """TRL would compare with a copy of `default`, which is not what is trained."""
    model = named("vector", "default")
    model.add_adapter("b", SteeringVectorConfig(layers=1))
    model.set_adapter("b")
    with pytest.raises(ValueError, match="adapter 'b' is trained, but DPOTrainer compares with a copy of .*'default'"):
        trainer("dpo", tmp_path, model=model, loss=loss)
    assert "ref" not in model.peft_config


def test_references_computed_before_the_copy_is_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="made before training starts"):
        made("dpo", "dpo", "vector", "style", tmp_path, precompute_ref_log_probs=True)


def test_the_best_checkpoint_of_another_name_is_not_lost_in_silence(tmp_path):
    options = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, eval_dataset=pairs(4))
    with pytest.raises(ValueError, match="load_best_model_at_end=True loads the adapter 'default', but 'style'"):
        made("plain", "dpo", "vector", "style", tmp_path, **options).train()
    made("plain", "dpo", "vector", "default", tmp_path, **options).train()


# -- models that are made later ---------------------------------------------------------------------------------------


def later(folder: Path, loss: str | None, model_init: Any = lambda: tiny(), **options: Any) -> SteeringTrainer:
    data = demonstrations if loss is None else pairs
    return SteeringTrainer(
        model_init=model_init, args=arguments("plain", folder, **options.pop("changes", {})), train_dataset=data(),
        eval_dataset=data(4, seed=3), processing_class=tokenizer(), loss=loss, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("dpo", {}),
        ("bipo", dict(peft_config=SteeringVectorConfig(init="mean_difference"))),
        ("cross_entropy", dict(peft_config=CONFIGS["lora"]())),
        ("dpo", dict(peft_config=None, changes=dict(learning_rate=0.001))),
        (None, {}),
    ],
)
def test_every_training_starts_anew_and_as_with_the_model_given(loss, options, tmp_path):
    def shuffled(*_):
        """The random numbers, from which the order of the rows is drawn, stand where they do with a given model."""
        model = tiny()
        torch.manual_seed(42)
        return model

    made = later(tmp_path, loss, shuffled, **options)
    made.train()
    first, weights = losses(made), values(made.model)
    made.train()
    assert losses(made) == first and same(values(made.model), weights) and len({*first}) == 3
    assert options.get("peft_config", ...) is None or made.model.peft_config


def test_every_trial_is_told_to_model_init_and_adapted(tmp_path, monkeypatch):
    trials = []

    def model_init(trial):
        trials.append(trial)
        return tiny()

    made = later(tmp_path, "dpo", model_init)
    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # it takes Optuna's trials
    for rate in (1, 2):
        made.train(trial={"rate": rate})
    assert trials == [None, {"rate": 1}, {"rate": 2}]
    assert isinstance(made.model, PeftModel)


def test_a_search_minimises_the_evaluation_loss(tmp_path, monkeypatch):
    """The parent's own objective would be the sum of margins and accuracies, and choose the worst."""
    from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
    from transformers.trainer_utils import BestRun, HPSearchBackend

    class Backend:
        """Two trials, as Optuna's would be."""

        name = "optuna"
        default_hp_space = None

        def ensure_available(self):
            pass

        def run(self, made, n_trials, direction, **kwargs):
            found = []
            for rate in (1e-4, 0.1):
                made.args.learning_rate = rate
                made.train()
                found.append((made.compute_objective(made.evaluate()), rate))
            objective, rate = min(found)
            return BestRun("0", objective, {"learning_rate": rate})

    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    best = later(tmp_path, "dpo").hyperparameter_search(backend="optuna", n_trials=2)
    # a margin or an accuracy would be another number, and the worst run the one with the smallest
    assert 0.6 < best.objective < 0.75 and best.hyperparameters["learning_rate"] in (1e-4, 0.1)


def test_optuna_searches_with_our_losses(tmp_path):
    pytest.importorskip("optuna")

    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)}

    best = later(tmp_path, "dpo").hyperparameter_search(space, backend="optuna", n_trials=2)
    assert 0.5 < best.objective < 0.75
