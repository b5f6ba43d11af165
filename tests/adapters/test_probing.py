"""Directions as readers, and what is left to read after LEACE."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from steertune.adapters.analysis.erasure import erase
from steertune.adapters.analysis.probing import read
from steertune.recipes.studies import probes


def states(pairs: int = 200, d: int = 6, gap: float = 1.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes with correlated noise, `gap` apart."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(9))
    shift = torch.zeros(d)
    shift[0] = gap
    return tuple(torch.randn(pairs, d, generator=generator) @ mixing + k * shift for k in (1, 0))


# -- reading ----------------------------------------------------------------------------------------------------------


def test_reading_by_hand():
    direction = torch.tensor([2.0, 0.0])
    fitted = (torch.tensor([[2.0, 9.0], [3.0, 0.0]]), torch.tensor([[-2.0, 5.0], [-3.0, 1.0]]))
    held_out = (
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [4.0, 0.0]]),
        torch.tensor([[-1.0, 0.0], [3.0, 0.0], [4.0, 0.0]]),
    )
    found = read(direction, fitted, held_out)
    assert found.pair_accuracy == pytest.approx((1 + 0 + 0.5) / 3)
    assert found.accuracy == pytest.approx((1 + 0 + 1 + 1 + 0 + 0) / 6)
    # chosen 1, -1, 4 against rejected -1, 3, 4: larger in 1 + 0 + 2, equal in 0 + 1 + 1 of nine
    assert found.auroc == pytest.approx((3 + 2 / 2) / 9)


def test_a_probability_that_says_what_happens_is_calibrated():
    fitted, held_out = states(2000), states(2000, seed=1)
    honest = read(torch.eye(6)[0], fitted, held_out)
    assert honest.calibration_error < 0.03 and honest.brier < 0.25
    # fitted on what is far apart, it is sure of itself and wrong
    sure = read(torch.eye(6)[0], states(2000, gap=6.0), held_out)
    assert sure.calibration_error > 0.1 and sure.brier > honest.brier
    assert sure.auroc == honest.auroc, "ranking needs no probability"


@pytest.mark.parametrize("direction", [torch.zeros(6), torch.full((6,), torch.nan)])
def test_a_direction_that_reads_nothing_is_refused(direction):
    with pytest.raises(ValueError, match="zero or not finite"):
        read(direction, states(8), states(8))


# -- erasing ----------------------------------------------------------------------------------------------------------


def accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """Of an unregularised logistic probe, on the states it was fitted on."""
    x, y = torch.cat([chosen, rejected]).numpy(), np.repeat([1, 0], [len(chosen), len(rejected)])
    return float(LogisticRegression(C=1e9, max_iter=5000).fit(x, y).score(x, y))


@pytest.mark.parametrize("rejected_rows", [200, 120])
def test_no_linear_probe_beats_chance_after_erasure(rejected_rows):
    """The theorem: both classes have the same mean, so the best logistic loss is that of the class frequencies."""
    chosen, rejected = (side.double() for side in states())
    rejected = rejected[:rejected_rows]
    eraser = erase(chosen, rejected)
    clean, rest = eraser(chosen), eraser(rejected)
    torch.testing.assert_close(clean.mean(dim=0), rest.mean(dim=0), atol=1e-10, rtol=0)
    most = len(chosen) / (len(chosen) + rejected_rows)
    assert accuracy(chosen, rejected) > most + 0.1
    assert accuracy(clean, rest) < most + 0.02


def test_erasing_changes_as_little_as_it_can():
    """In the whitened metric no other map with equal class means moves states less: compare with dropping u itself."""
    chosen, rejected = (side.double() for side in states())
    x = torch.cat([chosen, rejected])
    eraser = erase(chosen, rejected)
    whitening = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T, correction=0)))

    def moved(erased: torch.Tensor) -> float:
        return float(((erased - x) @ whitening.T).square().sum())

    u = eraser.written / eraser.written.norm()
    plain = x - ((x - x.mean(dim=0)) @ u)[:, None] * u
    assert moved(eraser(x)) < moved(plain)
    torch.testing.assert_close(eraser(eraser(x)), eraser(x))
    assert float(eraser.read @ eraser.written) == pytest.approx(1)


def test_what_is_written_is_the_mean_difference():
    chosen, rejected = states()
    eraser = erase(chosen, rejected)
    gap = (chosen.mean(dim=0) - rejected.mean(dim=0)).double()
    assert torch.nn.functional.cosine_similarity(eraser.written, gap, dim=0) == pytest.approx(1)
    assert eraser(chosen).dtype == chosen.dtype


def test_erasing_where_there_are_fewer_states_than_dimensions():
    chosen, rejected = states(5, d=6)
    eraser = erase(chosen[:, :].repeat(1, 4), rejected.repeat(1, 4))
    clean, rest = eraser(chosen.repeat(1, 4)), eraser(rejected.repeat(1, 4))
    torch.testing.assert_close(clean.mean(dim=0), rest.mean(dim=0), atol=1e-5, rtol=0)


def test_nothing_to_erase_is_said():
    chosen, _ = states()
    with pytest.raises(ValueError, match="the same mean"):
        erase(chosen, chosen)


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipe_reads_every_direction(tmp_path, capsys):
    import tiny_data

    tiny_data.save_model(tmp_path / "model", max_position_embeddings=512)
    task = tiny_data.save_task(tmp_path / "task", train=tiny_data.pairs(20, 20), test=tiny_data.pairs(6, 6))
    words = [task, "--model", str(tmp_path / "model"), "--train", "16", "--test", "6",
             "--threads", "1", "--folder", str(tmp_path / "run")]  # fmt: skip
    assert probes.main(words) == 0
    found = json.loads((tmp_path / "run" / "probes.json").read_text())
    assert [row["method"] for row in found] == probes.directions.names()
    for row in found:
        assert 0 <= row["auroc"] <= 1 and 0 <= row["layer"] < 4 and 0 <= row["accuracy_erased"] <= 1
    printed = capsys.readouterr().out
    assert all(f"| `{row['method']}` | {row['layer']} |" in printed for row in found)
    assert probes.main([*words, "--train", "4"]) == 2
    assert "--train 4: 8 pairs or more" in capsys.readouterr().err
    assert probes.main([*words, "--methods", "lad"]) == 2
    assert "Did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["arithmetic", "erasure"])
def test_the_old_names_of_moved_modules_work_for_one_more_release(name, monkeypatch):
    old, new = f"steertune.adapters.{name}", f"steertune.adapters.analysis.{name}"
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=f"Import {new} instead of {old}"):
        assert importlib.import_module(old) is importlib.import_module(new)
