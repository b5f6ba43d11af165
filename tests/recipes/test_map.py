"""The map of interventions finds an interaction that was planted, and nothing else, and predicts other sets."""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny

from steertune.adapters.blocks import find_blocks
from steertune.recipes import map as recipe
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.intervals import interval
from steertune.recipes.lab.pages import markdown
from steertune.recipes.mapping.effects import (
    NOTHING,
    Interaction,
    interaction,
    interactions,
    main_effects,
    prediction,
)
from steertune.recipes.mapping.interventions import random_sets, sets_to_measure
from steertune.recipes.mapping.page import MapResult, Spread, page_of, predicted, triangle
from steertune.recipes.mapping.page import main_effects as main_effect_bars

LAYERS = [0, 1, 2, 3, 4, 5]
ROWS = 24
WORD = 7


def made_up(layers, alone, pairs, noise=0.0, seed=0, rows=ROWS):
    """Margins of a function that is quadratic in signed interventions, on rows that differ."""
    rng = np.random.default_rng(seed)
    base, slope = rng.normal(size=rows), rng.uniform(0.5, 1.5, rows)

    def margin(of):
        signs = dict(of)
        linear = sum(alone[layer] * sign for layer, sign in signs.items())
        square = sum(signs[a] * signs[b] * pairs.get((a, b), 0.0) for a, b in itertools.combinations(sorted(signs), 2))
        return base + slope * (linear + square) + rng.normal(0, noise, rows)

    return margin


def test_effects_and_interactions_are_their_formulas():
    margin = made_up([1, 2, 3], {1: 0.5, 2: -0.2, 3: 0.0}, {(1, 3): 0.4})
    ours, _ = sets_to_measure([1, 2, 3])
    margins = {of: margin(of) for of in ours}
    slope = float(np.mean(margins[frozenset({(1, 1)})] - margins[NOTHING])) / 0.5
    by_place = {(one.layer, one.sign): one.mean for one in main_effects(margins, [1, 2, 3])}
    assert by_place[1, 1] == pytest.approx(0.5 * slope) == -by_place[1, -1]
    assert by_place[2, 1] == pytest.approx(-0.2 * slope) and by_place[3, 1] == pytest.approx(0)
    assert interaction(margins, 1, 3).mean() == pytest.approx(0.4 * slope)
    assert interaction(margins, 1, 2).mean() == pytest.approx(0, abs=1e-12)


def test_pairs_predict_what_main_effects_cannot():
    alone = dict(zip(LAYERS, [0.3, -0.1, 0.2, 0.0, 0.4, 0.1], strict=True))
    margin = made_up(LAYERS, alone, {(0, 3): 0.5, (2, 4): -0.4}, noise=0.01)
    others = random_sets(LAYERS, 30, seed=0)
    ours, _ = sets_to_measure(LAYERS)
    made = prediction({of: margin(of) for of in [*ours, *others]}, LAYERS, others)
    assert made.pairs > 0.95 > made.main and made.gain.low > 0
    assert made.gain.estimate == pytest.approx(made.pairs - made.main)
    # without interactions nothing is gained by them
    plain = made_up(LAYERS, alone, {}, noise=0.05)
    none = prediction({of: plain(of) for of in [*ours, *others]}, LAYERS, others)
    assert none.main > 0.9 and none.gain.low < 0.02


def test_the_sets_to_predict_are_new_and_of_three_to_five():
    others, (ours, _) = random_sets(LAYERS, 40, seed=1), sets_to_measure(LAYERS)
    assert len(set(others)) == 40 and not set(others) & set(ours)
    assert {len(of) for of in others} == {3, 4, 5} and all(len(dict(of)) == len(of) for of in others)
    with pytest.raises(ArmError, match="fewer --combinations"):
        random_sets([0, 1, 2], 9, seed=0)  # of three layers there are eight


class Planted:
    """A tiny model in which a vector behind block 1 can be read only through a rank-one edit of the MLP of block 4.

    The vector points where the MLP's inputs hardly vary, so the edit alone adds next to nothing; and what it adds,
    `⟨x, v⟩ u`, makes the word of the chosen answers likelier. Elsewhere vectors are random directions.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model: Any = tiny(num_hidden_layers=6, seed=seed)
        self.blocks: list[Any] = [block for _, block in find_blocks(self.model)]
        self.tokens = torch.randint(5, 20, (2, ROWS, 6), generator=generator)
        self.tokens[0, :, 1:] = WORD  # what chosen answers say
        inputs: list[torch.Tensor] = []
        handle = self.blocks[4].mlp.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
        with torch.no_grad():
            self.model(input_ids=self.tokens.flatten(0, 1))
        handle.remove()
        direction = torch.linalg.svd(inputs[0].flatten(0, 1), full_matrices=False).Vh[-1]
        width = len(direction)

        def random() -> torch.Tensor:
            vector = torch.randn(width, generator=generator)
            vector -= vector @ direction * direction  # only the planted vector can be read
            return 0.01 * vector / vector.norm()

        self.vectors = {layer: random() for layer in LAYERS} | {1: 0.01 * direction}
        self.controls = {layer: random() for layer in LAYERS}
        word = self.model.get_output_embeddings().weight[WORD].detach()
        self.reads, self.writes = direction, 2 * word / word.norm()

    def margins(self, of, vectors) -> np.ndarray:
        with ExitStack() as stack, torch.no_grad():
            for layer, sign in of:
                edits = layer == 4 and vectors is self.vectors
                module = self.blocks[4].mlp if edits else self.blocks[layer]
                hook = self._edit if edits else partial(self._add, sign * vectors[layer])
                stack.callback(module.register_forward_hook(hook).remove)
            sides = [self.model(input_ids=side).logits.double().log_softmax(-1) for side in self.tokens]
        chosen, rejected = (
            logps[:, :-1].gather(-1, side[:, 1:, None])[..., 0].mean(dim=1)
            for logps, side in zip(sides, self.tokens, strict=True)
        )
        return (chosen - rejected).numpy()

    def _add(self, vector, module, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    def _edit(self, module, args, output):
        return output + (args[0] @ self.reads)[..., None] * self.writes

    def interactions(self) -> list[Interaction]:
        ours, theirs = sets_to_measure(LAYERS)
        ours = [of for of in ours if all(sign > 0 for _, sign in of)]
        margins = {of: self.margins(of, self.vectors) for of in ours}
        controls = {of: self.margins(of, self.controls) for of in theirs}
        return interactions(margins, controls, LAYERS)


@pytest.mark.parametrize("draws", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_vector_that_another_layer_reads_is_flagged_and_no_unrelated_pair(draws):
    """In a model of width 32 the edit reads a little of every vector, so pairs with its layer do interact; the planted
    pair is the largest of them."""
    false = 0
    for seed in range(draws):
        by_pair = {(one.first, one.second): one for one in Planted(seed).interactions()}
        planted = by_pair.pop((1, 4))
        assert planted.flagged and planted.mean > max(abs(one.mean) for one in by_pair.values()), seed
        false += sum(one.flagged for pair, one in by_pair.items() if 4 not in pair)
    assert false <= 0.05 * 10 * draws


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_pair_far_outside_the_controls_is_flagged_and_no_other(noise):
    """Twenty draws of a function with one large interaction, against controls without it."""
    found, false = 0, []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        alone = dict(zip(LAYERS, rng.normal(0, 0.1, len(LAYERS)), strict=True))
        small = {pair: rng.normal(0, 0.01) for pair in itertools.combinations(LAYERS, 2)}
        planted = {**small, (1, 4): 0.2}
        ours, theirs = sets_to_measure(LAYERS)
        margin = made_up(LAYERS, alone, planted, noise, seed)
        random = made_up(
            LAYERS, dict.fromkeys(LAYERS, 0.0), {pair: rng.normal(0, 0.01) for pair in small}, noise, seed
        )
        flagged = {
            (one.first, one.second)
            for one in interactions({s: margin(s) for s in ours}, {s: random(s) for s in theirs}, LAYERS)
            if one.flagged
        }
        found += (1, 4) in flagged
        false.append(len(flagged - {(1, 4)}) / (len(small) - 1))
    assert found >= 19 and np.mean(false) <= 0.05


def test_the_page_says_what_was_decided():
    alone = dict(zip(LAYERS, [0.3, -0.1, 0.2, 0.0, 0.4, 0.1], strict=True))
    margin = made_up(LAYERS, alone, {(0, 3): 0.5}, noise=0.01)
    random = made_up(LAYERS, dict.fromkeys(LAYERS, 0.0), {}, noise=0.01, seed=1)
    others, (ours, theirs) = random_sets(LAYERS, 12, seed=0), sets_to_measure(LAYERS)
    margins = {of: margin(of) for of in [*ours, *others]}
    result = MapResult(
        task="made_up",
        direction="mean_difference",
        kl=0.03,
        rows=ROWS,
        strengths=dict.fromkeys(LAYERS, 1.5),
        effects=main_effects(margins, LAYERS),
        gradient=alone,
        interactions=interactions(margins, {of: random(of) for of in theirs}, LAYERS),
        prediction=prediction(margins, LAYERS, others),
        spread=Spread(4, [0, 2, 4], 0.6, 0.4, 0.2, interval(np.linspace(-0.3, -0.1, 12))),
        command="steertune map made_up",
    )
    page = markdown(page_of(result))
    assert "the vector at layer 4 does most" in page and "Interactions improve the prediction" in page
    assert "Flagged: 0 and 3" in page and "Keep to layer 4." in page
    assert "Rank correlation of the estimate with the effect: +1.00 over 6 layers" in page
    for drawing in (triangle(result), predicted(result), main_effect_bars(result)):
        drawing.draw_without_rendering()


@pytest.mark.real
@pytest.mark.slow
def test_a_task_is_mapped_and_an_interrupted_map_goes_on(tmp_path):
    words = ["cautious_advice", "--layers", "0.3", "0.5", "0.7", "--rows", "8", "--test", "8", "--train", "8"]
    words += ["--combinations", "3", "--threads", "1", "--folder", str(tmp_path / "map")]
    assert recipe.main(words) == 0
    file = tmp_path / "map" / "sets.json"
    whole = json.loads(file.read_text())
    page = (tmp_path / "map" / "page.md").read_text()
    file.write_text(json.dumps(whole[:5]))
    assert recipe.main(words) == 0
    again = {(record["kind"], record["set"]): record["margins"] for record in json.loads(file.read_text())}
    assert again == {(record["kind"], record["set"]): record["margins"] for record in whole}
    assert (tmp_path / "map" / "page.md").read_text() == page


def test_bad_requests(capsys):
    for words, message in (
        (["cautious_advice", "--kl", "0"], "--kl 0.0"),
        (["cautious_advice", "--layers", "3", "4"], "3 different layers"),
        (["cautious_advice", "--layers", "3", "4", "5", "--combinations", "9"], "fewer --combinations"),
        (["cautious_advice", "--layers", "3", "4", "99"], "99"),
    ):
        assert recipe.main(words) == 2
        assert message in capsys.readouterr().err
