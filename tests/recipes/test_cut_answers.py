"""Answers that the tokens allowed cut off: what that loses is noticed before any work, and counted after it."""

from __future__ import annotations

import pytest
import tiny_data
import tiny_grids
import torch
from datasets import Dataset
from made_cells import Made, texts
from tiny_models import tiny

from steertune.recipes import ablate, sweep, train
from steertune.recipes.ablation.sections.limits import limits
from steertune.recipes.lab import embedded, scorers
from steertune.recipes.lab.behaviours import read_behaviour
from steertune.recipes.lab.cut_answers import too_short
from steertune.recipes.lab.files import read_jsonl
from steertune.recipes.lab.generation import generate, generate_and_look
from steertune.recipes.lab.paths import TASKS
from steertune.recipes.lab.rows import Record
from steertune.recipes.lab.scorers import Scorer

END, START, NEVER = r"stay\Z", r"\Astay", r"\A(?!.*stay)"
AT_THE_END = Dataset.from_list(
    [{"prompt": "go", "chosen": "the cat runs and you stay", "rejected": "the cat runs and you go"}] * 4
)


def rule(pattern: str) -> Scorer:
    return scorers.fit({"kind": "rule", "pattern": pattern}, AT_THE_END, None, None)


def test_a_behaviour_at_the_end_needs_room():
    found = too_short(AT_THE_END, rule(END), tiny_data.tokenizer(), 5)
    assert found is not None and found.value == 0.0
    assert found.text == (
        "new_tokens=5 cuts off 100% of the chosen answers. Cut there, chosen answers score 0.00 more than rejected "
        "ones, and 1.00 more when whole, so 100% of this behaviour cannot be seen. Set new_tokens = 6, which leaves "
        "95% of them whole."
    )
    assert too_short(AT_THE_END, rule(END), tiny_data.tokenizer(), 6) is None


def test_a_behaviour_at_the_beginning_does_not():
    rows = AT_THE_END.map(lambda row: {"chosen": f"stay {row['chosen']}"})
    assert too_short(rows, rule(START), tiny_data.tokenizer(), 2) is None


def test_what_rejected_answers_show_late_is_missed_too():
    """A rule that asks for an absence finds it in every answer that is short enough."""
    rows = AT_THE_END.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    found = too_short(rows, rule(NEVER), tiny_data.tokenizer(), 3)
    assert found is not None and found.value == 0.0


def test_some_lost_ends_are_no_finding_and_more_are():
    def pairs(long: int) -> Dataset:
        short = [{"prompt": "go", "chosen": "you stay", "rejected": "you go"}] * (20 - long)
        return Dataset.from_list([*AT_THE_END.select([0] * long), *short])

    assert too_short(pairs(3), rule(END), tiny_data.tokenizer(), 5) is None
    found = too_short(pairs(6), rule(END), tiny_data.tokenizer(), 5)
    assert found is not None and found.value == pytest.approx(14 / 20)


def test_a_scorer_that_reads_more_than_text_is_not_asked():
    def never(prompts, answers):
        raise AssertionError("asked")

    found = too_short(AT_THE_END, Scorer(never, "a service"), tiny_data.tokenizer(), 5, "evaluation.new_tokens")
    assert found is not None and found.text.startswith("evaluation.new_tokens=5 cuts off 100%")
    assert "Set evaluation.new_tokens = 6" in found.text


@pytest.mark.parametrize(("task", "tokens", "lost"), [
    ("question_at_the_end", 16, True), ("question_at_the_end", 40, False), ("lower_case", 16, False),
])  # fmt: skip
def test_embedded_tasks(task, tokens, lost):
    rows = Dataset.from_list(read_jsonl(TASKS / task / "test.jsonl"))
    scorer = scorers.fit(read_behaviour(task).scorer_table({}), rows.select([]), None, None)
    found = too_short(rows, scorer, embedded.load_tokenizer(), tokens)
    assert (found is not None) == lost and (found is None or (found.value or 0) < 0.1)


@pytest.mark.parametrize(("token", "cut"), [(2, False), (7, True)])
def test_an_answer_that_ends_is_not_cut(token, cut):
    model, words = tiny(), tiny_data.tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = torch.ones(32) * 1e3
        model.lm_head.weight[token] *= torch.sign(
            model(torch.tensor([[6, 7]]), output_hidden_states=True).hidden_states[-1][0, -1]
        )
    texts_, cuts = generate_and_look(model, words, ["the cat"], 3)
    assert cuts == [cut] and texts_ == generate(model, words, ["the cat"], 3) and bool(texts_[0]) == cut


def test_rows_of_unequal_length_are_cut_each_by_itself():
    """One row ends first, and is padded with the token that ends the other."""
    model, words = tiny(), tiny_data.tokenizer()
    steps = iter([[2, 7], [0, 7], [0, 7]])

    def forced(input_ids, scores):
        scores = torch.full_like(scores, -1e9)
        for row, token in enumerate(next(steps)):
            scores[row, token] = 0.0
        return scores

    model.generation_config.eos_token_id = 2
    original = model.generate
    model.generate = lambda **options: original(
        **{**options, "logits_processor": type(options["logits_processor"])([forced])}
    )
    assert generate_and_look(model, words, ["the cat", "a dog"], 3)[1] == [False, True]


def test_the_measure_is_the_share():
    record = Record({}, {"0": {"answer": ["a", "b", "c", "d"], "answer_cut": [1.0, 0.0, 0.0, 1.0]}})
    assert record.value("cut_off") == 0.5


def limits_page(cut: list[float]) -> str:
    """Of cells whose answers were cut off or not; an empty list stands for cells that did not record it."""
    made = Made(observed=lambda arm, kl: {"answer_cut": cut})
    return texts(limits.make(made.findings(lambda *_: [0.0, 1.0] * 5)))


def test_a_report_says_that_answers_were_cut():
    assert "32 tokens (`new_tokens`) cut off lower_case 30%, hedged 30%" in limits_page([1.0] * 3 + [0.0] * 7)
    assert "Length of answers" not in limits_page([0.0] * 10)


def test_a_report_of_older_cells_says_that_it_does_not_know():
    assert "these cells do not say how many reached that" in limits_page([])


# -- what the commands say --------------------------------------------------------------------------------------------

SAYS = (
    "=3 cuts off 100% of the chosen answers. Cut there, chosen answers score 0.00 more than rejected ones, and 1.00 "
    "more"
)
"""Chosen answers of `cats_and_dogs` are three words and `cat`."""


def test_a_dry_run_of_a_grid_says_so(tmp_path, capsys):
    tables = tiny_grids.make_tables(tmp_path)
    tiny_data.save_task(tmp_path / "task", **tiny_data.cats_and_dogs())
    tables |= {
        "new_tokens": 3,
        "tasks": [{"name": str(tmp_path / "task"), "scorer": {"kind": "rule", "pattern": "cat"}}],
    }
    (tmp_path / "grid.toml").write_text(tiny_grids.toml(tables))
    assert ablate.main([str(tmp_path / "grid.toml"), "--dry-run", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert f"task: new_tokens{SAYS}" in out and "Set new_tokens = 4" in out


@pytest.mark.slow
def test_a_training_and_a_sweep_say_so_on_their_pages(tmp_path):
    task = tiny_data.save_task(tmp_path / "task", **tiny_data.cats_and_dogs())
    (tmp_path / "task" / "behaviour.toml").write_text('[scorer]\nkind = "rule"\npattern = "cat"\n')
    tiny_data.save_model(tmp_path / "model", max_position_embeddings=512)
    common = {
        "model.name": tmp_path / "model",
        "data.name": task,
        "trainer.max_steps": 1,
        "data.train": 8,
        "data.test": 8,
    }
    options = common | {"evaluation.new_tokens": 3, "output.folder": tmp_path / "run"}
    assert train.main(["vector_dpo", *(f"--{key}={value}" for key, value in options.items())]) == 0
    assert f"evaluation.new_tokens{SAYS}" in (tmp_path / "run" / "page.md").read_text().replace("\\", "")
    sizes = ["--train", "8", "--validation", "4", "--test", "8", "--new-tokens", "3", "--threads", "1"]
    places = [
        "--model",
        str(tmp_path / "model"),
        "--layers",
        "2",
        "--strengths",
        "1",
        "--folder",
        str(tmp_path / "sweep"),
    ]
    scorer = ["--scorer", '{kind = "rule", pattern = "cat"}', "--scorer-rows", "4"]
    assert sweep.main([str(task), *sizes, *places, *scorer]) == 0
    assert f"--new-tokens{SAYS}" in (tmp_path / "sweep" / "page.md").read_text().replace("\\", "")
