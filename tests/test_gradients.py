"""The noise of gradients: by hand, where it is known, and through the recipe."""

from __future__ import annotations

import json

import pytest
import tiny_data
import torch
from conftest import tiny

from steertune.recipes import gradients


def test_noise_by_hand():
    found = gradients.noise(torch.tensor([[3.0, 1.0], [5.0, -1.0]]))
    # mean (4, 0); deviations (1, 1) twice, over one degree of freedom
    assert found["noise"] == pytest.approx(4)
    assert found["signal"] == pytest.approx(16 - 4 / 2)
    assert found["ratio"] == pytest.approx(4 / 14)
    assert found["cosine_of_a_batch"] == pytest.approx((3 / 10**0.5 + 5 / 26**0.5) / 2)


def test_the_signal_is_unbiased_and_noise_alone_is_none():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.6, 0.8])
    found = [gradients.noise(truth + torch.randn(5, 2, generator=generator)) for _ in range(4000)]
    assert sum(one["signal"] for one in found) / 4000 == pytest.approx(1, abs=0.06)
    assert sum(one["noise"] for one in found) / 4000 == pytest.approx(2, abs=0.06)
    alone = gradients.noise(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert alone["ratio"] == float("inf")


def test_the_recipe_measures_every_contrast_on_the_same_batches(tmp_path, capsys):
    tiny(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tiny_data.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "task").mkdir()
    for split, rows in (("train", 12), ("test", 2)):
        tiny_data.pairs(rows, seed=rows).to_json(tmp_path / "task" / f"{split}.jsonl")
    words = [str(tmp_path / "task"), "--model", str(tmp_path / "model"), "--pairs", "12", "--batch", "4",
             "--threads", "1", "--folder", str(tmp_path / "run")]  # fmt: skip
    assert gradients.main(words) == 0
    found = {row["contrast"]: row for row in json.loads((tmp_path / "run" / "gradients.json").read_text())}
    assert list(found) == ["none", "unpaired", "shuffled", "in the prompt", "pairs"]
    assert found["pairs"]["cosine_with_pairs"] == pytest.approx(1)
    # at a vector of zeros DPO's gradient is linear in the answers, so who stands behind whom in a batch is no matter
    assert found["unpaired"]["noise"] == pytest.approx(found["pairs"]["noise"], rel=1e-3)
    assert len({round(row["noise"], 6) for row in found.values()}) == 4
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in found)
    assert gradients.main([*words, "--pairs", "4"]) == 2
    assert "two batches or more" in capsys.readouterr().err
