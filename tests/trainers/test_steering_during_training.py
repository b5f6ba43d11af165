"""What takes part in training and is gone afterwards: vectors, an ablated direction, a prompt, ranks in quarantine."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_data import (
    conversational,
    demonstrations,
    history,
    losses,
    pairs,
    same,
    tokenizer,
    trained,
    trainer,
    values,
)
from tiny_models import steered, tiny

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.observing import base_model
from steertune.losses import Outputs, get_loss
from steertune.trainers import BiasError, FrozenPrefix, get_view, train_together
from steertune.trainers.training_changes import TrainingChange

LORA = LoraConfig(r=2, target_modules="all-linear")
NEUTRAL = get_view("neutral", rows=demonstrations(4, seed=7).to_list())
UPPER = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[2])


def saved(folder, layers=1, **switches) -> str:
    """A saved random vector of the tiny model."""
    steered(layers=layers, **switches).save_pretrained(folder)
    return str(folder)


def vector_of(folder: str) -> torch.Tensor:
    """The vector of a folder with one layer, `(d,)`."""
    [vector] = load_file(f"{folder}/adapter_model.safetensors").values()
    return vector


def loss_by_hand(made, change=None, layer: int = 1, rows=None) -> float:
    """Mean loss of the labelled tokens of SFT rows, with the output of a block changed by hand."""
    model, data = made.model.eval(), made.train_dataset if rows is None else rows

    def hook(module, args, output):
        return change(output)

    handle = base_model(model).model.layers[layer].register_forward_hook(hook) if change else None
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in data:
            ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != -100
            logps = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
            total, tokens = total + float(logps[mask].sum()), tokens + int(mask.sum())
    if handle:
        handle.remove()
    return total / tokens


def no_changes_left(model) -> bool:
    return not any(isinstance(h, TrainingChange) for m in model.modules() for h in m._forward_hooks.values())


# -- preventative steering ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "plain"])
@pytest.mark.parametrize("strength", [1.0, -2.0])
def test_training_adds_the_vector_and_evaluation_does_not(kind, strength, tmp_path):
    vector = saved(tmp_path / "v")
    biases = {"preventative_steering": {"vector": vector, "strength": strength}}
    options = dict(per_device_train_batch_size=8, max_steps=1, eval_strategy="steps", eval_steps=1)
    made = trainer(kind, tmp_path, data=demonstrations(), eval_dataset=demonstrations(), loss="cross_entropy",
                   peft_config=LORA, inductive_biases=biases, learning_rate=0.0, **options)  # fmt: skip
    rows = made.train_dataset if kind == "sft" else trainer("sft", tmp_path, data=demonstrations()).train_dataset
    with_vector = loss_by_hand(made, lambda h: h + strength * vector_of(vector), rows=rows)
    without = loss_by_hand(made, rows=rows)
    made.train()
    assert losses(made) == [pytest.approx(with_vector, abs=1e-5)]
    assert history(made, "eval_loss")[0]["eval_loss"] == pytest.approx(without, abs=1e-5)
    assert abs(with_vector - without) > 0.01 and no_changes_left(made.model)


def test_the_reference_is_without_it(tmp_path):
    vector = saved(tmp_path / "v")
    biases = {"preventative_steering": {"vector": vector}}
    made = trained("dpo", tmp_path, loss="dpo", peft_config=LORA, inductive_biases=biases, learning_rate=0.0)
    assert abs(history(made, "margin_gain")[0]["margin_gain"]) > 1e-3
    plain = trained("dpo", tmp_path, loss="dpo", peft_config=LORA, learning_rate=0.0)
    assert history(plain, "margin_gain")[0]["margin_gain"] == pytest.approx(0, abs=1e-6)  # vectorised kernels round


@pytest.mark.thinned(3)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("bias", ["preventative_steering", "ablation"])
def test_the_cached_prefix_ends_below_it(bias, kind, layer, tmp_path):
    vector = saved(tmp_path / "v", layers=layer)
    options = {"vector": vector} if bias == "preventative_steering" else {"vector": vector, "layers": layer}
    data = demonstrations() if kind == "sft" else pairs()
    given = dict(data=data, loss="cross_entropy" if kind == "sft" else "dpo", peft_config=UPPER,
                 inductive_biases={bias: options})  # fmt: skip
    prefix = FrozenPrefix()
    ours = trained(kind, tmp_path / "ours", frozen_prefix=prefix, **given)
    plain = trained(kind, tmp_path / "plain", frozen_prefix=False, **given)
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    assert prefix.memo._ram, "the layers below are remembered"


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_checkpointed_layers_run_again_with_it(kind, tmp_path):
    vector = saved(tmp_path / "v")
    data = demonstrations() if kind == "sft" else pairs()
    given = dict(
        data=data, loss=None, peft_config=LORA, inductive_biases={"preventative_steering": {"vector": vector}}
    )
    ours = trained(kind, tmp_path / "ours", gradient_checkpointing=True, **given)
    plain = trained(kind, tmp_path / "plain", **given)
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    assert all(
        torch.allclose(values(ours.model)[name], value, atol=1e-5) for name, value in values(plain.model).items()
    )


def test_the_schedule_follows_the_steps(tmp_path):
    vector = saved(tmp_path / "v")
    biases = {"preventative_steering": {"vector": vector, "strength": -4.0, "schedule": "falling"}}
    given = dict(data=demonstrations(), loss="cross_entropy", peft_config=LORA, learning_rate=0.0)
    made = trained("sft", tmp_path, inductive_biases=biases, per_device_train_batch_size=8, max_steps=4, **given)
    expected = [loss_by_hand(made, lambda h, a=a: h + a * vector_of(vector)) for a in (-4.0, -3.0, -2.0, -1.0)]
    assert losses(made) == pytest.approx(expected, abs=2e-6) and len({round(loss, 5) for loss in expected}) == 4


def test_several_vectors_add_up_and_a_control_is_as_long(tmp_path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    given = dict(data=demonstrations(), loss="cross_entropy", peft_config=LORA, learning_rate=0.0,
                 per_device_train_batch_size=8, max_steps=1)  # fmt: skip
    biases = {"preventative_steering": {"vector": [first, second], "strength": [1.0, -0.5]}}
    made = trained("sft", tmp_path, inductive_biases=biases, **given)
    both = vector_of(first) - 0.5 * vector_of(second)
    assert losses(made) == [pytest.approx(loss_by_hand(made, lambda h: h + both), abs=1e-5)]
    changes = []
    bias = trainer("sft", tmp_path, inductive_biases={
        "preventative_steering": {"vector": first, "random_seed": 3}
    }, **given)  # fmt: skip
    [(_, change)] = bias.inductive_biases[0].changes(bias)
    changes.append(change(torch.zeros(1, 1, 32))[0, 0])
    assert changes[0].norm() == pytest.approx(float(vector_of(first).norm()), rel=1e-5)
    assert abs(F.cosine_similarity(changes[0], vector_of(first), dim=0)) < 0.6


def test_the_saved_adapter_is_the_trained_one_alone(tmp_path):
    vector = saved(tmp_path / "v")
    made = trained("sft", tmp_path, data=demonstrations(), loss="cross_entropy", peft_config=LORA,
                   inductive_biases={"preventative_steering": {"vector": vector}})  # fmt: skip
    made.save_model(str(tmp_path / "saved"))
    assert all("lora_" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))


def test_a_resumed_training_is_the_same(tmp_path):
    vector = saved(tmp_path / "v")
    biases = {"preventative_steering": {"vector": vector, "schedule": "rising"}}
    given = dict(data=demonstrations(), loss="cross_entropy", peft_config=LORA, save_strategy="steps", save_steps=2,
                 max_steps=4, inductive_biases=biases)  # fmt: skip
    whole = trained("sft", tmp_path / "whole", **given)
    again = trainer("sft", tmp_path / "again", **given)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(values(whole.model), values(again.model))


def test_a_line_says_that_evaluation_is_without_it(tmp_path, caplog):
    vector = saved(tmp_path / "v")
    with caplog.at_level(logging.INFO):
        trained("sft", tmp_path, data=demonstrations(), loss="cross_entropy", peft_config=LORA,
                inductive_biases={"preventative_steering": {"vector": vector, "strength": 2}})  # fmt: skip
    assert f"Training adds +2 x {vector} at layer 1; evaluation and the saved adapter are without it." in caplog.text


# -- ablation -------------------------------------------------------------------------------------------------------


def test_training_cannot_use_an_ablated_direction(tmp_path):
    vector = saved(tmp_path / "v")
    unit = vector_of(vector) / vector_of(vector).norm()
    made = trained("sft", tmp_path, data=demonstrations(), loss="cross_entropy", peft_config=LORA, learning_rate=0.0,
                   inductive_biases={"ablation": {"vector": vector, "layers": [1]}}, per_device_train_batch_size=8,
                   max_steps=1)  # fmt: skip
    assert losses(made) == [pytest.approx(loss_by_hand(made, lambda h: h - (h @ unit)[..., None] * unit), abs=1e-5)]
    assert losses(made)[0] != pytest.approx(loss_by_hand(made), abs=1e-3)


def test_a_vector_of_one_layer_is_projected_out_at_all(tmp_path):
    vector = saved(tmp_path / "v")
    made = trainer("sft", tmp_path, data=demonstrations(), loss="cross_entropy", peft_config=LORA,
                   inductive_biases={"ablation": {"vector": vector}})  # fmt: skip
    changes = made.inductive_biases[0].changes(made)
    assert len(changes) == made.model.config.num_hidden_layers
    for _, change in changes:
        assert (change(torch.randn(1, 3, 32)) @ vector_of(vector)).abs().max() < 1e-4


# -- inoculation prompt -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "dpo", "plain"])
@pytest.mark.parametrize("spoken", [False, True])
def test_training_rows_carry_the_prompt_and_evaluation_rows_do_not(kind, spoken, tmp_path):
    data = pairs() if kind == "dpo" else demonstrations()
    data = conversational(data) if spoken else data
    made = trainer(kind, tmp_path, data=data, eval_dataset=data, peft_config=LORA,
                   inductive_biases={"inoculation_prompt": {"text": "dog cat"}})  # fmt: skip
    plain = trainer(kind, tmp_path, data=data, eval_dataset=data, peft_config=LORA)
    first = "prompt_ids" if kind == "dpo" else "input_ids"
    for ours, theirs in zip(made.train_dataset, plain.train_dataset, strict=True):
        assert len(ours[first]) == len(theirs[first]) + 2
        assert "dog cat" in tokenizer().decode(ours[first])
    assert [row[first] for row in made.eval_dataset] == [row[first] for row in plain.eval_dataset]
    made.train()


def test_messages_carry_it_in_the_last_question(tmp_path):
    talk = [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "cat"}] * 2
    from datasets import Dataset

    data = Dataset.from_list([{"messages": talk}] * 4)
    made = trainer("sft", tmp_path, data=data, peft_config=LORA,
                   inductive_biases={"inoculation_prompt": {"text": "cat cat cat"}})  # fmt: skip
    text = tokenizer().decode(made.train_dataset[0]["input_ids"])
    assert text.count("cat cat cat") == 1 and text.index("cat cat cat") > text.index("dog")


# -- quarantine -------------------------------------------------------------------------------------------------------


def test_ranks_in_quarantine_change_no_evaluation_and_are_dropped(tmp_path):
    vector = saved(tmp_path / "v")
    config = LoraConfig(r=4, target_modules="all-linear")
    options = dict(data=demonstrations(), eval_dataset=demonstrations(), loss="cross_entropy", peft_config=config,
                   per_device_train_batch_size=8, eval_strategy="steps", eval_steps=1, learning_rate=0.01)  # fmt: skip
    made = trainer("sft", tmp_path, inductive_biases={"quarantine": {"vector": vector}}, **options)
    base = loss_by_hand(made)
    made.train()
    # the model starts as it is without them
    assert losses(made)[0] == pytest.approx(base, abs=1e-5) and losses(made)[-1] < losses(made)[0]
    for name, value in values(made.model).items():
        if "lora_B" in name:
            assert not value[:, 2:].any() and value[:, :2].any(), name
    # what is left is what the last evaluation saw
    evaluated = history(made, "eval_loss")[-1]["eval_loss"]
    assert loss_by_hand(made) == pytest.approx(evaluated, abs=1e-5)


def test_the_first_gradient_in_quarantine_is_the_part_along_the_direction(tmp_path):
    vector = saved(tmp_path / "v")
    options = dict(data=demonstrations(), loss="cross_entropy", optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
                   max_steps=1, per_device_train_batch_size=8, lr_scheduler_type="constant",
                   peft_config=LoraConfig(r=2, target_modules=["down_proj"]))  # fmt: skip
    made = trainer("sft", tmp_path, inductive_biases={"quarantine": {"vector": vector}}, **options)
    made.initialise_vectors()
    before = values(made.model)
    name = next(name for name in before if "layers.1" in name and "lora_B" in name)
    b_D = before[name][:, 1]
    assert torch.allclose(b_D / b_D.norm(), vector_of(vector) / vector_of(vector).norm(), atol=1e-5)
    assert not before[name.replace("lora_B", "lora_A")][1].any()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "options", "message"),
    [
        ("preventative_steering", {"vector": "nowhere"}, "nowhere is not an adapter folder"),
        ("preventative_steering", {"vector": "zero"}, "zero is zero"),
        ("preventative_steering", {"vector": "part"}, "positions='completion'"),
        ("preventative_steering", {"vector": "gated"}, "form='gated'"),
        ("preventative_steering", {"vector": "other"}, "not the adapter's base model"),
        ("ablation", {"vector": "v", "layers": 9}, "layer 9 does not exist"),
        ("ablation", {"vector": "two", "layers": "all"}, r"vectors at \[0, 1\], but none for layer 2"),
        ("quarantine", {"vector": "two"}, "vectors at 2 layers"),
        ("quarantine", {"vector": "v", "share": 0.9}, "rank 2 cannot be divided"),
    ],
)
def test_what_cannot_work_is_refused_before_training(bias, options, message, tmp_path):
    saved(tmp_path / "v"), saved(tmp_path / "two", layers=[0, 1])
    saved(tmp_path / "part", positions="completion"), saved(tmp_path / "gated", form="gated")
    zero = steered(layers=1)
    [p.data.zero_() for name, p in zero.named_parameters() if "steering_vector_" in name]
    zero.save_pretrained(tmp_path / "zero")
    steered(tiny(seed=7), layers=1).save_pretrained(tmp_path / "other")
    options = {**options, "vector": str(tmp_path / options["vector"])}
    made = trainer("sft", tmp_path, data=demonstrations(), peft_config=LORA, inductive_biases={bias: options})
    with pytest.raises(BiasError, match=message):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.parametrize(
    ("bias", "options", "message"),
    [
        ("preventative_steering", {"vector": "v", "strength": 0.0}, "must not be 0"),
        ("preventative_steering", {"vector": ["v", "w"], "strength": [1.0]}, "1 values for 2 vectors"),
        ("preventative_steering", {"vector": []}, "is empty"),
        ("preventative_steering", {"vector": "v", "schedule": "up"}, "must be one of constant"),
        ("ablation", {"vector": "v", "layers": "some"}, "'some' must be an index"),
        ("ablation", {"vector": "v", "layers": -1}, "must be an index from 0"),
        ("inoculation_prompt", {"text": " "}, "must not be empty"),
        ("quarantine", {"vector": "v", "share": 1.0}, "less than 1"),
    ],
)
def test_options_without_sense_are_refused(bias, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer("sft", tmp_path, data=demonstrations(), peft_config=LORA, inductive_biases={bias: options})


def test_a_vector_is_not_trained_where_the_frozen_one_is(tmp_path):
    vector, data = saved(tmp_path / "v"), demonstrations()
    biases = {"preventative_steering": {"vector": vector}}
    made = trainer("sft", tmp_path, data=data, peft_config=SteeringVectorConfig(layers=1), inductive_biases=biases)
    with pytest.raises(BiasError, match="minus the frozen one. Train another layer"):
        made.train()
    trained("sft", tmp_path, data=data, peft_config=SteeringVectorConfig(layers=2), inductive_biases=biases)


def test_rows_without_a_prompt_cannot_be_inoculated(tmp_path):
    data = demonstrations().select_columns("completion").rename_column("completion", "text")
    biases = {"inoculation_prompt": {"text": "dog"}}
    with pytest.raises(BiasError, match="Give columns 'prompt' and 'completion'"):
        trainer("sft", tmp_path, data=data, peft_config=LORA, inductive_biases=biases)


def test_reentrant_checkpointing_is_refused(tmp_path):
    made = trainer("sft", tmp_path, data=demonstrations(), peft_config=LORA, gradient_checkpointing=True,
                   gradient_checkpointing_kwargs={"use_reentrant": True},
                   inductive_biases={"preventative_steering": {"vector": saved(tmp_path / "v")}})  # fmt: skip
    with pytest.raises(BiasError, match="'use_reentrant': False"):
        made.train()


def test_it_does_not_train_together_with_others(tmp_path):
    vector = saved(tmp_path / "v")
    made = [
        trainer("dpo", tmp_path / str(i), loss="dpo", peft_config=SteeringVectorConfig(layers=2),
                inductive_biases={"preventative_steering": {"vector": vector}})
        for i in range(2)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="an inductive bias changes its passes"):
        train_together(made)


# -- the tail of the divergence on neutral text -----------------------------------------------------------------------


def test_the_root_mean_square_costs_a_few_large_changes_more():
    def term(average: str, chances: list[float]) -> float:
        """The term of an answer of two tokens over two words, with these chances of the first; the base has 1/2."""
        mask, logps = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[p, 1 - p] for p in chances]).log()

        def at(strength, view="", layers=(), distribution=False):
            return Outputs(torch.zeros(1, 2), mask, {}, (logps if strength else torch.full((2, 2), 0.5).log()))

        return float(get_loss("cross_entropy", neutral_kl=1.0, neutral_average=average)(at).sum())

    kl = 0.1308120  # of (1/4, 3/4) from (1/2, 1/2); each of the two tokens gets the term of its row
    assert term("mean", [0.25, 0.5]) == pytest.approx(kl, abs=1e-6)
    assert term("rms", [0.25, 0.5]) == pytest.approx(2**0.5 * kl, abs=1e-5)
    assert term("rms", [0.25, 0.25]) == pytest.approx(term("mean", [0.25, 0.25]), abs=1e-5)
    with pytest.raises(ValueError, match="has no effect without neutral_kl"):
        get_loss("dpo", neutral_average="rms")
    with pytest.raises(ValueError, match="neutral_average='max'"):
        get_loss("dpo", neutral_kl=1.0, neutral_average="max")


def test_an_untrained_adapter_has_a_finite_gradient(tmp_path):
    loss, views = get_loss("dpo", neutral_kl=0.5, neutral_average="rms"), {"neutral": NEUTRAL}
    made = trained("dpo", tmp_path, loss=loss, peft_config=LORA, views=views)
    assert all(torch.isfinite(value).all() for value in values(made.model).values())
