"""The benchmark measures rows of the length that its table names."""

from __future__ import annotations

import pytest

from steertune.recipes import embedded
from steertune.recipes.benchmark import data
from steertune.trainers import tokenise

pytestmark = pytest.mark.real


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_rows_have_the_tokens_that_are_asked_for(kind):
    tokenizer = embedded.load_tokenizer()
    rows = tokenise(data(tokenizer, kind, length=24, prompt=9, count=3), tokenizer).to_list()
    for row in rows:
        if kind == "sft":
            assert len(row["input_ids"]) == 24
            assert sum(label != -100 for label in row["labels"]) == 15
        else:
            assert [len(row[side]) for side in ("prompt_ids", "chosen_ids", "rejected_ids")] == [9, 15, 15]
            assert row["chosen_ids"] != row["rejected_ids"]
