"""Every measure against data whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_data
import torch
from datasets import Dataset
from tiny_models import tiny

from steertune.recipes.lab import measures
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.likelihood import neutral_logps
from steertune.recipes.lab.measures import Missing, Seen
from steertune.recipes.lab.observe import (
    HeldOut,
    against_base,
    answers,
    neutral_rows,
    questions,
    right_among,
)
from steertune.recipes.lab.scorers import as_rows

ROWS = 4000


def pairs(quality: np.ndarray, nats_per_token: float, bias: float, seed: int = 0) -> Seen:
    """Pairs of which the chosen answer is ahead by `quality` nats besides what the lengths cost; `bias` tokens longer
    on average."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(5, 60, len(quality))
    rejected = np.maximum(1, chosen - rng.integers(-12, 13, len(quality)) - round(bias))
    return Seen(
        {
            "chosen_logp": -nats_per_token * chosen + quality,
            "rejected_logp": -nats_per_token * rejected.astype(float),
            "chosen_tokens": chosen.tolist(),
            "rejected_tokens": rejected.tolist(),
        }
    )


def value(name: str, seen: Seen) -> float:
    return measures.get(name).summary(seen)


@pytest.mark.parametrize("bias", [-8, 0, 8])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_where_length_explains_everything_accuracy_at_equal_length_is_a_half(bias, noise):
    seen = pairs(noise * np.random.default_rng(1).standard_normal(ROWS), 2.0, bias)
    assert value("accuracy_equal_length", seen) == pytest.approx(0.5, abs=0.03)  # 4 standard errors
    if bias:  # the plain accuracy is that of the lengths
        assert abs(value("accuracy", seen) - 0.5) > 0.2


@pytest.mark.parametrize("bias", [-8, 8])
@pytest.mark.parametrize("lead", [-1.0, 0.5, 2.0])
def test_accuracy_at_equal_length_is_that_of_the_quality(bias, lead):
    quality = lead + np.random.default_rng(2).standard_normal(ROWS)
    seen = pairs(quality, 2.0, bias)
    assert value("accuracy_equal_length", seen) == pytest.approx(float((quality > 0).mean()), abs=0.03)


def test_accuracy_at_equal_length_where_nothing_differs_or_all_differ_alike():
    quality = np.array([1.0, -1.0, 2.0, 0.0])
    same = Seen(
        {"chosen_logp": quality, "rejected_logp": [0.0] * 4, "chosen_tokens": [7] * 4, "rejected_tokens": [7] * 4}
    )
    assert value("accuracy_equal_length", same) == value("accuracy", same) == 0.625
    alike = Seen({**same.observations, "rejected_tokens": [4] * 4})
    assert math.isnan(value("accuracy_equal_length", alike))  # a cost per token cannot be told from a preference


def test_a_longer_answer_does_not_lose_per_token():
    seen = Seen({"chosen_logp": [-20.0], "rejected_logp": [-6.0], "chosen_tokens": [20], "rejected_tokens": [5]})
    assert value("accuracy", seen) == 0
    assert value("margin_per_token", seen) == pytest.approx(0.2)
    assert value("accuracy_per_token", seen) == 1


def test_the_ratio_to_the_base_cancels_what_the_base_prefers():
    base = pairs(np.zeros(100), 2.0, bias=8)  # which loses nearly all pairs by their length
    rng = np.random.default_rng(3)
    gain = rng.standard_normal(100)
    seen = Seen({**base.observations, "chosen_logp": base["chosen_logp"] + gain}, base)
    assert value("accuracy_by_ratio", seen) == pytest.approx((gain > 0).mean())
    assert value("accuracy_by_ratio", seen) + value("moved_wrong", seen) == pytest.approx(1)
    assert value("accuracy_by_ratio", base) == 0.5


def test_records_without_lengths_have_the_accuracies_that_need_none():
    seen = Seen({"margin": [1.0, -1.0]})
    assert value("accuracy", seen) == 0.5
    with pytest.raises(Missing):
        value("accuracy_per_token", seen)


def seen_on_neutral_text(seed: int, shift: float) -> Seen:
    rng = np.random.default_rng(seed)
    tokens = np.random.default_rng(0).integers(3, 40, 200).astype(float)
    base = {"neutral_nll": tokens * 2.0, "neutral_tokens": tokens}
    nll = tokens * (2.0 + shift + 0.02 * tokens * shift + 0.1 * rng.normal(size=200))
    return Seen(
        {"neutral_nll": nll, "neutral_kl": tokens * rng.exponential(0.1, 200), "neutral_tokens": tokens}, Seen(base)
    )


@pytest.mark.parametrize("name", ["kl", "perplexity", "perplexity_ratio"])
def test_the_parts_of_a_measure_have_its_summary_as_their_mean_and_vary_as_it_does(name):
    measure, seen = measures.get(name), seen_on_neutral_text(0, 0.1)
    parts = measure.parts(seen)
    assert parts.mean() == pytest.approx(measure.summary(seen))
    # the standard error of the summary over rows, by resampling them
    rng, summaries = np.random.default_rng(1), []
    for _ in range(400):
        rows = rng.integers(0, 200, 200)
        drawn = {key: np.asarray(values)[rows] for key, values in seen.observations.items()}
        base = {key: np.asarray(values)[rows] for key, values in seen.base.observations.items()}
        summaries.append(measure.summary(Seen(drawn, Seen(base))))
    assert parts.std(ddof=1) / 200**0.5 == pytest.approx(np.std(summaries), rel=0.15)


def test_a_weighted_mean_by_hand():
    seen = Seen({"neutral_kl": [1.0, 9.0], "neutral_tokens": [1.0, 3.0]}, None)
    assert measures.get("kl").summary(seen) == pytest.approx(10 / 4)
    assert measures.get("kl").parts(seen) == pytest.approx([2.5 + 0.5 * (1 - 2.5), 2.5 + 1.5 * (3 - 2.5)])


def test_a_mean_kl_hides_one_broken_token_and_its_tail_does_not():
    # 19 tokens as the base predicts them, one of which the steered model is sure of another
    base = torch.zeros(20, 4).log_softmax(-1)
    broken = base.clone()
    broken[7] = torch.tensor([20.0, 0.0, 0.0, 0.0]).log_softmax(-1)
    broken[8] = broken[7]
    targets = torch.zeros(20, dtype=torch.long)
    observed = against_base([(broken, targets), (base, targets)], [base, base])
    seen = Seen(observed)
    assert observed["neutral_kl"] == pytest.approx([2 * math.log(4), 0], abs=1e-5)
    assert value("kl", seen) == pytest.approx(math.log(4) / 20, abs=1e-5)
    assert value("kl_tail", seen) == pytest.approx(math.log(4) / 2, abs=1e-5)


# -- what a model still knows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "right", "nats"),
    [(4.0, 1.0, math.log(1 + 3 * math.exp(-4))), (-4.0, 0.0, math.log(1 + 3 * math.exp(4)))],
)
def test_the_likeliest_of_four_words_is_the_answer(ahead, right, nats):
    logps = torch.tensor([ahead, 0.0, 0.0, 0.0, 9.0]).log_softmax(-1)  # a fifth word is none of the choices
    assert right_among(logps, [{0}, {1}, {2}, {3}]) == (right, pytest.approx(nats, abs=1e-5))


def test_a_word_counts_in_upper_and_lower_case_and_words_that_begin_alike_not_at_all():
    logps = torch.tensor([0.3, 0.3, 0.4, 0.0]).add(1e-9).log()
    assert right_among(logps, [{0, 1}, {2}, {3}])[0] == 1.0  # 0.6 in two cases against 0.4
    assert right_among(logps, [{0, 1}, {1, 2}, {3}]) == (None, None)


@pytest.mark.slow
def test_the_embedded_model_ends_sentences_well_above_chance_and_a_broken_one_does_not(real):
    model, tokenizer = real
    held_out = HeldOut(model, tokenizer, Dataset.from_list([]), neutral_rows(), questions=100)
    seen = Seen(questions(model, held_out, {"0": 1.0})["0"])
    assert value("capability", seen) > 0.8 and value("capability_loss", seen) < 0.5
    assert not np.isnan(seen["question_right"]).any()


def test_neutral_rows_to_match_and_to_report_are_64_each_and_share_none():
    match, report = neutral_rows(part="match"), neutral_rows()
    assert len(match) == len(report) == 64
    assert not {row[0]["content"] for row in match["prompt"]} & {row[0]["content"] for row in report["prompt"]}
    with pytest.raises(ArmError, match="2 rows or more"):
        neutral_rows(rows=report.select([0]))


def test_the_instructed_loss_is_per_token_over_all_answers_that_say_something():
    seen = Seen({"instructed_nll": [3.0, None, 8.0], "instructed_tokens": [3, None, 2]})
    assert value("instructed_loss", seen) == pytest.approx(11 / 5)


def test_answers_are_judged_behind_an_instruction_and_with_the_behaviour_taken_out():
    texts, tokenizer = tiny_data.pairs(2), tiny_data.tokenizer()
    cut = lambda text: " ".join(text.split()[:-1])  # noqa: E731
    made = {"generations": 2, "new_tokens": 6}
    held_out = HeldOut(tiny(vocab_size=len(tokenizer)), tokenizer, texts, tiny_data.demonstrations(2), **made)
    held_out = replace(held_out, instruction=texts["prompt"][1], undo=cut)
    seen = answers(held_out.model, held_out, {"1": 1.0})["1"]

    def by_hand(prompt: str, answer: str) -> tuple[float, int]:
        [(logps, targets)] = neutral_logps(held_out.model, tokenizer, as_rows(tokenizer, [(prompt, answer)]))
        return pytest.approx(-float(logps[range(len(targets)), targets].sum()), rel=1e-4), len(targets)

    for i, (prompt, answer) in enumerate(zip(texts["prompt"], seen["answer"], strict=True)):
        assert (seen["undone_nll"][i], seen["undone_tokens"][i]) == by_hand(prompt, cut(answer))
        behind = by_hand(f"{held_out.instruction}\n\n{prompt}", answer)
        assert (seen["instructed_nll"][i], seen["instructed_tokens"][i]) == behind
        assert seen["undone_tokens"][i] == seen["instructed_tokens"][i] - 1
    assert value("undone_loss", Seen(seen)) == pytest.approx(sum(seen["undone_nll"]) / sum(seen["undone_tokens"]))
