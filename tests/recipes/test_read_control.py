"""Directions read, control and silence as by hand, predictors are judged right, and the command goes on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_data import save_model, tokenizer
from tiny_models import tiny
from unlike_pairs import write

from steertune.recipes import cli
from steertune.recipes.lab.batches import batches
from steertune.recipes.studies.reading.choice import correlation, predictors, regret, silences, verdict
from steertune.recipes.studies.reading.directions import arc, fitted, projected, states_of, with_vectors
from steertune.recipes.studies.reading.jobs import read
from steertune.recipes.studies.reading.predictors import PREDICTORS, agreement, logit_lens, mean_gradients
from steertune.trainers import ModelAt


def pairs(count: int = 6) -> Dataset:
    words = "the a cat dog runs sits red blue sky".split()
    rows = [
        {"prompt": f"{words[i]} {words[i + 1]} ", "chosen": "we stay now", "rejected": "you go"} for i in range(count)
    ]
    return Dataset.from_list(rows)


def test_reading_by_hand():
    states = (torch.tensor([[2.0, 0.0], [4.0, 9.0]]), torch.tensor([[1.0, 5.0], [3.0, -5.0]]))
    result = read(torch.tensor([1.0, 0.0]), states)
    assert result["auroc"] == 0.75  # 2 > 1, 4 > 1, 4 > 3, and 2 < 3
    assert result["d_prime"] == pytest.approx((3 - 2) / 1.0)


def test_an_arc_turns_in_equal_steps_and_ends_at_its_end():
    start, end = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    between = arc(start, end)
    assert [*between] == [0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0]
    for degrees, vector in between.items():
        assert float(vector.norm()) == pytest.approx(1)
        assert math.degrees(math.acos(float(vector @ start))) == pytest.approx(degrees, abs=1e-2)
    torch.testing.assert_close(between[90.0], end)
    assert [*arc(start, start)] == [0.0]


def test_what_is_projected_out_is_gone_from_its_layer_on():
    model, direction = tiny(), torch.nn.functional.normalize(torch.randn(32), dim=0)
    silenced = projected(model, direction, 1, 4)
    ids = torch.tensor([[6, 7, 8, 9]])
    with torch.no_grad():
        hidden = silenced(ids, output_hidden_states=True).hidden_states
    assert float((hidden[1] @ direction).abs().max()) > 1e-3  # behind block 0
    for states in hidden[2:4]:
        assert float((states @ direction).abs().max()) < 1e-5


def test_directions_point_to_the_chosen_answers():
    states = states_of(tiny(), tokenizer(), pairs(), [1, 2], "completion_mean")
    made = fitted(["mean_difference", "lat"], states, 2, 0)
    assert {*made} == {"mean_difference", "lat", "random0", "random1"}
    for by_layer in made.values():
        for layer, vector in by_layer.items():
            assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
            assert float(vector @ (states.chosen[layer] - states.rejected[layer]).mean(0)) >= 0


def test_the_gradient_is_that_of_the_margin():
    model, rows, direction = tiny(), pairs(), torch.nn.functional.normalize(torch.randn(32), dim=0)
    gradient = mean_gradients(model, tokenizer(), rows, [1, 2])[2]

    def margin(size: float) -> float:
        moved = with_vectors(model, {2: direction * size})
        total = 0.0
        for batch in batches(tokenizer(), rows, 3):
            with torch.no_grad():
                outputs = ModelAt(moved, moved, batch)(1.0)
            sides = [side.logps / side.mask.sum(dim=1) for side in (outputs.chosen, outputs.rejected)]
            total += float((sides[0] - sides[1]).sum())
        return total / len(rows)

    slope = (margin(0.01) - margin(-0.01)) / 0.02
    assert float(gradient @ direction) == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_cheap_numbers_by_hand():
    differences = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert agreement(torch.tensor([1.0, 0.0]), (differences, torch.zeros(2, 2))) == pytest.approx(0.5)
    model = tiny()
    unembedding = model.get_output_embeddings().weight
    # the direction of a word of every chosen answer, against that of the rejected ones
    word, other = (tokenizer().get_vocab()[name] for name in ("stay", "go"))
    direction = (unembedding[word] - unembedding[other]).detach()
    assert logit_lens(model, tokenizer(), pairs(), direction) > logit_lens(model, tokenizer(), pairs(), -direction)


def records(rho: float, tasks: int = 8, silence: float = 0.5) -> list[dict]:
    """Settings in which AUROC ranks control as it is planted to, and the gradient perfectly."""
    draw, made = np.random.default_rng(0), []
    for task in range(tasks):
        control = np.sort(draw.random(10))
        noisy = rho * (control - 0.5) + (1 - abs(rho)) * draw.normal(0, 0.3, 10)
        for i in range(10):
            numbers = dict.fromkeys(PREDICTORS, float(draw.random())) | {"auroc": noisy[i], "gradient": control[i]}
            made.append({"task": f"t{task}", "seed": 0, "direction": f"d{i % 2}", "layer": i // 2, "read": "last",
                         "control": float(control[i]), "reached": True, "silence": silence, "text_auroc": 0.5,
                         **numbers})  # fmt: skip
        for i in range(3):
            made.append({**made[-1], "direction": f"random{i}", "silence": 0.01 * i, "control": 9.0})
    return made


@pytest.mark.parametrize(("rho", "side"), [(0.9, "for"), (-0.9, "against"), (0.0, "against")])
def test_the_planted_relation_of_reading_and_control_is_found(rho, side):
    assert verdict(records(rho))[0] == side


def test_the_predictor_that_ranks_as_control_does_has_no_regret():
    best = predictors(records(0.0))[0]
    assert best.name == "gradient" and best.regret.estimate == 0 and best.rho.estimate == pytest.approx(1)
    unit = [{"auroc": 1.0, "control": 0.2}, {"auroc": 1.0, "control": 0.6}, {"auroc": 0.5, "control": 1.0}]
    assert regret(unit, "auroc") == pytest.approx(0.6)  # a draw of the two that read best
    assert correlation([{"auroc": 1.0, "control": i} for i in range(4)], "auroc") is None


def test_silence_is_compared_with_random_directions():
    found = silences(records(0.0, silence=0.5))
    assert {*found} == {"d0", "d1"}
    assert found["d0"][0].estimate == pytest.approx(0.49) and found["d0"][1] == 1.0
    assert silences(records(0.0, silence=0.0))["d0"][1] == 0.0


@pytest.mark.slow
def test_the_command_on_a_tiny_model(tmp_path, capsys):
    save_model(tmp_path / "model")
    draw = np.random.default_rng(0)
    words = "the a cat dog runs sits red blue sky sea now then we you go stay".split()
    task = tmp_path / "task"
    task.mkdir()
    for split, count in (("train", 60), ("test", 12)):
        prompts = [" ".join(draw.choice(words, 6)) for _ in range(count)]
        write(
            task / f"{split}.jsonl",
            [{"prompt": p, "chosen": "we stay now", "rejected": "you go then"} for p in prompts],
        )
    (task / "behaviour.toml").write_text('[opposites]\npositive = "stay"\nnegative = "go"\n')
    line = ["read_control", str(task), "--model", str(tmp_path / "model"), "--layers", "1", "2", "--directions",
            "mean_difference", "lat", "--random", "1", "--train", "8", "--test", "6", "--threads", "1",
            "--folder", str(tmp_path / "run")]  # fmt: skip
    assert cli.main(line) == 0
    page = capsys.readouterr().out
    assert "chooses best" in page and "TF-IDF" in page
    measured = json.loads((tmp_path / "run" / "records.json").read_text())
    assert len(measured) == 2 * 3 and all(one["silence"] is not None for one in measured)
    assert cli.main(line) == 0  # nothing is measured again
    assert json.loads((tmp_path / "run" / "records.json").read_text()) == measured
