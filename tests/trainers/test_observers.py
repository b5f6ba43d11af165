"""Who looks at a model changes nothing of it: not what is trained, not what works, not the next random number."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import pytest
import torch
from measuring import margins
from peft import LoraConfig, get_peft_model
from prefixes import pair_batch
from tiny_data import arguments, demonstrations, pairs, tokenizer, trained, trainer
from tiny_models import fill, tiny
from transformers import TrainerCallback
from trl import SFTTrainer
from untouched import changes, snapshot

from steertune.adapters import SteeringVectorConfig, directions, prompt_length, set_strength
from steertune.adapters.analysis import activations
from steertune.adapters.card import Card, write_card
from steertune.adapters.exports import ExportError
from steertune.adapters.exports._places import linear_places
from steertune.adapters.exports._vectors import constant_vectors
from steertune.adapters.exports._verify import _logits
from steertune.adapters.observing import untouched
from steertune.losses import get_loss
from steertune.trainers import FrozenPrefix, ModelAt
from steertune.trainers.callbacks.bad_examples import first_not_finite, largest
from steertune.trainers.callbacks.vector_stats import VectorStats
from steertune.trainers.model_at import reference_adapter, scaled

# -- models in all states --------------------------------------------------------------------------------------------


def two_vectors(*, active=("default", "b"), frozen=("default",), disabled=False, lora=False, training=True):
    """Vectors `default` and `b` beside one another, in any state; with `lora`, `b` is one."""
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2))
    if lora:
        model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=None))
        model.add_adapter("b", LoraConfig(r=2, target_modules=["v_proj"]))
    else:
        fill(model)
        model.add_adapter("b", SteeringVectorConfig(layers=[1, 2]))
        fill(model, "b", seed=5)
    model.base_model.set_adapter([*active])
    model.active_adapter = active[0]
    for name, parameter in model.named_parameters():
        if any(f".{adapter}." in name for adapter in frozen):
            parameter.requires_grad_(False)
    model.train(training)
    model.get_base_model().model.layers[0].eval()  # somebody's own choice
    if disabled:
        model.base_model.disable_adapter_layers()
    return model


def vector_beside_lora():
    """A trained vector on a base with a frozen LoRA of transformers' own."""
    base = tiny()
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "own")
    model = get_peft_model(base, SteeringVectorConfig(layers=2))
    fill(model)
    return model.train()


STATES = {
    "frozen and trained": lambda: two_vectors(),
    "trained alone is active": lambda: two_vectors(active=("b",)),
    "frozen alone is active": lambda: two_vectors(active=("default",), frozen=("default", "b")),
    "all frozen": lambda: two_vectors(frozen=("default", "b")),
    "all trained": lambda: two_vectors(frozen=()),
    "off": lambda: two_vectors(disabled=True),
    "in evaluation": lambda: two_vectors(training=False),
    "a LoRA": lambda: get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "two LoRAs": lambda: two_vectors(lora=True),
    "beside a LoRA": vector_beside_lora,
    "no adapter": lambda: tiny().train(),
}


def batches():
    batch = pair_batch()
    return [{**batch.inputs, "labels": batch.labels}]


def at(model, *strengths, **options):
    seen = ModelAt(model, model, pair_batch(), **options)
    for strength in strengths:
        with suppress(ValueError), torch.no_grad():
            seen(strength)


def with_shortcut(model, **on):
    for training in (False, True):
        shortcut = FrozenPrefix().shortcut(model, training)
        for _ in range(2):
            with shortcut.on(**on), torch.no_grad():
                ModelAt(model, model, pair_batch())(1)


def places(model):
    with suppress(ExportError, AttributeError, ValueError):
        linear_places(constant_vectors(model, 1.0), model, lambda module: isinstance(module, torch.nn.Linear))


def strength_for_a_while(model):
    with suppress(ValueError), set_strength(model, 2.0):
        model(input_ids=pair_batch().inputs["input_ids"])


def direction(name, model):
    directions.compute(name, model, [several(seed) for seed in range(8)], [1, 2])


def several(seed):
    batch = pair_batch(seed=seed)
    return {**batch.inputs, "labels": batch.labels}


OBSERVERS = {
    "collect": lambda model: activations.collect(model, batches()),
    "residual_norms": lambda model: activations.residual_norms(model, batches()),
    **{name: partial(direction, name) for name in directions.names()},
    "an error while activations are read": lambda model: broken(model),
    "at(1)": lambda model: at(model, 1),
    "at(0)": lambda model: at(model, 0),
    "every strength": lambda model: at(model, -1, 0, "null", 0.5),
    "the reference": lambda model: at_reference(model),
    "scaled": lambda model: scaled_for_a_while(model),
    "set_strength": strength_for_a_while,
    "prompt_length": lambda model: prompt_for_a_while(model),
    "the prefix": with_shortcut,
    "the prefix, labels only": lambda model: with_shortcut(model, labels_only=True),
    "the memo of the reference": lambda model: at(model, 0, reference_memo=FrozenPrefix().reference(model)),
    "places of an export": places,
    "logits of an export": lambda model: _logits(model, [[3, 4, 5]]),
    "margins": lambda model: margins(model, tokenizer(), pairs(2)),
}


def broken(model):
    with suppress(ValueError):
        activations.collect(model, [*batches(), {**batches()[0], "labels": torch.full((4, 8), -100)}])


def at_reference(model):
    if hasattr(model, "peft_config") and not hasattr(model, "hf_device_map"):
        with suppress(AttributeError), reference_adapter(model):
            model(input_ids=pair_batch().inputs["input_ids"])


def scaled_for_a_while(model):
    with suppress(ValueError), scaled(model, -1.5):
        model(input_ids=pair_batch().inputs["input_ids"])


def prompt_for_a_while(model):
    with prompt_length(model, 2):
        model(input_ids=pair_batch().inputs["input_ids"])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("state", STATES)
def test_an_observer_changes_nothing(state, observer):
    model = STATES[state]()
    before = snapshot(model)
    OBSERVERS[observer](model)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("observer", ["collect", "mean_difference", "the reference", "the memo of the reference"])
def test_a_frozen_adapter_of_transformers_too(observer):
    """Put there by `add_adapter`, with no PEFT model around it."""
    model = tiny()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "own")
    model.requires_grad_(False)
    before = snapshot(model)
    OBSERVERS[observer](model)
    assert changes(before, snapshot(model)) == []


def test_the_snapshot_sees_a_difference():
    """Else the tests above would say nothing."""
    for change, kind in (
        (lambda m: m.get_base_model().model.layers[0].train(), "modes"),
        (lambda m: m.base_model.enable_adapter_layers(), "trained"),
        (lambda m: m.set_adapter("b"), "active"),
        (lambda m: torch.rand(1), "torch"),
        (lambda m: m.base_model.disable_adapter_layers(), "disabled"),
        (lambda m: m.register_forward_hook(print), "hooks"),
    ):
        model = two_vectors()
        before = snapshot(model)
        change(model)
        assert any(text.startswith(kind) for text in changes(before, snapshot(model)))


def test_untouched_puts_back_what_was_switched_inside():
    model = two_vectors()
    before = snapshot(model)
    with suppress(RuntimeError), untouched(model):
        model.set_adapter("b")
        model.eval()
        model.base_model.disable_adapter_layers()
        model.requires_grad_(True)
        raise RuntimeError
    assert changes(before, snapshot(model)) == []


# -- trainers --------------------------------------------------------------------------------------------------------


def frozen_beside_trained():
    """A frozen vector of zeros beside a trained one, both at work."""
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2))
    model.add_adapter("b", SteeringVectorConfig(layers=2))
    model.base_model.set_adapter(["default", "b"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(False)
    return model


def lengths(made):
    named = dict(made.model.named_parameters())
    vectors = {name: value for name, value in named.items() if "steering_vector_v" in name}
    return {name.split(".")[-2]: float(value.norm()) for name, value in vectors.items()}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("logging", ["no", "steps"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", dict(loss=None)),
        ("sft", dict(loss="cross_entropy")),
        ("sft", dict(loss="cross_entropy", frozen_prefix=False)),
        ("sft", dict(loss="cross_entropy", gradient_checkpointing=True)),
        ("plain", dict(loss="dpo")),
        ("dpo", dict(loss="dpo")),
        ("dpo", dict(loss="dpo", frozen_prefix=False)),
        ("dpo", dict(loss=None)),
        ("dpo", dict(loss="bipo")),
        ("dpo", dict(loss="reps")),
        ("dpo", dict(loss=get_loss("dpo", change_cap=1.0))),
    ],
)  # fmt: skip
def test_frozen_stays_frozen(kind, options, logging, tmp_path):
    evaluated = demonstrations(4, seed=3) if kind == "sft" else pairs(4, seed=3)
    made = trainer(
        kind, tmp_path, model=frozen_beside_trained(), logging_strategy=logging, learning_rate=0.3, max_steps=4,
        eval_dataset=evaluated, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, **options,
    )  # fmt: skip
    made.train()
    found = lengths(made)
    assert found["default"] == 0.0 and found["b"] > 0.1
    assert not any(p.requires_grad for n, p in made.model.named_parameters() if ".default." in n or ".ref." in n)


def test_it_is_what_stock_sft_trains(tmp_path):
    stock = SFTTrainer(
        model=frozen_beside_trained(), args=arguments("sft", tmp_path / "stock", learning_rate=0.3),
        train_dataset=demonstrations(), processing_class=tokenizer(),
    )  # fmt: skip
    stock.train()
    ours = trained("sft", tmp_path / "ours", model=frozen_beside_trained(), loss=None, learning_rate=0.3)
    assert lengths(ours) == pytest.approx(lengths(stock), abs=1e-6)


def test_a_trainer_that_looks_changes_nothing(tmp_path):
    """Numbers of the vector, evaluations, predictions, a bad step looked at again, a card, a checkpoint."""
    made = trainer("dpo", tmp_path, model=frozen_beside_trained(), loss="dpo", eval_dataset=pairs(4, seed=3))
    made.evaluate()  # it leaves the model in evaluation mode, as Trainer's does
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    made.step_batches = [batch]
    torch.manual_seed(0)
    for number, look in enumerate(
        (
            lambda: VectorStats(made).before_train(made),
            lambda: VectorStats(made).extra_logs(),
            lambda: made.initialise_vectors(),
            lambda: first_not_finite(made),
            lambda: largest(made),
            lambda: made.save_model(str(tmp_path / "saved")),
            lambda: write_card(tmp_path / "saved", Card(title="x")),
            lambda: made.get_num_trainable_parameters(),
        )
    ):
        before = snapshot(made.model)
        look()
        assert changes(before, snapshot(made.model)) == [], number


@pytest.mark.parametrize("what", ["evaluate", "predict", "vectors", "examples"])
def test_looking_in_the_middle_of_training_changes_no_step(what, tmp_path):
    """Also between two micro-batches of a step, with drawn strengths."""

    class Looks(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if what == "evaluate":
                made.evaluate(metric_key_prefix="aside")
            elif what == "predict":
                made.predict(made.eval_dataset)
            elif what == "vectors":
                VectorStats(made).before_train(made)
            else:
                with torch.random.fork_rng([]):
                    first_not_finite(made)

    options = dict(
        loss="bipo", gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=4,
        eval_dataset=pairs(4, seed=3),
    )  # fmt: skip
    plain = trained("dpo", tmp_path / "plain", **options)
    made = trainer("dpo", tmp_path / "looks", **options)
    made.add_callback(Looks())
    made.train()
    names = ("loss", "grad_norm", "vector/norm")
    kept = [[{n: e[n] for n in names} for e in one.state.log_history if "loss" in e] for one in (made, plain)]
    assert kept[0] == kept[1]
