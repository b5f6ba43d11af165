"""Each loss is the formula it names: by hand, in slow Python, and as TRL computes it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import exp, log
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from paths import ROOT
from peft import LoraConfig
from tiny_data import Spy, arguments, losses, pairs, tokenizer, trained
from tiny_models import fill, tiny
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

from steertune import losses as package
from steertune.adapters import SteeringVectorConfig
from steertune.losses import Loss, Needs, Outputs, Strength, get_loss, names
from steertune.losses.bipo import BiPO
from steertune.losses.dpo import DPO
from steertune.losses.ipo import IPO
from steertune.losses.simpo import SimPO
from steertune.recipes.lab.batches import batches
from steertune.trainers.batch import Batch
from steertune.trainers.model_at import ModelAt

# Two pairs: chosen answers of 3 and 1 tokens, then rejected ones of 2 and 4.
LENGTHS = (3, 1, 2, 4)
ALL = [name for name in names() if not get_loss(name).needs.views]  # for those with views, see test_views.py
AT_ONE = {"reps": {"factors": (1.0,)}}  # options that make a loss ask for strength 1 where it would draw one


def random_logps(seed: int) -> torch.Tensor:
    """Log-probabilities between -3 and -0.1, 0 where there is no label, `(4, 5)` in float64."""
    logps = -0.1 - 2.9 * torch.rand(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logps * mask()


def mask() -> torch.Tensor:
    return torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def model(strength: Strength) -> Outputs:
    """A plain function in place of a model."""
    return Outputs(random_logps(50 if strength == "null" else int(strength) + 7), mask())


def flip(d: int) -> torch.Generator:
    """A generator whose first draw makes BiPO's direction `d`."""
    seeds = (torch.Generator().manual_seed(s) for s in range(100))
    drawn = next(g for g in seeds if 2 * int(torch.randint(2, (), generator=g)) - 1 == d)
    return torch.Generator().manual_seed(drawn.initial_seed())


# -- the same formulas, one token at a time ---------------------------------------------------------------------------


def rows(strength: Strength) -> list[list[float]]:
    """The labelled log-probabilities of every row."""
    return [row[:n].tolist() for row, n in zip(model(strength).token_logps, LENGTHS, strict=True)]


def minus_log_sigmoid(x: float) -> float:
    return log(1 + exp(-x))


def margin(pair: int, strength: float, per_token: bool = False, reference: bool = True) -> float:
    """Chosen minus rejected, less the same of the reference."""
    total = 0.0
    for sign, row in ((1, pair), (-1, pair + 2)):
        answer = sum(rows(strength)[row]) - (sum(rows(0)[row]) if reference else 0)
        total += sign * answer / (LENGTHS[row] if per_token else 1)
    return total


def unlikelihood(pair: int, alpha: float) -> float:
    chosen, rejected = rows(1)[pair], rows(1)[pair + 2]
    likely = -sum(chosen) / len(chosen)
    return likely - alpha * sum(log(1 - exp(logp)) for logp in rejected) / len(rejected)


def mean(strength: Strength, row: int) -> float:
    return sum(rows(strength)[row]) / LENGTHS[row]


def split(pair: int) -> float:
    chosen, rejected = -mean(1, pair), -mean(1, pair + 2)
    return 0.9 * chosen + 0.5 * rejected + 3.0 * max(0.0, 0.7 - (rejected - chosen))


def reps(pair: int, without: Strength | None) -> float:
    chosen, rejected = pair, pair + 2
    ahead = sum(rows(0)[rejected]) - sum(rows(0)[chosen])
    value = minus_log_sigmoid(max(ahead, 1.0) * mean(2, chosen) - mean(2, rejected))
    if without is None:
        return value
    return value + minus_log_sigmoid(max(-ahead, 1.0) * mean(without, rejected) - mean(without, chosen))


def one_shot(pair: int) -> float:
    return -sum(rows(1)[pair]) - sum(log(1 - exp(logp)) for logp in rows(1)[pair + 2])


SLOW = {
    "one_shot": ({"mode": "mixed"}, one_shot),
    "split": ({"chosen": 0.9, "rejected": 0.5, "gamma": 3.0, "theta": 0.7}, split),
    "reps": ({"factors": [2.0]}, lambda pair: reps(pair, "null")),
    "dpo": ({"beta": 0.3}, lambda pair: minus_log_sigmoid(0.3 * margin(pair, 1))),
    "ipo": ({"beta": 0.4}, lambda pair: (margin(pair, 1, per_token=True) - 1.25) ** 2),
    "simpo": (
        {"beta": 2.5, "gamma": 0.7},
        lambda pair: minus_log_sigmoid(2.5 * margin(pair, 1, per_token=True, reference=False) - 0.7),
    ),
    "unlikelihood": ({"alpha": 0.6}, lambda pair: unlikelihood(pair, 0.6)),
}


@pytest.mark.parametrize("name", SLOW)
def test_loss_is_its_formula_token_by_token(name):
    options, slow = SLOW[name]
    expected = torch.tensor([slow(0), slow(1)], dtype=torch.float64)
    torch.testing.assert_close(get_loss(name, **options)(model), expected, rtol=0, atol=1e-12)


def test_cross_entropy_is_minus_the_log_probability_of_every_token():
    value = get_loss("cross_entropy")(model)
    for row, n in enumerate(LENGTHS):
        assert value[row].tolist() == [-logp for logp in rows(1)[row]] + [0.0] * (5 - n)


@pytest.mark.parametrize("d", [1, -1])
def test_bipo_is_the_formula_at_the_strength_it_draws(d):
    expected = torch.tensor([minus_log_sigmoid(d * 0.2 * margin(pair, d)) for pair in (0, 1)], dtype=torch.float64)
    torch.testing.assert_close(BiPO(beta=0.2)(model, flip(d)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("suppress", "without"), [("negative", -2), ("none", None)])
def test_reps_suppresses_in_other_ways(suppress, without):
    expected = torch.tensor([reps(pair, without) for pair in (0, 1)], dtype=torch.float64)
    value = get_loss("reps", factors=[2.0], suppress=suppress)(model)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_reps_draws_every_factor_once_a_batch():
    generator, drawn = torch.Generator().manual_seed(0), []

    def at(strength):
        drawn.append(strength)
        return model(strength)

    loss = get_loss("reps", factors=[1.0, 2.0, 4.0], suppress="negative")
    for _ in range(30):
        drawn.clear()
        loss(at, generator)
        used = {s for s in drawn if s != 0}
        assert len(used) == 2 and sum(used) == 0, "one strength, and its negative"
        assert max(used) in (1.0, 2.0, 4.0)


def test_promotion_stops_where_the_natural_answer_is():
    loss = get_loss("one_shot", satisfice=True)
    reference = one_pair([-9.0], [-2.0])
    for chosen, expected in ((-3.0, 1.0), (-2.0, 0.0), (-0.5, 0.0)):
        value = loss({1.0: one_pair([chosen], [-1.0]), 0.0: reference}.__getitem__)
        assert value.item() == pytest.approx(expected)
    assert get_loss("one_shot", satisfice=True).needs.reference and not get_loss("one_shot").needs.reference


@pytest.mark.parametrize("rows", [1, 3])
def test_training_stops_when_every_example_is_satisfied(rows, tmp_path, caplog):
    data = pairs(8).filter(lambda row: len(row["rejected"].split()) == 3)  # as many words as chosen
    [batch] = batches(tokenizer(), data, 8)
    untrained = tiny()
    base = ModelAt(untrained, untrained, batch)(1.0)
    swapped = (base.chosen.logps > base.rejected.logps).tolist()
    wanted = [dict(row, **({"chosen": row["rejected"], "rejected": row["chosen"]} if swap else {}))
              for row, swap in zip(data.to_list(), swapped, strict=True)][:rows]  # fmt: skip
    assert len(wanted) == rows
    made = trained(
        "dpo", tmp_path, loss=get_loss("one_shot", satisfice=True), data=Dataset.from_list(wanted), max_steps=40,
        per_device_train_batch_size=2, learning_rate=5e-3, peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    steps = made.state.global_step
    assert 1 < steps < 40 and f"Stopped at step {steps} of 40" in caplog.text
    rest = {1: 1, 3: 3}[rows]  # of three examples five in a row, in steps of two and one
    assert losses(made)[0] > 0 and losses(made)[-rest:] == [0.0] * rest


def test_only_what_can_be_satisfied_stops(tmp_path):
    assert get_loss("one_shot", satisfice=True).needs.stops
    assert get_loss("one_shot", satisfice=True, change_cap=9.0).needs.stops
    assert not get_loss("one_shot").needs.stops and not get_loss("one_shot", mode="mixed", satisfice=True).needs.stops
    assert not get_loss("dpo", neutral_kl=1.0).needs.stops
    assert not get_loss("one_shot", satisfice=True, neutral_kl=1.0).needs.stops, "a divergence is never 0"
    loss = get_loss("one_shot", mode="mixed", satisfice=True)
    made = trained("dpo", tmp_path, loss=loss, data=pairs(1), max_steps=12, learning_rate=0.2)
    assert made.state.global_step == 12


def test_bipo_with_d_plus_one_is_dpo():
    assert torch.equal(BiPO(beta=0.2)(model, flip(1)), DPO(beta=0.2)(model))


# -- by hand ----------------------------------------------------------------------------------------------------------


def one_pair(chosen: list[float], rejected: list[float]) -> Outputs:
    width = max(len(chosen), len(rejected))
    padded = [row + [0.0] * (width - len(row)) for row in (chosen, rejected)]
    return Outputs(
        torch.tensor(padded), torch.tensor([[i < len(row) for i in range(width)] for row in (chosen, rejected)])
    )


# policy: chosen -1 -1, rejected -3; reference: chosen -2 -1, rejected -2. Margin (−2+3) − (−3+2) = 2 nats.
BY_HAND = {
    "dpo": ({"beta": 0.5}, 0.3132617),  # ln(1 + e^-1)
    "ipo": ({"beta": 0.5}, 0.25),  # (0.5 + 1 - 1)^2
    "simpo": ({"beta": 1.0, "gamma": 2.0}, 0.6931472),  # -ln σ(-1 + 3 - 2)
    "unlikelihood": ({"alpha": 2.0}, 1.1021380),  # 1 - 2 ln(1 - e^-3)
    "split": ({"theta": 3.0}, 6.8),  # 1 + 0.6 * 3 + 4 (3 - 2)
    "reps": ({"factors": [1.0], "suppress": "none"}, 0.1269280),  # -ln σ(1 * -1 + 3)
    "one_shot": ({"mode": "suppression"}, 0.0510692),  # -ln(1 - e^-3)
    "cross_entropy": ({}, 5.0),  # all three tokens, before the trainer gives it the chosen half only
}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_by_hand(name):
    at = {1.0: one_pair([-1.0, -1.0], [-3.0]), 0.0: one_pair([-2.0, -1.0], [-2.0])}.__getitem__
    options, expected = BY_HAND[name]
    assert float(get_loss(name, **options)(at).sum()) == pytest.approx(expected, abs=1e-6)


# -- TRL --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steered_batch(tmp_path_factory):
    """TRL's own DPO trainer with a vector that is not zero, and one of its batches."""

    def make(**changes):
        trainer = DPOTrainer(
            model=tiny(), args=arguments("dpo", tmp_path_factory.mktemp("trl"), **changes), train_dataset=pairs(),
            processing_class=tokenizer(), peft_config=SteeringVectorConfig(),
        )  # fmt: skip
        fill(trainer.model)
        return trainer, next(iter(trainer.get_train_dataloader()))

    return make


@pytest.mark.parametrize(("loss", "theirs"), [(DPO(beta=0.2), "sigmoid"), (IPO(beta=0.2), "ipo")], ids=["dpo", "ipo"])
def test_loss_is_what_trl_computes(loss, theirs, steered_batch):
    trainer, batch = steered_batch(loss_type=theirs, beta=0.2)
    ours = loss(ModelAt(trainer.model, trainer.model, Batch.read(batch))).mean()
    expected = trainer.compute_loss(trainer.model, batch)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(ours.item() - (log(2) if theirs == "sigmoid" else 6.25)) > 1e-3, "the margin must not be zero"


def test_simpo_is_what_trl_computes(steered_batch):
    trainer, inputs = steered_batch()
    batch = Batch.read(inputs)
    ours = SimPO(beta=2.5, gamma=0.7)(ModelAt(trainer.model, trainer.model, batch))
    logits = trainer.model(**batch.inputs).logits
    means = CPOTrainer.get_batch_logps(logits, batch.labels, average_log_prob=True)
    options = SimpleNamespace(
        alpha=0.0, beta=2.5, simpo_gamma=0.7, label_smoothing=0.0, loss_type="simpo", accelerator=trainer.accelerator
    )
    expected, *_ = CPOTrainer.cpo_loss(options, *means.chunk(2))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


# -- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gradient_by_finite_differences(name):
    loss, generator_state = get_loss(name, **AT_ONE.get(name, {})), flip(-1).get_state()

    def total(at_1, at_minus_1):
        generator = torch.Generator()
        generator.set_state(generator_state)
        logps = {1.0: at_1 * mask(), -1.0: at_minus_1 * mask(), 0.0: random_logps(3), "null": random_logps(4)}
        return loss(lambda s: Outputs(logps[s], mask()), generator)

    inputs = [random_logps(seed).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(total, inputs)
    gradients = torch.autograd.grad(total(*inputs).sum(), inputs, allow_unused=True)
    gradient = gradients[1 if name == "bipo" else 0]
    assert gradient is not None and not gradient[~mask()].any()
    assert gradient.abs().sum() > 0 or total(*inputs).sum() == 0, "only where it is 0 may it be flat"


@pytest.mark.parametrize("name", ALL)
def test_an_unlabelled_column_changes_nothing(name):
    def wider(strength):
        outputs = model(strength)
        nothing = torch.zeros(4, 1)
        return Outputs(torch.cat([nothing, outputs.token_logps], 1), torch.cat([nothing.bool(), outputs.mask], 1))

    narrow, wide = get_loss(name)(model, flip(-1)), get_loss(name)(wider, flip(-1))
    torch.testing.assert_close(wide if wide.ndim == 1 else wide[:, 1:], narrow, rtol=0, atol=1e-12)


def test_unlikelihood_is_finite_at_certain_and_impossible_tokens():
    logps = torch.tensor([[-1.0, -100.0], [0.0, -1e-9], [-1.0, -1.0], [-100.0, -1e-7]], requires_grad=True)
    value = get_loss("unlikelihood")(lambda s: Outputs(logps, torch.ones(4, 2, dtype=torch.bool)))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logps.grad).all()
    certain = get_loss("unlikelihood")(lambda s: one_pair([0.0], [0.0]))
    assert certain.item() == pytest.approx(-log(1e-6), abs=0.1)


@pytest.mark.parametrize("name", [name for name in ALL if name != "cross_entropy"])
def test_loss_falls_when_chosen_rises_and_rejected_falls(name):
    better = model(1).token_logps + torch.tensor([0.05, 0.05, -0.05, -0.05])[:, None] * mask()
    loss = get_loss(name, **AT_ONE.get(name, {}))
    before = loss(model, flip(1)).sum()
    after = loss(lambda s: Outputs(better, mask()) if s == 1 else model(s), flip(1)).sum()
    assert after < before or before == after == 0


def test_bipo_draws_both_directions_equally_often_over_steps_and_micro_batches(tmp_path):
    spy = Spy()
    trained("dpo", tmp_path, loss=spy, max_steps=60, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert len(spy.drawn) == 120 and set(spy.drawn) == {1.0, -1.0}
    assert 45 < spy.drawn.count(1.0) < 75
    first, second = spy.drawn[::2], spy.drawn[1::2]
    assert 15 < sum(a == b for a, b in zip(first, second, strict=True)) < 45, "micro-batches draw independently"


# -- the registry -----------------------------------------------------------------------------------------------------


def test_names_are_the_files():
    files = {file.stem for file in (ROOT / "losses").glob("*.py")}
    assert names() == sorted(name for name in files if not name.startswith("_")) and {"dpo", "lorra"} <= {*names()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dop",), "Did you mean 'dpo'"),
        (("cross-entropy",), "Did you mean 'cross_entropy'"),
        (("zzz",), "Available: 'bipo'"),
    ],
)
def test_unknown_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_loss(*arguments)


def test_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'beta'"):
        get_loss("dpo", betta=0.1)


def test_an_object_is_taken_as_it_is_and_without_options():
    loss = DPO(beta=0.7)
    assert get_loss(loss) is loss
    with pytest.raises(ValueError, match="not with an object"):
        get_loss(loss, beta=0.1)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "0.1", True, None])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("dpo", "beta"),
        ("ipo", "beta"),
        ("simpo", "beta"),
        ("bipo", "beta"),
        ("unlikelihood", "alpha"),
        ("split", "gamma"),
    ],
)
def test_bad_hyperparameter(name, option, value):
    with pytest.raises(ValueError, match=option):
        get_loss(name, **{option: value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reps", {"factors": []}, "at least one strength"),
        ("reps", {"factors": [1.0, 0.0]}, r"factors\[1\]=0.0"),
        ("reps", {"suppress": "nul"}, "'null', 'negative', 'none'"),
        ("one_shot", {"mode": "promote"}, "'promotion', 'suppression', 'mixed'"),
        ("one_shot", {"mode": "suppression", "satisfice": True}, "promotes nothing"),
        ("split", {"theta": float("nan")}, "theta"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_loss(name, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1"])
def test_bad_gamma(value):
    with pytest.raises(ValueError, match="gamma"):
        get_loss("simpo", gamma=value)


def test_a_new_file_is_a_new_loss(tmp_path, monkeypatch):
    (tmp_path / "new_hinge.py").write_text(
        "from dataclasses import dataclass\n"
        "from steertune.losses import Loss\n"
        "class Helper: pass\n"
        "@dataclass(frozen=True)\n"
        "class Hinge(Loss):\n"
        "    width: float = 1.0\n"
        "    def __call__(self, at, generator=None):\n"
        "        return (self.width - at(1).chosen.logps + at(1).rejected.logps).clamp_min(0)\n"
    )
    before = names()
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "steertune.losses.new_hinge", raising=False)
    assert names() == sorted([*before, "new_hinge"])
    loss = get_loss("new_hinge", width=3.0)
    assert loss(lambda s: one_pair([-1.0], [-2.0])).tolist() == [2.0]
    trained("dpo", tmp_path / "out", loss="new_hinge", max_steps=1)


# -- what a loss needs ------------------------------------------------------------------------------------------------


def test_single_attributes_declare_needs_for_one_more_release():
    message = r"Tokens declares pairs, unit, strengths as .* `needs = Needs\(pairs=\.\.\., unit=\.\.\., "
    with pytest.warns(FutureWarning, match=message):

        class Tokens(Loss):
            pairs: ClassVar[bool] = False
            unit = "token"

            def __init__(self, strength):
                self.strength = strength

            @property
            def strengths(self):
                return (self.strength,)

            def __call__(self, at, generator=None):
                return -at(self.strength).token_logps

    assert Tokens(2.0).needs == Needs(pairs=False, unit="token", strengths=(2.0,))
    assert get_loss(Tokens(3.0), neutral_kl=1.0).needs == Needs(
        pairs=False, unit="token", reference=True, strengths=(3.0,), views=("neutral",)
    )


def test_a_single_attribute_of_a_subclass_is_added_to_what_its_parent_needs():
    with pytest.warns(FutureWarning, match="declares strengths"):

        @dataclass(frozen=True)
        class Doubled(DPO):
            strengths = (2.0,)

    assert Doubled().needs == Needs(reference=True, strengths=(2.0,)) and DPO().needs == Needs(reference=True)


def test_a_need_can_be_read_as_an_attribute_for_one_more_release():
    with pytest.warns(FutureWarning, match=r"`loss.reference` is now `loss.needs.reference`"):
        assert get_loss("dpo").reference
    with pytest.raises(AttributeError, match="'DPO' object has no attribute 'refrence'"):
        getattr(get_loss("dpo"), "refrence")  # noqa: B009  # misspelt, which a type checker refuses


def test_terms_and_stages_combine_needs():
    assert get_loss("simpo", neutral_kl=0.1, change_cap=1.0).needs == Needs(
        reference=True, views=("neutral",), states=True
    )
    staged = get_loss("lorra", then=get_loss("reps", factors=[2.0]))
    assert staged.needs == Needs(reference=True, strengths=(2.0, "null"), views=("good", "bad"), states=True)
    assert get_loss("cross_entropy", contrast="difference").needs == Needs()
