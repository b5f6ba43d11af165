"""The benchmarks measure what their tables name, and add up what they measured."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from steertune.recipes import benchmark as former
from steertune.recipes import cli
from steertune.recipes.ablation.grid import load_grid
from steertune.recipes.lab import embedded
from steertune.recipes.lab.files import ArmError, write_result
from steertune.recipes.studies import benchmark, benchmark_grid
from steertune.recipes.studies.benchmark import ways_of
from steertune.recipes.studies.timing.rows import Rows, random_words
from steertune.recipes.studies.timing.shares import OTHER, kind_of, shares
from steertune.recipes.studies.timing.ways import AGAINST, STEP, WAYS
from steertune.trainers import tokenise


def test_the_former_name_runs_the_study_and_is_no_second_command():
    assert former.main is benchmark.main
    file, module = cli.find("benchmark")
    assert file.parent.name == "studies" and module == benchmark.__name__
    assert cli.commands()["benchmark"] == (benchmark.__doc__ or "").splitlines()[0]


def test_ways_that_are_asked_for_come_with_what_they_are_compared_with():
    assert [*ways_of(["SFT: ours, *"])] == [AGAINST["sft"], *(name for name in WAYS if name.startswith("SFT: ours, "))]
    assert [*ways_of(["pairs: ours + LoRA*"])] == [
        f"pairs: {who} + LoRA in the upper third" for who in ("TRL", "ours")
    ]
    assert ways_of(["*"]) == WAYS and ways_of(["nothing"]) == {}


@pytest.mark.real
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_tokens_of_rows_are_counted_once_per_pair(kind, tmp_path):
    tokenizer = embedded.load_tokenizer()
    rows = [{"prompt": "Why so?", "chosen": " one two" * (i + 1), "rejected": " no"} for i in range(16)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    unequal = Rows.of_file(file, batch=4)

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    answers = sum(count(row["chosen"]) + 1 + (count(row["rejected"]) + 1 if kind == "dpo" else 0) for row in rows)
    assert unequal.tokens(tokenizer, kind) == (16 * count("Why so?") / 4, answers / 4)
    assert len(unequal.data(tokenizer, kind)) == 16
    with pytest.raises(ArmError, match="20 are needed"):
        Rows.of_file(file, batch=5).data(tokenizer, kind)


@pytest.mark.parametrize("per,seconds", [("seed", 5 * 10), ("arm", 5 * 10), ("grid", 10 + 4 * 4)])
def test_a_grid_is_extrapolated_from_a_cell(per, seconds):
    """Five tasks and one seed; a cell takes 10 s, 6 of them its tuning of two trials."""
    grid = load_grid("quick")
    grid.tables.budget.per = per
    found = {"mean_difference": {"ours": [10.0, 4.0, 2], "stock": [20.0, 8.0, 2]}}
    text = benchmark_grid.page(grid, found, 1.0, "quick", ["mean_difference"])
    loads = {"seed": 5 * 3, "arm": 5 * 3, "grid": 3 + 4}[per]
    assert f"| all, extrapolated | {seconds} | {2 * seconds} | 2.0 | {(2 * seconds + loads) / seconds:.1f} |" in text


def test_arms_of_a_grid_that_it_does_not_have(capsys):
    assert benchmark_grid.main(["quick", "--arms", "mean_diference"]) == 2
    assert "mean_diference" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_rows_have_the_tokens_that_are_asked_for(kind):
    tokenizer = embedded.load_tokenizer()
    rows = tokenise(random_words(tokenizer, kind, length=24, prompt=9, count=3), tokenizer).to_list()
    for row in rows:
        if kind == "sft":
            assert len(row["input_ids"]) == 24
            assert sum(label != -100 for label in row["labels"]) == 15
        else:
            assert [len(row[side]) for side in ("prompt_ids", "chosen_ids", "rejected_ids")] == [9, 15, 15]
            assert row["chosen_ids"] != row["rejected_ids"]


def test_shares_of_a_step_add_up_and_name_what_takes_the_time():
    square = torch.randn(1536, 1536)  # a product takes longer than being put aside for another process

    def run(steps: int) -> None:
        square.t().contiguous() @ square  # before the first step: not counted
        for _ in range(steps):
            with record_function(STEP):
                torch.softmax((square @ square)[:8], -1)

    found = shares(run)
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=lambda kind: found[kind]) == "matrix products" and found["loss"] > 0
    assert found["attention"] == found["copies"] == 0


@pytest.mark.parametrize(
    "operation,kind",
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_log_softmax_backward_data", "loss"),
        ("aten::copy_", "copies"),
        ("aten::mul", OTHER),
    ],
)
def test_kinds_of_work(operation, kind):
    assert kind_of(operation) == kind


def test_a_benchmark_goes_on_with_its_own_settings_only(tmp_path):
    asked = {"model": "embedded", "rounds": 1, "growth": False, "ways": ["*"], "no_memory": True}
    options = SimpleNamespace(**asked, folder=tmp_path)
    assert benchmark._measured(options) == []
    rows = [{"title": "2 rows of 32 tokens, 16 of them prompt"}]
    write_result(tmp_path / "table.json", {"settings": benchmark._settings(options), "rows": rows})
    assert benchmark._measured(options) == rows
    options.rounds = 2
    with pytest.raises(ArmError, match="has other settings"):
        benchmark._measured(options)
