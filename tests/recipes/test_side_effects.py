"""Side effects beside effects: the table, the figure, and the interval of every measure."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from steertune.recipes.lab import measures
from steertune.recipes.lab.intervals import interval, of_measure
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.pages import Figure, Table
from steertune.recipes.lab.pages.side_effects import of_strengths, side_effects, with_ends
from steertune.recipes.lab.rows import Record


def neutral(rows: int, seed: int) -> dict[str, list[float]]:
    """Observations on neutral rows of different lengths."""
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(5, 40, rows)
    return {
        "neutral_kl": (tokens * numbers.gamma(2.0, 0.05, rows)).tolist(),
        "neutral_nll": (tokens * numbers.normal(2.0, 0.3, rows)).tolist(),
        "neutral_tokens": tokens.tolist(),
    }


def pairs(wrong: int, rows: int) -> dict[str, list[float]]:
    return {"chosen_logp": [-2.0] * rows, "rejected_logp": [-1.0] * wrong + [-3.0] * (rows - wrong)}


def test_shares_have_wilsons_interval() -> None:
    for wrong in (0, 3):
        found = of_measure(measures.get("accuracy"), Seen(pairs(wrong, 40)))
        expected = stats.binomtest(40 - wrong, 40).proportion_ci(method="wilson")
        assert found is not None and (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_mean_without_weights_has_the_interval_of_its_rows() -> None:
    numbers = np.random.default_rng(0).normal(1.0, 1.0, 12)
    seen = Seen({"chosen_logp": numbers.tolist(), "rejected_logp": [0.0] * 12})
    found, expected = of_measure(measures.get("margin"), seen), interval(numbers)
    assert found is not None
    assert (found.estimate, found.low, found.high) == pytest.approx((expected.estimate, expected.low, expected.high))


@pytest.mark.parametrize("rows", [16, 40])
def test_weighted_means_have_the_interval_of_a_bootstrap_over_rows(rows: int) -> None:
    seen = neutral(rows, seed=rows)
    found = of_measure(measures.get("kl"), Seen(seen))
    draws = np.random.default_rng(1).integers(0, rows, (4000, rows))
    nats, tokens = (np.array(seen[name])[draws] for name in ("neutral_kl", "neutral_tokens"))
    low, high = np.quantile(nats.sum(axis=1) / tokens.sum(axis=1), [0.025, 0.975])
    assert found is not None and found.estimate == pytest.approx(sum(seen["neutral_kl"]) / sum(seen["neutral_tokens"]))
    # Student's t is wider than percentiles where there are few rows
    width = found.high - found.low
    assert 0.9 < width / (high - low) < 1.35 and found.low < found.estimate < found.high


def test_a_perplexitys_ends_are_exponentials() -> None:
    base, steered = neutral(16, 1), neutral(16, 2)
    steered["neutral_tokens"] = base["neutral_tokens"]
    found = of_measure(measures.get("perplexity_ratio"), Seen(steered, Seen(base)))
    assert found is not None and 0 < found.low < found.estimate < found.high


def test_the_interval_of_a_share_stays_between_0_and_1() -> None:
    answers = ["one two three four", " ".join(9 * ["ah"]), "one two three"]
    seen = Seen({"answer": answers, "margin": [0.0, 1.0, 2.0]})
    repetition, accuracy = (of_measure(measures.get(name), seen) for name in ("repetition", "accuracy"))
    assert repetition is not None and (repetition.low, repetition.high) == (0, 1)
    assert accuracy is not None and accuracy.low > 0 and accuracy.high == 1, "a tie is neither 0 nor 1"


def test_what_is_never_negative_has_no_negative_end_and_few_rows_have_none() -> None:
    found = of_measure(measures.get("neutral_repetition"), Seen({"neutral_answer": ["a b c a b c a", "x y z w v u"]}))
    assert found is not None and found.low == 0.0
    one = of_measure(measures.get("neutral_repetition"), Seen({"neutral_answer": ["a b c a b c a"]}))
    assert with_ends(one) == "0.400 [unknown]"
    assert of_measure(measures.get("kl"), Seen({})) is None and with_ends(None) == ""


def test_every_strength_has_its_side_effects_in_table_and_figure() -> None:
    record = Record({"arm": "a", "task": "t", "examples": 1, "seed": 0})
    for at, (wrong, seed) in {"0": (20, 0), "-1": (30, 3), "2": (2, 4)}.items():
        record.observations[at] = pairs(wrong, 40) | neutral(16, seed) | {"neutral_answer": ["a b c d", "a b c a b c"]}
        record.observations[at]["neutral_tokens"] = neutral(16, 0)["neutral_tokens"]
    _, table, figure = of_strengths(record)
    assert isinstance(table, Table) and isinstance(figure, Figure)
    assert [row[0] for row in table.rows] == ["-1", "0", "2"]
    assert table.header[1:] == [
        "held-out pair accuracy",
        "KL to the base, nats per token",
        "perplexity, times the base's",
        "repetition in neutral answers",
    ]
    assert all("[" in cell for row in table.rows for cell in row[1:])
    panels = [axis for axis in figure.drawing.axes if axis.get_visible()]
    assert len(panels) == 4 and all(axis.containers for axis in panels), "a panel a measure, with error bars"


def test_models_with_names_stand_side_by_side() -> None:
    _, table, figure = side_effects({"base": Seen(pairs(3, 8)), "prompted": Seen(pairs(1, 8))}, "model", "models")
    assert isinstance(table, Table) and isinstance(figure, Figure)
    assert table.header == ["model", "held-out pair accuracy"] and [row[0] for row in table.rows] == [
        "base",
        "prompted",
    ]
    assert [text.get_text() for text in figure.drawing.axes[0].get_xticklabels()] == ["base", "prompted"]
    assert side_effects({"base": Seen({})}) == []
