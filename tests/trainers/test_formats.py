"""Every data format of TRL, in every trainer where it applies: what is predicted, given what."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset
from tiny_data import TEMPLATE, losses, tokenizer, trained, trainer

from steertune.trainers.batch import Batch

PROMPT, CHOSEN, REJECTED = "the cat", "runs now", "sits"
END = " </s>"


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def sharegpt(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": who, "value": text} for who, text in turns]


# A row of each format, then for the first row of the batch: the tokens that are read, and those that are predicted.
PAIRS = {
    "standard, explicit prompt": (
        {"prompt": PROMPT + " ", "chosen": CHOSEN, "rejected": REJECTED},
        "the cat runs now </s>",
        ["runs now </s>", "sits </s>"],
    ),
    "standard, implicit prompt": (
        {"chosen": f"{PROMPT} {CHOSEN}", "rejected": f"{PROMPT} {REJECTED}"},
        "the cat runs now </s>",
        ["runs now </s>", "sits </s>"],
    ),
    "conversational, explicit prompt": (
        {"prompt": user(PROMPT), "chosen": assistant(CHOSEN), "rejected": assistant(REJECTED)},
        "<s> <user> the cat </s> <assistant> runs now </s>",
        ["runs now </s>", "sits </s>"],
    ),
    "conversational, implicit prompt": (
        {"chosen": user(PROMPT) + assistant(CHOSEN), "rejected": user(PROMPT) + assistant(REJECTED)},
        "<s> <user> the cat </s> <assistant> runs now </s>",
        ["runs now </s>", "sits </s>"],
    ),
}
DEMONSTRATIONS = {
    "standard prompt-completion": (
        {"prompt": PROMPT + " ", "completion": CHOSEN},
        "the cat runs now </s>",
        ["runs now </s>"],
    ),
    "conversational prompt-completion": (
        {"prompt": user(PROMPT), "completion": assistant(CHOSEN)},
        "<s> <user> the cat </s> <assistant> runs now </s>",
        ["runs now </s>"],
    ),
    "completion of several messages": (
        {"prompt": user(PROMPT), "completion": assistant("we") + user("go") + assistant("stay")},
        "<s> <user> the cat </s> <assistant> we </s> <user> go </s> <assistant> stay </s>",
        ["we </s> <user> go </s> <assistant> stay </s>"],
    ),
    "text": ({"text": "the cat runs now"}, "the cat runs now </s>", ["the cat runs now </s>"]),
    "messages": (
        {"messages": user(PROMPT) + assistant(CHOSEN)},
        "<s> <user> the cat </s> <assistant> runs now </s>",
        ["<s> <user> the cat </s> <assistant> runs now </s>"],
    ),
    "conversations": (
        {"conversations": sharegpt(("user", PROMPT), ("assistant", CHOSEN))},
        "<s> <user> the cat </s> <assistant> runs now </s>",
        ["<s> <user> the cat </s> <assistant> runs now </s>"],
    ),
}


def words():
    """A tokenizer whose template knows TRL's role names only."""
    return tokenizer(template=TEMPLATE)


def read_and_predicted(made) -> tuple[str, list[str]]:
    """Of the first example: the real tokens of its first row, and the labels of its rows, as text."""
    batch = Batch.read(made.data_collator([made.train_dataset[0]]))
    decode = made.processing_class.decode
    real = batch.inputs["attention_mask"][0].bool()
    return decode(batch.inputs["input_ids"][0][real]), [decode(row[row != -100]) for row in batch.labels]


CASES = [
    *[(kind, name, *case) for name, case in PAIRS.items() for kind in ("dpo", "plain")],
    *[(kind, name, *case) for name, case in DEMONSTRATIONS.items() for kind in ("sft", "plain")],
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("kind", "name", "row", "read", "predicted"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES])
def test_format(kind, name, row, read, predicted, tmp_path):
    made = trainer(kind, tmp_path, data=Dataset.from_list([row] * 4), loss="cross_entropy", processing_class=words())
    assert read_and_predicted(made) == (read, predicted)
    made.train()
    assert losses(made)[-1] < losses(made)[0]


def test_preference_pairs_train_a_pair_loss_from_every_format(tmp_path):
    logged = {}
    for name, (row, _, _) in PAIRS.items():
        made = trained("plain", tmp_path, data=Dataset.from_list([row] * 4), loss="simpo", processing_class=words())
        logged[name] = losses(made)
    assert logged["standard, explicit prompt"] == pytest.approx(logged["standard, implicit prompt"])
    assert logged["conversational, explicit prompt"] == pytest.approx(logged["conversational, implicit prompt"])


TOKENISED = {
    "pairs": ("plain", {"prompt_ids": [6, 8], "chosen_ids": [10, 16, 2], "rejected_ids": [11, 2]}, "dpo"),
    "input_ids and labels": ("plain", {"input_ids": [6, 8, 10, 2], "labels": [-100, -100, 10, 2]}, "cross_entropy"),
    "input_ids and labels for SFT": ("sft", {"input_ids": [6, 8, 10, 2], "labels": [-100, -100, 10, 2]}, None),
    "input_ids for SFT": ("sft", {"input_ids": [6, 8, 10, 2]}, "cross_entropy"),
}


@pytest.mark.parametrize("name", TOKENISED)
def test_tokenised_rows_with_a_collator(name, tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    kind, row, loss = TOKENISED[name]
    collator = (DataCollatorForPreference if name == "pairs" else DataCollatorForLanguageModeling)(pad_token_id=0)
    options = dict(data_collator=collator, remove_unused_columns=False) if kind == "plain" else {}
    made = trained(kind, tmp_path, data=Dataset.from_list([row] * 4), loss=loss, **options)
    assert losses(made)[-1] < losses(made)[0]
    labels = Batch.read(made.data_collator([made.train_dataset[0]])).labels[0].tolist()
    assert labels == ([6, 8, 10, 2] if name == "input_ids for SFT" else [-100, -100, *labels[2:]]) and labels[-1] == 2


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_streamed_data(kind, tmp_path):
    cases = DEMONSTRATIONS if kind == "sft" else PAIRS
    row = next(iter(cases.values()))[0]

    def rows():
        for _ in range(40):
            yield row

    made = trained(kind, tmp_path, data=IterableDataset.from_generator(rows), loss="cross_entropy")
    assert len(losses(made)) == 3 and losses(made)[-1] < losses(made)[0]


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
def test_packed_rows(loss, tmp_path):
    data = Dataset.from_list([{"text": "the cat runs now"}] * 12)
    made = trained("sft", tmp_path, data=data, loss=loss, packing=True, max_length=16)
    assert losses(made)[-1] < losses(made)[0] and len(made.train_dataset) < 12
    assert "vector/share_of_residual" in made.state.log_history[0]


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("kind", ["sft", "dpo", "plain"])
def test_any_number_of_rows(kind, count, tmp_path):
    row = (DEMONSTRATIONS if kind == "sft" else PAIRS)[
        "standard prompt-completion" if kind == "sft" else "standard, explicit prompt"
    ][0]
    assert len(losses(trained(kind, tmp_path, data=Dataset.from_list([row] * count), loss="cross_entropy"))) == 3


def test_text_column_of_another_name(tmp_path):
    data = Dataset.from_list([{"story": "the cat runs now"}] * 4)
    made = trainer("sft", tmp_path, data=data, loss=None, dataset_text_field="story")
    assert read_and_predicted(made) == ("the cat runs now </s>", ["the cat runs now </s>"])


def test_evaluation_data_are_tokenised_too(tmp_path):
    row = PAIRS["conversational, explicit prompt"][0]
    data = Dataset.from_list([row] * 4)
    made = trained("plain", tmp_path, data=data, eval_dataset={"a": data, "b": data}, loss="simpo")
    metrics = made.evaluate()
    assert metrics["eval_a_loss"] == metrics["eval_b_loss"] < losses(made)[0]
