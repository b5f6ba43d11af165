"""What a pair loss contrasts the chosen answer with: by hand, and in training."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_data import history, losses, pairs, same, tokenizer, trained, trainer, values
from tiny_models import fill, tiny

from steertune.losses import Contrasted, Outputs, get_loss, names
from steertune.losses.bipo import BiPO
from steertune.losses.cross_entropy import CrossEntropy
from steertune.losses.dpo import DPO
from steertune.losses.ipo import IPO
from steertune.losses.simpo import SimPO
from steertune.losses.unlikelihood import Unlikelihood
from steertune.recipes.lab.batches import batches
from steertune.trainers import ModelAt

CONTRASTS = ["paired", "unpaired", "none"]
# Three pairs: chosen answers of 3, 1 and 2 tokens, then rejected ones of 2, 4 and 1.
LENGTHS = (3, 1, 2, 2, 4, 1)
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]


def model(strength: float) -> Outputs:
    """A plain function in place of a model: log-probabilities that differ at every strength."""
    generator = torch.Generator().manual_seed(int(strength) + 7)
    return Outputs((-0.1 - 2.9 * torch.rand(6, 4, generator=generator, dtype=torch.float64)) * MASK, MASK)


def answer(row: int, strength: float, per_token: bool = False) -> float:
    """Log-probability of an answer, token by token."""
    logps = model(strength).token_logps[row, : LENGTHS[row]].tolist()
    return sum(logps) / (len(logps) if per_token else 1)


def gain(row: int, strength: float = 1.0, per_token: bool = False) -> float:
    """How much likelier than under the reference an answer is."""
    return answer(row, strength, per_token) - answer(row, 0, per_token)


def minus_log_sigmoid(x: float) -> float:
    return log(1 + exp(-x))


def flip(d: int) -> torch.Generator:
    """A generator whose first draw makes BiPO's direction `d`."""
    seeds = range(100)
    drawn = (s for s in seeds if 2 * int(torch.randint(2, (), generator=torch.Generator().manual_seed(s))) - 1 == d)
    return torch.Generator().manual_seed(next(drawn))


# -- by hand ----------------------------------------------------------------------------------------------------------

# loss, contrast -> the value of pair i, whose rejected answer is row 3 + i
BY_HAND = {
    "dpo none": (DPO(beta=0.3), "none", lambda i: minus_log_sigmoid(0.3 * gain(i))),
    "dpo unpaired": (DPO(beta=0.3), "unpaired", lambda i: minus_log_sigmoid(0.3 * (gain(i) - gain(3 + (i + 1) % 3)))),
    "dpo paired": (DPO(beta=0.3), "paired", lambda i: minus_log_sigmoid(0.3 * (gain(i) - gain(3 + i)))),
    "ipo none": (IPO(beta=0.4), "none", lambda i: (gain(i, per_token=True) - 1.25) ** 2),
    "ipo unpaired": (
        IPO(beta=0.4),
        "unpaired",
        lambda i: (gain(i, per_token=True) - gain(3 + (i + 1) % 3, per_token=True) - 1.25) ** 2,
    ),
    "simpo unpaired": (
        SimPO(beta=2.5, gamma=0.7),
        "unpaired",
        lambda i: minus_log_sigmoid(2.5 * (answer(i, 1, True) - answer(3 + (i + 1) % 3, 1, True)) - 0.7),
    ),
    "bipo none": (BiPO(beta=0.2), "none", lambda i: minus_log_sigmoid(-0.2 * gain(i, -1.0))),
    "bipo unpaired": (
        BiPO(beta=0.2),
        "unpaired",
        lambda i: minus_log_sigmoid(-0.2 * (gain(i, -1.0) - gain(3 + (i + 1) % 3, -1.0))),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "contrast", "slow"), BY_HAND.values(), ids=BY_HAND)
def test_contrast_by_hand(loss, contrast, slow):
    expected = torch.tensor([slow(i) for i in range(3)], dtype=torch.float64)
    found = Contrasted(loss, contrast)(model, flip(-1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [DPO(), IPO(), SimPO(), BiPO()], ids=lambda loss: type(loss).__name__)
def test_unpaired_is_the_loss_on_rejected_rows_rolled_by_one(loss):
    def rolled(strength: float) -> Outputs:
        order = [0, 1, 2, 4, 5, 3]
        outputs = model(strength)
        return Outputs(outputs.token_logps[order], outputs.mask[order])

    found = get_loss(loss, contrast="unpaired")(model, flip(1))
    assert torch.equal(found, loss(rolled, flip(1)))
    assert not torch.equal(found, loss(model, flip(1)))


@pytest.mark.parametrize("name", [name for name in names() if get_loss(name).needs.pairs])
@pytest.mark.parametrize("options", [{}, {"mode": "mixed"}, {"mode": "mixed", "satisfice": True}], ids=str)
def test_unpaired_is_refused_exactly_where_it_changes_nothing(name, options):
    """Summed over the batch, a term of each answer does not depend on which answers belong together."""
    loss = get_loss(name, **(options if name == "one_shot" else {}))

    def total(scale: float, rows: list[int]) -> torch.Tensor:
        def at(strength: Any) -> Outputs:
            outputs = model(3.0 if strength == "null" else strength)
            return Outputs(scale * outputs.token_logps[rows], outputs.mask[rows])

        return loss(at, flip(1)).sum()

    # A hinge is linear where it is active on every pair, or on none: so at several scales of the log-probabilities.
    differences = [total(scale, [0, 1, 2, 4, 5, 3]) - total(scale, [0, 1, 2, 3, 4, 5]) for scale in (0.1, 1.0, 10.0)]
    unchanged = all(abs(difference) < 1e-9 for difference in differences)
    assert unchanged == loss.needs.separable
    if unchanged:
        with pytest.raises(ValueError, match="how they are paired changes nothing"):
            Contrasted(loss, "unpaired")


def test_a_term_around_a_loss_may_stand_inside_a_contrast():
    def at(strength: float, layers: Any = (), **_: Any) -> Outputs:
        outputs = model(strength)
        hidden = torch.full((int(MASK.sum()), 2), float(strength))
        return Outputs(outputs.token_logps, outputs.mask, dict.fromkeys(range(len(layers)), hidden) if layers else {})

    for contrast in ("unpaired", "none"):
        inside = Contrasted(get_loss("dpo", change_cap=0.1, cap_layers=[1]), contrast)
        outside = get_loss("dpo", contrast=contrast, change_cap=0.1, cap_layers=[1])
        assert torch.equal(inside(at), outside(at)) and not torch.equal(inside(at), get_loss("dpo")(at))


def gradients(contrast: str, loss: Any = None) -> torch.Tensor:
    """Of the mean loss with respect to the token log-probabilities of the trained model."""
    logps = model(1.0).token_logps.requires_grad_()
    seen = {1.0: Outputs(logps, MASK), 0.0: model(0.0)}
    get_loss(loss or DPO(beta=0.3), contrast=contrast)(seen.__getitem__).mean().backward()
    assert logps.grad is not None
    return logps.grad


@pytest.mark.parametrize("loss", [DPO(beta=0.3), IPO(beta=0.4)], ids=["dpo", "ipo"])
def test_without_contrast_no_gradient_comes_from_rejected_answers(loss):
    alone, paired = gradients("none", loss), gradients("paired", loss)
    assert not alone[3:].any() and paired[3:][MASK[3:]].all()
    assert alone[:3][MASK[:3]].all()


def test_gradient_of_chosen_answers_alone_by_hand():
    found = gradients("none")
    for i in range(3):
        # d/dx of -ln σ(β x) is -β σ(-β x), for every token of the answer
        expected = -0.3 / (1 + exp(0.3 * gain(i))) / 3
        assert found[i, : LENGTHS[i]].tolist() == pytest.approx([expected] * LENGTHS[i], abs=1e-12)


def test_unpaired_pushes_every_rejected_answer_by_another_pair_s_margin():
    found = gradients("unpaired")
    for i in range(3):
        rejected = 3 + (i + 1) % 3
        expected = 0.3 / (1 + exp(0.3 * (gain(i) - gain(rejected)))) / 3
        assert found[rejected, : LENGTHS[rejected]].tolist() == pytest.approx(
            [expected] * LENGTHS[rejected], abs=1e-12
        )


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("loss", [DPO(), BiPO(), IPO()], ids=["dpo", "bipo", "ipo"])
def test_at_the_reference_every_contrast_is_the_loss_itself(loss, contrast):
    """A model that has not moved has no margin, whatever it is contrasted with."""
    found = get_loss(loss, contrast=contrast)(lambda strength: model(0.0), flip(1))
    assert found.tolist() == pytest.approx([1 / (2 * loss.beta) ** 2 if isinstance(loss, IPO) else log(2)] * 3)


def test_the_difference_is_that_of_the_mean_losses_of_both_answers():
    found = get_loss("cross_entropy", contrast="difference")(model)
    expected = [(answer(3 + i, 1, True) - answer(i, 1, True)) / 2 for i in range(3)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    slopes = gradients("difference", get_loss("cross_entropy"))
    for row, tokens in enumerate(LENGTHS):
        sign = -1 if row < 3 else 1
        assert slopes[row, :tokens].tolist() == pytest.approx([sign / (2 * tokens * 3)] * tokens, abs=1e-12)


def test_what_both_answers_share_cancels_in_the_difference():
    """Every token is likelier by the same: the average over the contrast does not see it."""
    loss = get_loss("cross_entropy", contrast="difference")
    likelier = Outputs(model(1.0).token_logps + 0.7 * MASK, MASK)
    torch.testing.assert_close(loss(lambda strength: likelier), loss(model), rtol=0, atol=1e-12)
    assert loss.needs.pairs and loss.needs.unit == "example" and not loss.needs.reference


# -- objects ----------------------------------------------------------------------------------------------------------


def test_paired_is_the_loss_object_itself():
    loss = DPO(beta=0.3)
    assert get_loss(loss, contrast="paired") is loss
    assert get_loss("dpo", beta=0.3, contrast="paired") == loss
    assert get_loss(loss) is loss
    assert get_loss("cross_entropy", contrast="paired") == CrossEntropy()


def test_other_contrasts_wrap_it_by_name_or_object():
    assert get_loss("dpo", beta=0.3, contrast="none") == get_loss(DPO(beta=0.3), contrast="none")
    assert get_loss("dpo", contrast="none") == Contrasted(DPO(), "none") != Contrasted(DPO(), "unpaired")


@pytest.mark.parametrize("loss", [DPO(), SimPO(), BiPO()], ids=["dpo", "simpo", "bipo"])
def test_it_needs_what_the_loss_needs(loss):
    assert Contrasted(loss, "unpaired").needs == loss.needs


@pytest.mark.parametrize(
    ("loss", "contrast", "message"),
    [
        ("dpo", "non", "contrast='non' must be one of 'paired', 'unpaired', 'none'"),
        ("dpo", "difference", "DPO is a loss on pairs"),
        ("context_distillation", "difference", "such as cross_entropy"),
        ("dpo", "", "contrast='' must be one of"),
        ("cross_entropy", "none", "contrast='none' needs a loss on pairs, but CrossEntropy reads single answers"),
        (CrossEntropy(), "unpaired", "contrast='unpaired' needs a loss on pairs, but CrossEntropy reads single"),
        ("simpo", "none", "SimPO does not use.*cross_entropy"),
        (Unlikelihood(), "none", "Unlikelihood does not use.*cross_entropy"),
    ],
)
def test_what_makes_no_sense_is_refused(loss, contrast, message):
    with pytest.raises(ValueError, match=message):
        get_loss(loss, contrast=contrast)


def test_unpaired_needs_two_pairs_in_a_batch():
    one = Outputs(model(1.0).token_logps[[0, 3]], MASK[[0, 3]])
    with pytest.raises(ValueError, match=r"at least 2 pairs.*per_device_train_batch_size"):
        get_loss("dpo", contrast="unpaired")(lambda strength: one)
    get_loss("dpo", contrast="none")(lambda strength: one)


# -- in training ------------------------------------------------------------------------------------------------------


def with_reference(data: Dataset, chosen: float = 0.0, rejected: float = 0.0) -> Dataset:
    """The pairs with the base model's log-probabilities of their answers, less so many nats."""
    found: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
    base = tiny()
    for batch in batches(tokenizer(), data, 4):
        outputs = ModelAt(base, base, batch)(1.0)
        found["ref_chosen_logps"] += (outputs.chosen.logps - chosen).tolist()
        found["ref_rejected_logps"] += (outputs.rejected.logps - rejected).tolist()
    return Dataset.from_dict({**data.to_dict(), **found})


def of(contrast: str) -> Any:
    return get_loss("dpo", beta=0.5, contrast=contrast)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Any]:
    """Two steps with every contrast, the reference computed on the way or brought by the data."""
    folder = tmp_path_factory.mktemp("runs")
    data = {False: pairs(), True: with_reference(pairs())}
    return {
        (contrast, known): trained("dpo", folder, loss=of(contrast), data=data[known], max_steps=2)
        for contrast in CONTRASTS
        for known in data
    }


@pytest.mark.parametrize("known", [False, True], ids=["computed", "brought"])
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_training_starts_at_ln_2_and_moves(contrast, known, runs):
    first, second = losses(runs[contrast, known])
    assert first == pytest.approx(log(2), abs=2e-5)
    assert second != pytest.approx(log(2), abs=1e-4)
    assert all(p.isfinite().all() and p.abs().max() > 0 for p in values(runs[contrast, known].model).values())


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_reference_that_the_data_bring_trains_the_same(contrast, runs):
    computed, brought = (values(runs[contrast, known].model) for known in (False, True))
    assert computed.keys() == brought.keys()
    for name, value in computed.items():
        torch.testing.assert_close(brought[name], value, rtol=1e-3, atol=1e-4)
    before, after = (history(runs[contrast, known], "loss", "margin_gain")[-1] for known in (False, True))
    assert after == pytest.approx(before, abs=1e-3)


def test_every_contrast_trains_another_vector(runs):
    vectors = [values(runs[contrast, False].model) for contrast in CONTRASTS]
    assert not any(same(vectors[i], vectors[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# contrast -> the first loss where the data bring a reference 3 nats lower on chosen and 1 lower on rejected answers
BROUGHT = {
    "paired": minus_log_sigmoid(0.5 * (3 - 1)),
    "unpaired": minus_log_sigmoid(0.5 * (3 - 1)),
    "none": minus_log_sigmoid(0.5 * 3),
}


@pytest.mark.parametrize("contrast", BROUGHT)
def test_the_reference_is_the_one_that_the_data_bring(contrast, tmp_path):
    data = with_reference(pairs(), chosen=3.0, rejected=1.0)
    made = trained("dpo", tmp_path, loss=of(contrast), data=data, max_steps=1)
    assert made.args.precompute_ref_log_probs is False
    assert losses(made) == [pytest.approx(BROUGHT[contrast], abs=1e-4)]


def test_trained_loss_is_the_loss_of_its_batch(tmp_path):
    """The number that the trainer computes for a vector that is not zero."""
    for contrast in CONTRASTS:
        made = trainer("dpo", tmp_path, loss=of(contrast))
        fill(made.model)
        made.model.eval()
        inputs = next(iter(made.get_train_dataloader()))
        found = made.compute_loss(made.model, inputs).item()
        chosen, rejected = margins(made.model, inputs)
        against = {"paired": rejected, "unpaired": rejected[1:] + rejected[:1], "none": [0.0] * len(chosen)}[contrast]
        by_hand = [minus_log_sigmoid(0.5 * (a - b)) for a, b in zip(chosen, against, strict=True)]
        assert found == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


@torch.no_grad()
def margins(peft_model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
    """How much likelier than in the base model chosen and rejected answers are, from whole forward passes."""
    ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]

    def answers() -> torch.Tensor:
        logps = peft_model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
        return (logps.gather(2, ids[:, 1:, None])[..., 0] * mask).sum(dim=1)

    steered = answers()
    with peft_model.disable_adapter():
        gained = steered - answers()
    half = len(gained) // 2
    return gained[:half].tolist(), gained[half:].tolist()


def test_arguments_that_agree_with_the_loss_inside_are_accepted(tmp_path):
    trainer("dpo", tmp_path, loss=DPO(beta=0.2), beta=0.2)
    trainer("dpo", tmp_path, loss=Contrasted(DPO(beta=0.2), "none"), beta=0.2)


EVALUATED = {"eval_dataset": {"a": pairs(4, seed=9), "b": pairs(5, seed=9)}, "per_device_eval_batch_size": 4}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (5, {"max_steps": 2}, "5 pairs in batches of 4.*per_device_train_batch_size"),
        (5, {"max_steps": -1, "num_train_epochs": 1}, "5 pairs in batches of 4"),
        (5, {"max_steps": 1}, None),  # which takes the first batch only
        (9, {"max_steps": 2, "gradient_accumulation_steps": 2}, "9 pairs in batches of 4"),
        (9, {"max_steps": 1, "gradient_accumulation_steps": 2}, None),
        (5, {"max_steps": 2, "dataloader_drop_last": True}, None),
        (4, {"max_steps": 2, "per_device_train_batch_size": 1}, "4 pairs in batches of 1"),
        (4, {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, **EVALUATED}, "per_device_eval_batch_size"),
        (4, {"max_steps": 1, **EVALUATED}, None),
    ],
)
def test_unpaired_refuses_a_batch_of_one_pair_before_the_first_step(rows, options, message, tmp_path):
    loss = get_loss("dpo", contrast="unpaired", change_cap=9.0)
    made = trainer("dpo", tmp_path, loss=loss, data=pairs(rows), **options)
    if message is None:
        made.train()
        assert made.state.global_step == options["max_steps"]
        return
    with pytest.raises(ValueError, match=message):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules="all-linear"), None], ids=["lora", "full"])
def test_the_difference_trains_any_adapter(config, tmp_path):
    loss = get_loss("cross_entropy", contrast="difference", change_cap=1.0, cap_layers=3)
    options = {"ref_model": tiny()} if config is None else {}
    made = trained("dpo", tmp_path, loss=loss, peft_config=config, max_steps=8, learning_rate=1e-2, **options)
    margins = [entry["margin_gain"] for entry in history(made, "margin_gain")]
    assert margins[0] == pytest.approx(0, abs=1e-4) and margins[-1] > 0.5
