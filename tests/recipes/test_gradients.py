"""The noise of gradients: by hand, where it is known, and through the recipe."""

from __future__ import annotations

import json
import math

import pytest
import tiny_data
import torch

from steertune.recipes.studies import gradients


def test_noise_by_hand():
    found = gradients.noise(torch.tensor([[3.0, 1.0], [5.0, -1.0]]), torch.tensor([0.0, 2.0]))
    # mean (4, 0); deviations (1, 1) twice, over one degree of freedom
    assert found["noise"] == pytest.approx(4)
    assert found["signal"] == pytest.approx(16 - 4 / 2)
    assert found["ratio"] == pytest.approx(4 / 14)
    # along the second axis they are 1 and -1: all noise
    assert found["ratio_along"] == float("inf") and found["cosine_of_mean"] == pytest.approx(0)
    cosines = (1 / 10**0.5, -1 / 26**0.5)
    assert found["cosine"] == pytest.approx(sum(cosines) / 2)
    along = gradients.noise(torch.tensor([[3.0, 1.0], [5.0, -1.0]]), torch.tensor([0.1, 0.0]))
    assert along["ratio_along"] == pytest.approx(2 / (16 - 2 / 2))


def test_errors_are_the_spread_over_other_batches():
    def drawn(seed):
        return torch.randn(100, 3, generator=torch.Generator().manual_seed(seed)) + torch.tensor([1.0, 0.0, 0.0])

    behaviour = torch.tensor([1.0, 1.0, 0.0])
    found = gradients.errors(drawn(0), behaviour)
    cosines = torch.nn.functional.cosine_similarity(drawn(0), behaviour[None], dim=1)
    assert found["cosine"] == pytest.approx(float(cosines.std()) / 100**0.5, rel=1e-4), "that of a mean"
    others = [gradients.noise(drawn(seed), behaviour) for seed in range(1, 300)]
    for name in ("ratio", "ratio_along", "cosine_of_mean"):
        spread = float(torch.tensor([other[name] for other in others]).std())
        assert found[name] == pytest.approx(spread, rel=0.35), f"{name}: that of other batches"
    assert math.isnan(gradients.errors(torch.eye(2), behaviour[:2])["ratio"]), "one batch has no variance"


def test_the_signal_is_unbiased_and_noise_alone_is_none():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.6, 0.8])
    found = [gradients.noise(truth + torch.randn(5, 2, generator=generator), truth) for _ in range(4000)]
    assert sum(one["signal"] for one in found) / 4000 == pytest.approx(1, abs=0.06)
    assert sum(one["noise"] for one in found) / 4000 == pytest.approx(2, abs=0.06)
    alone = gradients.noise(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), truth)
    assert alone["ratio"] == float("inf")


def test_a_steady_gradient_may_have_nothing_to_do_with_the_behaviour():
    """What all prompts share is steady, and drowns the behaviour; matching the prompts takes it out."""
    generator = torch.Generator().manual_seed(0)
    behaviour, common = torch.eye(8)[0], torch.eye(8)[1]
    of_prompt = torch.randn(64, 8, generator=generator)
    chosen, rejected = of_prompt + 5 * common + behaviour, of_prompt + 5 * common - behaviour
    none, pairs = chosen, chosen - rejected + 0.1 * torch.randn(64, 8, generator=generator)
    apart = gradients.unmatched(none, pairs, pairs)["unmatched"]
    assert gradients.unmatched(none, pairs.roll(1, dims=0), pairs) == {}, "no sum of an answer's part and another's"
    found = [gradients.noise(one, behaviour) for one in (none, pairs, apart)]
    assert found[0]["ratio"] < 0.5 < found[0]["ratio_along"], "steady, and not about the behaviour"
    assert found[1]["cosine"] > 0.95 > 0.5 > found[0]["cosine"]
    torch.testing.assert_close(apart.mean(dim=0), pairs.mean(dim=0))
    assert found[2]["noise"] > 10 * found[1]["noise"], "the same mean, without the matched prompts"


def test_the_recipe_measures_every_contrast_on_the_same_batches(tmp_path, capsys):
    tiny_data.save_model(tmp_path / "model", max_position_embeddings=512)
    task = tiny_data.save_task(tmp_path / "task", train=tiny_data.pairs(12, 12), test=tiny_data.pairs(8, 8))
    words = [task, "--model", str(tmp_path / "model"), "--pairs", "12", "--batch", "4",
             "--held-out", "8", "--threads", "1", "--folder", str(tmp_path / "run")]  # fmt: skip
    assert gradients.main(words) == 0
    found = {row["contrast"]: row for row in json.loads((tmp_path / "run" / "gradients.json").read_text())}
    names = ["unmatched", "none", "unpaired", "shuffled", "in the prompt", "difference", "pairs"]
    assert list(found) == names
    assert found["unmatched"]["cosine_of_mean"] == pytest.approx(found["pairs"]["cosine_of_mean"], abs=1e-4)
    # at a vector of zeros DPO's gradient is linear in the answers, so who stands behind whom in a batch is no matter
    assert found["unpaired"]["noise"] == pytest.approx(found["pairs"]["noise"], rel=1e-3)
    assert len({round(row["noise"], 6) for row in found.values()}) == 6
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in found)
    assert gradients.main([*words, "--pairs", "4"]) == 2
    assert "two batches or more" in capsys.readouterr().err
    assert gradients.main([*words, "--held-out", "2"]) == 2
    assert "--held-out 2" in capsys.readouterr().err


def test_an_arm_that_changes_gradients_is_refused(tmp_path, capsys):
    assert gradients.main([str(tmp_path), "--model", "nowhere", "--arm", "lora_start_dpo"]) == 2
    assert "has a table [inductive_biases]: they change gradients" in capsys.readouterr().err


def test_an_arm_that_makes_examples_is_refused_before_anything_is_loaded(tmp_path, capsys):
    assert gradients.main([str(tmp_path), "--model", "nowhere", "--arm", "lora_templates_dpo"]) == 2
    assert "has a table [augmentation]: gradients makes no further examples" in capsys.readouterr().err
