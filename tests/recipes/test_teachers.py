"""Views that another model sees, and arms that train such teachers first (RAHF)."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_data import pairs, tokenizer, trained, trainer, values
from tiny_models import tiny
from tiny_views import states_of

from steertune.adapters import SteeringVectorConfig
from steertune.losses import get_loss
from steertune.recipes.lab import training
from steertune.recipes.lab.arm import make_arm
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients.teachers import Teachers, examples_of
from steertune.recipes.lab.training import make_trainer, training_of
from steertune.trainers import Batch, FrozenPrefix, ViewError, get_view, share_weights
from steertune.trainers.model_at import ModelAt


def taught(seed: int = 5, **options):
    return get_view("teacher", model=tiny(seed=seed), **options)


@pytest.mark.parametrize("instruction", ["", "now we stay"])
def test_one_full_step_finds_the_vector_that_a_teacher_is(instruction, tmp_path):
    data, view = pairs(6), get_view("instruction", text=instruction) if instruction else None
    expected = (states_of(tiny(seed=5), data, view) - states_of(tiny(), data)).mean(dim=0)
    made = trained(
        "dpo", tmp_path, data=data, loss=get_loss("prompted", layers=2), max_steps=1,
        views={"good": taught(instruction=instruction)}, peft_config=SteeringVectorConfig(layers=2, stream_sizes={}),
        optim="sgd", learning_rate=16.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        per_device_train_batch_size=6,
    )  # fmt: skip
    [vector] = values(made.model).values()
    torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["lorra", "context_distillation"])
def test_the_memo_changes_nothing_and_asks_teachers_once(loss, tmp_path):
    views = {"good": taught(5), "bad": taught(6)}
    calls = []
    views["good"].model.register_forward_pre_hook(lambda *_: calls.append(1))
    before = {name: p.clone() for name, p in views["good"].model.named_parameters()}
    seen = {name: views[name] for name in get_loss(loss).needs.views}
    options = {"data": pairs(4), "loss": loss, "views": seen, "max_steps": 4}
    ours = trained("dpo", tmp_path / "a", frozen_prefix=FrozenPrefix(), **options)
    # a row is asked for alone and kept; whole distributions are not
    assert len(calls) == 4
    plain = trained("dpo", tmp_path / "b", frozen_prefix=False, **options)
    for one, other in zip(values(ours.model).values(), values(plain.model).values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for name, p in views["good"].model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


def test_a_teacher_has_no_strength(tmp_path):
    made = trainer("dpo", tmp_path, loss="prompted", views={"good": taught()})
    batch = Batch.read(next(iter(made.get_train_dataloader())))
    with pytest.raises(ViewError, match="has no strength"):
        ModelAt(made.model, made.model, batch, views=made.views)(1.0, view="good")


def test_teachers_that_cannot_teach(tmp_path):
    with pytest.raises(TypeError, match="must be a model"):
        get_view("teacher", model="runs/good")
    with pytest.raises(ValueError, match="where='below'"):
        taught(where="below")
    wide = get_view("teacher", model=tiny(hidden_size=64))
    with pytest.raises(ViewError, match=r"\(tokens, width\) are \[64, 64\], but the model's are \[64, 32\]"):
        trainer("dpo", tmp_path, loss="prompted", views={"good": wide})
    model = tiny()
    same = get_view("teacher", model=get_peft_model(model, LoraConfig(target_modules="all-linear")))
    with pytest.raises(ViewError, match="the trained model itself"):
        trainer("dpo", tmp_path, model=model, loss="prompted", views={"good": same})


# -- in arms ---------------------------------------------------------------------------------------------------------

TEACHER = {"name": "teacher"}
TABLES = {
    "name": "rahf",
    "data": {"name": "cautious_advice"},
    "adapter": {"type": "steering_vector", "layers": 2},
    "loss": {"name": "lorra", "layers": [2, 3]},
    "teachers": {
        "good": {"chosen": "", "trainer": {"learning_rate": 0.02}},
        "bad": {"rejected": "", "trainer": {"learning_rate": 0.03}},
    },
    "views": {"good": TEACHER, "bad": TEACHER},
    "trainer": {"max_steps": 6, "learning_rate": 0.1, "per_device_train_batch_size": 4},
}


@torch.no_grad()
def nll(model, rows) -> float:
    """Of completions, in nats."""
    [batch] = batches(tokenizer(), rows, len(rows))
    return -float(ModelAt(model, model, batch)(1.0).logps.sum())


def test_every_teacher_learns_its_own_answers_on_the_base_s_weights(tmp_path):
    base, data, arm = tiny(), pairs(8), make_arm(TABLES)
    training = training_of(arm, share_weights(base), tokenizer(), data, tmp_path)
    made = make_trainer(training, save_strategy="no", disable_tqdm=True, logging_strategy="no")
    teachers = {name: view.teacher for name, view in made.views.views.items()}
    storage = base.model.layers[0].mlp.up_proj.weight.data_ptr()
    for name, other in (("good", "bad"), ("bad", "good")):
        rows = examples_of(data, arm.get(Teachers).teachers()[name])
        assert nll(teachers[name], rows) < min(nll(base, rows), nll(teachers[other], rows)) - 1
        assert {p.data_ptr() for p in teachers[name].parameters()} & {storage}
        assert not any(p.requires_grad for p in teachers[name].parameters())
    made.train()
    [vector] = values(made.model).values()
    assert vector.norm() > 0.01


def test_a_trial_s_settings_are_not_the_teachers(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(training, "fit", lambda made, folder: seen.update({folder.name: made.args}))
    tried = {"max_steps": 2, "learning_rate": 0.5, "save_strategy": "no"}
    made = make_trainer(training_of(make_arm(TABLES), tiny(), tokenizer(), pairs(4), tmp_path), **tried)
    assert (made.args.max_steps, made.args.learning_rate) == (2, 0.5)
    for name, rate in (("good", 0.02), ("bad", 0.03)):
        assert (seen[name].max_steps, seen[name].learning_rate) == (6, rate)
        assert seen[name].save_strategy == "no", "how the run is kept is theirs too"


def test_one_teacher_of_both_answers_sees_an_instruction_before_each():
    [first, *_], _ = pairs(3).to_list(), None
    table = make_arm(
        {
            **TABLES,
            "teachers": {"both": {"chosen": "be good", "rejected": "be bad", "trainer": {"learning_rate": 0.02}}},
            "views": {"good": {**TEACHER, "model": "both"}, "bad": {**TEACHER, "model": "both"}},
        }
    )
    rows = examples_of(pairs(3), table.get(Teachers).teachers()["both"])
    assert len(rows) == 6
    assert rows[0] == {"prompt": "be good\n\n" + first["prompt"], "completion": first["chosen"]}
    assert rows[3] == {"prompt": "be bad\n\n" + first["prompt"], "completion": first["rejected"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": {}}, "views.good.model='good' must be one of"),
        ({"teachers": {"good": {}, "bad": {"rejected": ""}}}, "a teacher learns from answers"),
        ({"teachers": {"good": {"chose": ""}, "bad": {"rejected": ""}}}, "Did you mean 'chosen'"),
        (
            {"teachers": {**TABLES["teachers"], "third": {"chosen": ""}}},
            r"No view uses the teacher of \[teachers.third\]",
        ),
        ({"views": {"good": {**TEACHER, "instructions": "x"}, "bad": TEACHER}}, "Did you mean 'instruction'"),
        ({"teachers": {"good": {"chosen": "", "adapter": {"type": "lroa"}}, "bad": {"rejected": ""}}}, "'lroa' is no"),
        (
            {"teachers": {**TABLES["teachers"], "bad": {"rejected": ""}}},
            r"\[teachers.bad\] trains 'lora' at the learning rate .*'steering_vector'. Set teachers.bad.trainer.learn",
        ),
    ],
)
def test_bad_tables(change, message):
    with pytest.raises(ArmError, match=message):
        make_arm({**TABLES, **change})


def test_teachers_need_pairs(tmp_path):
    rows = pairs(4).remove_columns("rejected").rename_column("chosen", "completion")
    with pytest.raises(ArmError, match="are trained on pairs with a prompt"):
        make_trainer(training_of(make_arm(TABLES), tiny(), tokenizer(), rows, tmp_path))
