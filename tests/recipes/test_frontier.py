"""What a report says of strengths: the frontier, damage, tasks as a sample, arms that win no claim, the tuning."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from made_cells import BETTER, CLOSED, RIGID, TARGETS, THAN, Made, rows_of_table, texts
from scipy import stats

from steertune.recipes.ablation.analysis import scores
from steertune.recipes.ablation.sections.damage import damage
from steertune.recipes.ablation.sections.frontier import frontier
from steertune.recipes.ablation.sections.limits import limits
from steertune.recipes.ablation.sections.measured import measured
from steertune.recipes.ablation.sections.method import method
from steertune.recipes.ablation.statistics.paired import difference
from steertune.recipes.ablation.strengths import EXTRAPOLATED, SHORT
from steertune.recipes.ablation.trials import best_first, landed_at, landing_factor, lead

HIGH = {BETTER: 0.3}
"""By how much arms are ahead of the others."""


def ahead(arm: str, task: int, seed: int, kl: float, gain: dict[str, float] = HIGH) -> list[float]:
    """Ten answers: one arm is well ahead, by about as much in every task and seed."""
    rng = np.random.default_rng([task, seed, *map(ord, arm)])
    return [0.4 + gain.get(arm, 0.0) + 0.01 * task + value for value in rng.normal(0, 0.01, 10)]


# -- tasks as a sample ------------------------------------------------------------------------------------------------


def by_task(gaps: Sequence[float], seed_noise: float = 0.0, row_noise: float = 0.0) -> Any:
    """Cells whose better arm is ahead by a number of its task, by more in seed 1, and by more in odd answers."""

    def values(arm: str, task: int, seed: int, kl: float) -> list[float]:
        own = arm == BETTER
        return [
            0.3 + own * (gaps[task] + seed_noise * (1 if seed else -1) + row_noise * (1 if row % 2 else -1))
            for row in range(10)
        ]

    return values


def test_a_claim_about_tasks_like_these_has_one_degree_of_freedom_less_than_tasks() -> None:
    gaps = [0.10, 0.20, 0.30, 0.44]
    findings = Made().findings(by_task(gaps, seed_noise=0.01, row_noise=0.02))
    # by hand: the mean is .26, the tasks' standard deviation 0.1451, t of 3 degrees 3.182
    error = 0.145144 / 2
    low, high = 0.26 - 3.182446 * error, 0.26 + 3.182446 * error
    p = 2 * stats.t.sf(0.26 / error, 3)
    sentence = findings.answer[0]
    assert f"+0.260 [{low:+.3f}, {high:+.3f}] (95 %, for other tasks like these; within these tasks [" in sentence
    assert f"p = {p:.3g}" in sentence and findings.verdict.side == "for"
    # within these tasks: seeds .25 .27 (variance of a mean .0001), rows .24 .28 (variance .000444 / 10)
    within = math.sqrt((0.0001 + 0.0004 * 10 / 9 / 10) / 4)
    ends = re.findall(r"within these tasks \[([+-][\d.]+), ([+-][\d.]+)\]", sentence)[0]
    assert (float(ends[1]) - float(ends[0])) / 2 / within == pytest.approx(stats.t.ppf(0.975, 4), rel=0.05)


def test_tasks_that_agree_by_chance_do_not_hide_their_seeds_and_rows() -> None:
    findings = Made().findings(by_task([0.2] * 4, seed_noise=0.1))
    wide = scores(findings.paired, findings.claim.column)
    gap = difference(wide[BETTER] - wide[THAN], findings.claim.sample)
    # seeds .1 .3: variance of a task's mean .01, of the mean of four .0025; three degrees of freedom, not four
    reach = 3.182446 * 0.05
    assert (gap.tasks.low, gap.tasks.high) == pytest.approx((0.2 - reach, 0.2 + reach), abs=1e-6)
    assert gap.p == pytest.approx(2 * stats.t.sf(0.2 / 0.05, 3))


def test_what_differs_from_task_to_task_is_decided_for_these_tasks_and_not_for_others() -> None:
    values = by_task([0.02, 0.05, 0.10, 0.45], 0.001, 0.001)
    sample, fixed = Made().findings(values), Made(claim={"tasks": "fixed"}).findings(values)
    assert (sample.verdict.side, fixed.verdict.side) == ("undecided", "for")
    assert "95 %, for other seeds and test rows of these tasks" in fixed.answer[0]


# -- arms that win no claim -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "claim", "side"),
    [
        (lambda kl: 1.0, {}, "for"),
        (lambda kl: 0.5, {}, "for"),
        (lambda kl: 2.0, {}, "for"),
        (lambda kl: 2.1, {}, "undecided"),
        (lambda kl: 0.45, {}, "undecided"),
        # outside at one KL of the frontier only: no claim over the frontier, but one at the matched KL
        (lambda kl: 3.0 if kl == 0.3 else 1.0, {}, "undecided"),
        (lambda kl: 3.0 if kl == 0.3 else 1.0, {"strength": "matched"}, "for"),
        (lambda kl: 3.0 if kl == 0.1 else 1.0, {"strength": "matched"}, "undecided"),
        (lambda kl: 3.0 if kl == 0.1 else 1.0, {"strength": "tuned"}, "undecided"),
        (lambda kl: 3.0 if kl == 0.3 else 1.0, {"strength": "tuned"}, "for"),
    ],
)
def test_a_trained_arm_wins_only_at_strengths_like_those_it_was_trained_at(strength, claim, side) -> None:
    made = Made(strength=lambda arm, kl: strength(kl) if arm == BETTER else 1.0, claim=claim)
    findings = made.findings(ahead)
    assert findings.verdict.side == side, findings.answer[0]
    assert ("vector DPO is extrapolated" in findings.answer[0]) == (side == "undecided")
    which = "arms that could win a claim is LoRA" if side == "undecided" else "is vector"  # nor is it the best
    assert which in findings.answer[2]


def test_closed_forms_have_no_strength_of_their_own_and_may_win() -> None:
    made = Made(
        strength=lambda arm, kl: 20.0 if arm == CLOSED else 1.0,
        claim={"better": "mean_difference", "than": "lora_dpo"},
    )
    findings = made.findings(lambda *cell: ahead(*cell, gain={CLOSED: 0.3}))
    assert findings.verdict.side == "for" and "extrapolated" not in " ".join(findings.answer)


def test_an_arm_that_is_behind_may_be_extrapolated() -> None:
    assert Made(strength=lambda arm, kl: 5.0 if arm == THAN else 1.0).findings(ahead).verdict.side == "for"


def test_an_arm_with_more_damage_than_a_sweep_allows_wins_nothing() -> None:
    broken = {"neutral_nll": [math.log(5.0) + 0.3]}  # a perplexity of 1.35 times the base's
    made = Made(observed=lambda arm, kl: broken if arm == BETTER and kl > 0 else {})
    findings = made.findings(ahead)
    assert findings.verdict.side == "undecided" and "(perplexity x 1.35), and wins no claim" in findings.answer[0]
    assert "The best mean of the 2 arms that could win a claim is" in findings.answer[2]
    assert "Left out: vector DPO is beyond what a sweep allows (perplexity x 1.35)." in findings.answer[2]


# -- the frontier -----------------------------------------------------------------------------------------------------


def rising(arm: str, task: int, seed: int, kl: float) -> list[float]:
    """More behaviour with more KL: .2, .4, .8."""
    level = {0.0: 0.1, 0.03: 0.2, 0.1: 0.4, 0.3: 0.8}[kl]
    return [level + (arm == BETTER) * 0.1 * kl + 0.001 * (task + seed)] * 10


def test_the_mean_over_log_kl_is_the_area_under_the_curve_by_hand() -> None:
    page = frontier.make(Made().findings(rising))
    table = rows_of_table(page.blocks, "frontier_behaviour")
    offset = 0.002  # mean of 0.001 * (task + seed)
    narrow, wide = math.log(0.1 / 0.03), math.log(0.3 / 0.1)
    area = ((0.2 + 0.4) / 2 * narrow + (0.4 + 0.8) / 2 * wide) / (narrow + wide) + offset
    assert table[THAN] == {
        "arm": THAN, "KL 0.03": "0.202", "KL 0.1": "0.402", "KL 0.3": "0.802", "mean over log KL": f"{area:.3f}"
    }  # fmt: skip
    # an arm without a strength is a point
    assert table[RIGID]["mean over log KL"] == "0.402 at KL 0.1" and table[RIGID]["KL 0.3"] == ""
    # the main figure, against the claim's baseline
    more = (narrow * (0.003 + 0.01) / 2 + wide * (0.01 + 0.03) / 2) / (narrow + wide)
    assert rows_of_table(page.blocks, "frontier")[BETTER][f"minus {THAN}"] == f"{more:+.3f}"


def test_an_arm_that_stops_short_keeps_its_last_point_with_a_mark() -> None:
    made = Made(kl=lambda arm, kl: min(kl, 0.15) if arm == THAN else kl)
    findings = made.findings(
        lambda arm, task, seed, kl: rising(arm, task, seed, 0.1 if arm == THAN and kl > 0.1 else kl)
    )
    table = rows_of_table(frontier.make(findings).blocks, "frontier_behaviour")
    assert table[THAN]["KL 0.3"] == f"0.402{SHORT}" and table[THAN]["KL 0.1"] == "0.402"
    assert table[THAN]["mean over log KL"].endswith(SHORT) and SHORT not in "".join(table[BETTER].values())
    assert "LoRA DPO stops short of KL 0.3 in some cells and counts with its last point" in findings.answer[0]


def test_strengths_far_from_training_have_their_mark_where_they_are_and_closed_forms_none() -> None:
    strengths = {BETTER: {0.03: 0.3, 0.1: 0.6, 0.3: 1.0}, THAN: dict.fromkeys(TARGETS, 1.0)}
    made = Made(strength=lambda arm, kl: strengths.get(arm, dict.fromkeys(TARGETS, 30.0))[kl])
    page = frontier.make(made.findings(rising))
    table = rows_of_table(page.blocks, "frontier_behaviour")
    assert table[BETTER]["KL 0.03"].endswith(EXTRAPOLATED) and not table[BETTER]["KL 0.1"].endswith(EXTRAPOLATED)
    assert table[BETTER]["mean over log KL"].endswith(EXTRAPOLATED)
    assert EXTRAPOLATED not in "".join([*table[CLOSED].values(), *table[THAN].values()])
    assert rows_of_table(page.blocks, "frontier")[BETTER]["mean over log KL"].endswith(EXTRAPOLATED)
    assert "strengths outside 0.5 to 2" in texts(page)


def test_a_kl_that_fell_while_the_strength_grew_is_named_with_its_arms() -> None:
    page = texts(frontier.make(Made(facts={THAN: {"kl_falls": True}}).findings(rising)))
    assert "The KL fell while the strength grew" in page and "in cells of LoRA DPO (8)." in page
    assert "The KL fell" not in texts(frontier.make(Made().findings(rising)))


# -- damage -----------------------------------------------------------------------------------------------------------

SECOND_KIND = {"question_right": [1.0, 1.0, 0.0, 1.0], "question_nats": [0.1, 0.1, 2.0, 0.1]}


def test_side_effects_are_called_damage_only_with_both_kinds_beside_each_other() -> None:
    both = Made(observed=lambda arm, kl: SECOND_KIND).findings(rising)
    page = damage.make(both)
    assert page.title == "Damage" and "An arm is better off only if it is in both" in texts(page)
    header = {*next(iter(rows_of_table(page.blocks, "damage").values()))}
    assert {"KL to the base, nats per token ↓", "perplexity, times the base's ↓", "sentences ended right ↑"} <= header
    alone = damage.make(Made().findings(rising))
    assert alone.title == "Side effects" and "none of them is called damage" in texts(alone)
    # the second kind alone is no damage either
    only = Made(observed=lambda arm, kl: {"neutral_kl": [None], "neutral_nll": [None], **SECOND_KIND}).findings(rising)
    assert damage.make(only).title == "Side effects"


def test_damage_has_the_base_and_arms_without_a_strength_beside_the_others_and_compares_the_claims_arms() -> None:
    def observed(arm: str, kl: float) -> dict[str, Any]:
        right = {BETTER: 0.75, THAN: 0.5, RIGID: 0.25}.get(arm, 1.0) if kl > 0 else 1.0
        return {"question_right": [1.0] * round(4 * right) + [0.0] * round(4 - 4 * right), "question_nats": [0.1] * 4}

    page = damage.make(Made(observed=observed).findings(rising))
    table = {arm: row["sentences ended right ↑"] for arm, row in rows_of_table(page.blocks, "damage").items()}
    assert table == {"(base model)": "1.000", BETTER: "0.750", THAN: "0.500", CLOSED: "1.000", RIGID: "0.250"}
    compared = rows_of_table(page.blocks, "damage_compared")
    assert compared["sentences ended right"][f"{BETTER} minus {THAN}"] == "+0.250"
    assert "of arms without a strength as they come" in texts(page)


# -- tuning -----------------------------------------------------------------------------------------------------------


def test_a_page_says_how_far_the_best_trial_leads_and_what_the_second_would_have_given() -> None:
    def tuned(lead: float, best: float, second: float) -> dict[str, float]:
        return {"tuning_lead": lead, "tuning_best": best, "tuning_second": second}

    passed = {BETTER: tuned(-0.2, 0.7, 0.6), THAN: tuned(3.0, 0.8, 0.5)}
    page = texts(method.make(Made(facts=passed).findings(rising)))
    assert "in 4 of 8 tunings (4 times a better score was passed over for its strength)." in page
    facts = {BETTER: tuned(0.2, 0.7, 0.6), THAN: tuned(3.0, 0.8, 0.5)}
    page = texts(method.make(Made(facts=facts).findings(rising)))
    # two arms in four tasks are eight tunings, whatever the number of seeds
    assert (
        "The best trial leads the second by 1.60 standard errors (median), by less than one in 4 of 8 tunings" in page
    )
    assert "its accuracy is 0.750; the second would have given 0.550" in page
    assert "leads the second" not in texts(method.make(Made().findings(rising)))


def trial(score: float | None, accuracy: float = 0.5, matched: bool = True, landed: float = 1.0) -> dict[str, Any]:
    return {"score": score, "accuracy": accuracy, "matched": matched, "landed": landed, "error": 0.05}


def test_the_lead_of_the_best_trial_by_hand() -> None:
    trials = [trial(0.2, 0.5), trial(0.3, 0.75), trial(0.9, 1.0, matched=False), trial(None, 0.0)]
    facts = {"tuning_landed": 1.0, "tuning_lead": 2.0, "tuning_best": 0.75, "tuning_second": 0.5}
    assert lead(trials) == pytest.approx(facts)
    assert lead(trials[:1]) == {"tuning_landed": 1.0} and lead(trials[3:]) == {}
    # a trial that is preferred for its strength may have a second with a better score
    assert lead([trial(0.2), trial(0.9, landed=0.5)])["tuning_lead"] == pytest.approx(-14)


def test_trials_at_strengths_like_those_of_training_are_preferred_to_better_scores() -> None:
    trials = [trial(0.1, landed=1.0), trial(0.3, landed=2 / 3), trial(0.9, landed=0.0), trial(5.0, matched=False)]
    assert [one["score"] for one in best_first([*trials[::-1], trial(None)])] == [0.1, 0.3, 0.9, 5.0]
    # a KL is quadratic in the strength: from .1, the others are at .55 and 1.73 times it
    assert landed_at(1.0, 0.1, TARGETS) == 1.0 and landed_at(0.95, 0.1, TARGETS) == 1.0
    assert landed_at(0.8, 0.1, TARGETS) == pytest.approx(2 / 3), "0.44 at a KL of .03"
    assert landed_at(1.3, 0.1, TARGETS) == pytest.approx(2 / 3), "2.25 at a KL of .3"
    assert landed_at(5.0, 0.1, TARGETS) == 0.0 and landed_at(1.9, 0.1, [0.1]) == 1.0


def test_a_learning_rate_is_multiplied_by_the_strength_in_the_middle_of_the_kls() -> None:
    assert landing_factor(2.0, 0.1, [0.1]) == pytest.approx(2.0)
    assert landing_factor(2.0, 0.1, [0.1, 0.2, 0.4]) == pytest.approx(2 * 2**0.5), "the middle is .2"
    assert landing_factor(37.0, 0.1, TARGETS) == 8.0 and landing_factor(0.01, 0.1, TARGETS) == 1 / 8


@pytest.mark.parametrize(("landed", "words"), [(1.0, "In all 8 tunings of trained arms a trial"), (0.5, "In 4 of 8")])
def test_a_page_says_whether_arms_are_used_as_they_were_trained(landed: float, words: str) -> None:
    def setting(steps: int, layer: float | None) -> dict[str, Any]:
        return {"setting": {"rate": 1.0, "steps": steps, "layer": layer, "strength": 1.0}}

    facts = {
        BETTER: {"tuning_landed": landed, **setting(8, 0.5)},
        THAN: {"tuning_landed": 1.0, **setting(16, None)},
        CLOSED: {"tuning_landed": 1.0},
    }
    page = texts(method.make(Made(facts=facts).findings(rising)))
    assert words in page and ("vector DPO." in page) == (landed < 1)
    assert "Chosen, by number of tunings: 8 steps (4), 16 steps (4)." in page


# -- resolution of the behaviour --------------------------------------------------------------------------------------


def test_a_page_says_how_well_a_cell_knows_its_behaviour_score_and_where_that_is_too_little() -> None:
    def rate(count: int) -> Any:
        """A rate of one half in the first task, of none in the second, of a tenth in the others."""
        shares = [0.5, 0.0, 0.1, 0.1]
        return lambda arm, task, seed, kl: (
            [1.0] * round(shares[task] * count) + [0.0] * round((1 - shares[task]) * count)
        )

    few = texts(measured.make(Made().findings(rate(20))))
    # sqrt(.25 * 20 / 19 / 20), sqrt(.09 * 20 / 19 / 20); answers that are all alike count as a rate of one half
    assert "at most: lower_case 0.115 (20 prompts); hedged 0.112 (20 prompts); formal 0.069 (20 prompts)" in few
    assert "**Larger than 0.036 in lower_case, hedged, formal, agreeing**" in few
    assert "204 prompts (`generations`) would be enough" in few
    many = texts(measured.make(Made().findings(rate(200))))
    assert "lower_case 0.035 (200 prompts)" in many and "Larger than" not in many


# -- limits -----------------------------------------------------------------------------------------------------------


def test_a_page_says_what_it_cannot_say() -> None:
    accuracy = {"measure": "accuracy", "tasks": "fixed"}
    made = Made(strength=lambda arm, kl: 7.0 if arm == BETTER else 1.0, claim=accuracy)
    made.facts = {arm: {"matched_strength": made.strength(arm, 0.1)} for arm in (BETTER, THAN, CLOSED)}
    page = texts(limits.make(made.findings(rising)))
    assert "Tasks: the claim is about the 4 it ran on (as fixed)." in page
    assert "Length: pair accuracy adds up log-probabilities" in page
    assert "Behaviour: 10 answers a cell are few" in page and "KL: strengths were matched" not in page
    for kl in TARGETS:  # those of the claim
        assert f"8 of 16 trained cells reach a KL of {kl:g} only outside strengths of 0.5 to 2 (1 to 7)" in page
    assert "Damage: only one kind of side effect" in page
    good = Made(observed=lambda arm, kl: SECOND_KIND)
    page = texts(limits.make(good.findings(lambda *cell: rising(*cell) * 20)))
    assert page == "- Tasks: 4 of them are too few to stand for others; 8 or more would be better."


def test_a_page_says_which_tasks_tell_no_arms_apart() -> None:
    """In the first task every arm is at the floor, in the second at the ceiling, in the third only one is."""

    def values(arm: str, task: int, seed: int, kl: float) -> list[float]:
        floor = task == 0 or (task == 2 and arm == BETTER)
        return [0.0] * 10 if floor else [1.0] * 10 if task == 1 else [0.0, 1.0] * 5

    page = texts(limits.make(Made().findings(values)))
    assert "- Range: every arm is at the floor in lower_case; every arm is at the ceiling in hedged (behaviour" in page
    assert "Range" not in texts(limits.make(Made().findings(rising)))


def test_a_baseline_that_is_extrapolated_is_named_as_such() -> None:
    """It may be behind for that, so whoever reads that it lost should know."""
    made = Made(strength=lambda arm, kl: 7.0 if arm == THAN else 1.0)
    found = made.findings(lambda arm, task, seed, kl: [0.4 + (arm == BETTER) * (0.2 + 0.01 * task)] * 9 + [0.5])
    assert found.verdict.side == "for" and f"; {THAN} is extrapolated (trained" in found.verdict.sentence
