"""Data as people have them: in any format of `datasets`, packed, streamed, with tool calls, cut, empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import LoraConfig
from tiny_data import (
    TEMPLATE,
    WORDS,
    arguments,
    conversational,
    demonstrations,
    losses,
    pairs,
    tokenizer,
    trained,
    trainer,
)
from tiny_models import tiny
from upstream import upstream

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import DataError, SteeringTrainer, ViewError, get_view

LOSSES = {"sft": "cross_entropy", "dpo": "dpo", "plain": "dpo"}
TEXTS = Dataset.from_list([{"text": " ".join(WORDS[i : i + 5])} for i in range(10)])
CALL = {"type": "function", "function": {"name": "f", "arguments": "x"}}
CALLS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "red"},
    {"role": "assistant", "content": "runs now"},
]


def equal_to_upstream(folder: Any, data: Any, **changes: Any) -> None:
    """SFT with the parent's loss and with ours logs what TRL logs."""
    theirs = upstream("sft", folder, data=data, peft_config=SteeringVectorConfig(), changes=changes)
    for loss in (None, "cross_entropy"):
        ours = trained("sft", folder, data=data, loss=loss, **changes)
        assert losses(ours) == pytest.approx(losses(theirs), rel=2e-6), loss


# -- formats of `datasets` --------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("shape", [lambda data: data, conversational], ids=["standard", "conversational"])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_format_of_a_data_set_changes_nothing(kind, shape, form, tmp_path):
    data = shape(demonstrations() if kind == "sft" else pairs())
    plain, formatted = (
        trained(kind, tmp_path, data=each, eval_dataset=each, loss=LOSSES[kind], eval_strategy="steps", eval_steps=1)
        for each in (data, data.with_format(form))
    )
    assert losses(formatted) == losses(plain)
    evaluated = [[e["eval_loss"] for e in made.state.log_history if "eval_loss" in e] for made in (plain, formatted)]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 3


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_tokenised_rows_and_streams_in_a_format(form, tmp_path):
    rows = Dataset.from_list([{"input_ids": [6, 8, 10, 2], "labels": [-100, -100, 10, 2]}] * 8).with_format(form)
    equal_to_upstream(tmp_path, rows)
    stream = pairs(16).to_iterable_dataset()
    one, two = (trained("dpo", tmp_path, data=each, loss="dpo") for each in (stream, stream.with_format(form)))
    assert losses(one) == losses(two)


def test_columns_that_a_format_hides_stay_hidden(tmp_path):
    data = demonstrations().add_column("chosen", ["cat"] * 8).add_column("rejected", ["dog"] * 8)
    shown = data.with_format("torch", columns=["prompt", "completion"])
    hidden, plain = (trained("sft", tmp_path, data=each, loss="cross_entropy") for each in (shown, demonstrations()))
    assert losses(hidden) == losses(plain)


def test_a_format_does_not_hide_what_is_wrong(tmp_path):
    data = Dataset.from_list([dict(prompt="the ", chosen="cat", rejected="cat")] * 2).with_format("torch")
    with pytest.raises(DataError, match="Row 0: chosen equals rejected"):
        trainer("dpo", tmp_path, data=data, loss="dpo")
    rows = Dataset.from_list([{"input_ids": [6, 99], "labels": [6, 99]}] * 2).with_format("torch")
    with pytest.raises(DataError, match="Row 0: input_ids holds token 99"):
        trainer("sft", tmp_path, data=rows, loss="cross_entropy")


# -- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        *[dict(packing=True, packing_strategy=name, max_length=8) for name in ("wrapped", "bfd", "bfd_split")],
        dict(packing=True, packing_strategy="wrapped", max_length=8, padding_free=True),
        dict(padding_free=True, max_length=None),
    ],
    ids=str,
)
def test_rows_of_several_samples_train_as_upstream(changes, tmp_path):
    equal_to_upstream(tmp_path, TEXTS, **changes)
    evaluated = trained("sft", tmp_path, data=TEXTS, eval_dataset=TEXTS, loss="cross_entropy", **changes).evaluate()
    assert evaluated["eval_loss"] > 0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("packing", dict(packing=True, packing_strategy="wrapped", max_length=8)),
        ("packing", dict(packing=True, max_length=8)),
        ("eval_packing", dict(eval_packing=True, max_length=8)),
        ("padding_free", dict(padding_free=True, max_length=None)),
    ],
)
@pytest.mark.parametrize("positions", ["completion", "prompt", "last_prompt"])
def test_positions_of_rows_with_several_prompts_are_refused(positions, name, changes, tmp_path):
    config = SteeringVectorConfig(positions=positions)
    with pytest.raises(DataError, match=f"positions='{positions}' needs one prompt in a row, but {name}=True"):
        trainer("sft", tmp_path, peft_config=config, loss="cross_entropy", **changes)


@pytest.mark.parametrize("changes", [dict(shuffle_dataset=True), dict(packing=True)], ids=str)
def test_views_of_rows_in_another_order_are_refused(changes, tmp_path):
    views = {"good": get_view("instruction", text="we go")}
    with pytest.raises(ViewError, match=f"{next(iter(changes))}=True mixes rows"):
        trainer("sft", tmp_path, loss="prompted", views=views, data=conversational(demonstrations()), **changes)


# -- messages and templates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["messages", "completion"])
def test_messages_that_call_tools_need_no_content(column, tmp_path):
    row = {"messages": CALLS} if column == "messages" else {"prompt": CALLS[:1], "completion": CALLS[1:]}

    def rows():
        for _ in range(12):
            yield row

    equal_to_upstream(tmp_path, IterableDataset.from_generator(rows))
    equal_to_upstream(tmp_path, Dataset.from_list([row] * 8))
    trained("plain", tmp_path, data=Dataset.from_list([row] * 8), loss="cross_entropy")


def test_a_message_that_says_nothing_is_refused(tmp_path):
    """The template would write the word None."""
    data = Dataset.from_list([{"messages": [CALLS[0], {"role": "assistant", "content": None}]}] * 2)
    with pytest.raises(DataError, match="Row 0: 'messages' has the message"):
        trainer("sft", tmp_path, data=data, loss="cross_entropy")


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
def test_a_template_from_a_file_comes_in_time(loss, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    options = dict(data=conversational(demonstrations()), loss=loss)
    given = trained("sft", tmp_path, processing_class=tokenizer(), **options)
    read = trained(
        "sft", tmp_path, processing_class=tokenizer(template=None),
        chat_template_path=str(tmp_path / "template.jinja"), **options,
    )  # fmt: skip
    assert losses(read) == losses(given)


def test_a_template_of_another_tokenizer_is_for_adapters_that_train_tokens(tmp_path):
    data = conversational(demonstrations())
    tokenizer().save_pretrained(tmp_path / "other")
    options = dict(data=data, loss="cross_entropy", chat_template_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is a tokenizer, .* SteeringVectorConfig cannot train embeddings"):
        trainer("sft", tmp_path, processing_class=tokenizer(template=None), **options)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    made = trained("sft", tmp_path, processing_class=tokenizer(template=None), peft_config=lora, **options)
    assert len(losses(made)) == 3


# -- rows without labels ----------------------------------------------------------------------------------------------


def test_an_empty_text_among_others_trains_as_upstream(tmp_path):
    data = concatenate_datasets([Dataset.from_list([{"text": ""}]), TEXTS.select(range(7))])
    equal_to_upstream(tmp_path, data)
    plain, sft = (trained(kind, tmp_path, data=data, loss="cross_entropy") for kind in ("plain", "sft"))
    assert losses(plain) == losses(sft)
    equal_to_upstream(tmp_path, data, per_device_train_batch_size=1, max_steps=8)  # one step has nothing to predict


@pytest.mark.parametrize("kind", ["sft", "plain"])
def test_nothing_but_empty_texts_is_refused(kind, tmp_path):
    with pytest.raises(DataError, match="No row has a token to predict"):
        trainer(kind, tmp_path, data=Dataset.from_list([{"text": ""}] * 4), loss="cross_entropy")


def test_text_without_a_tokenizer_is_refused(tmp_path):
    for loss, data in (("cross_entropy", TEXTS), ("dpo", pairs()), (None, TEXTS)):
        with pytest.raises(DataError, match="processing_class=None cannot read it"):
            trainer("plain", tmp_path, data=data, loss=loss, processing_class=None)


LONG = "the cat dog runs sits red blue "


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_evaluation_rows_whose_labels_are_all_cut_are_refused(kind, several, tmp_path):
    row = dict(prompt=LONG, completion="sky") if kind == "sft" else dict(prompt=LONG, chosen="sky", rejected="sea")
    held_out: Any = Dataset.from_list([row] * 2)
    held_out = {"a": held_out} if several else held_out
    with pytest.raises(DataError, match="In the evaluation data: No row has a label left"):
        trainer(kind, tmp_path, eval_dataset=held_out, loss=LOSSES[kind], max_length=6)


def test_tokenised_evaluation_rows_are_checked_too(tmp_path):
    held_out = Dataset.from_list([{"input_ids": [6, 8, 99], "labels": [-100, 8, 9]}] * 2)
    with pytest.raises(DataError, match="In the evaluation data: Row 0: input_ids holds token 99"):
        trainer("sft", tmp_path, eval_dataset=held_out, loss="cross_entropy")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_rows_of_a_stream_whose_labels_are_all_cut_are_dropped_as_upstream_does(kind, tmp_path):
    rows = demonstrations() if kind == "sft" else pairs()
    row = dict(prompt=LONG, completion="sky") if kind == "sft" else dict(prompt=LONG, chosen="sky", rejected="sea")
    stream = concatenate_datasets([Dataset.from_list([row] * 2), rows, rows]).to_iterable_dataset()
    theirs = upstream(kind, tmp_path, data=stream, peft_config=SteeringVectorConfig(), changes=dict(max_length=6))
    ours = trained(kind, tmp_path, data=stream, loss=LOSSES[kind], max_length=6)
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-6)


def test_a_stream_that_is_dropped_altogether_trains_nothing_and_says_so(tmp_path):
    rows = [{"input_ids": [6, 8, 10, 2], "labels": [-100] * 4}] * 8
    made = trainer("sft", tmp_path, data=Dataset.from_list(rows).to_iterable_dataset(), loss="cross_entropy")
    with pytest.raises(DataError, match="The stream has no row to train on"):
        made.train()


def test_a_batch_without_labels_trains_nothing_and_goes_on(tmp_path):
    """As in TRL: its loss is 0, and so is its gradient."""

    def collate(rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}

    rows = Dataset.from_list([{"input_ids": [6, 8, 10, 2]}] * 12)
    made = SteeringTrainer(tiny(), arguments("plain", tmp_path), collate, rows, loss="cross_entropy")
    made.train()
    assert losses(made) == [0.0] * 3


def test_upstream_still_adds_up_the_tensors_of_a_formatted_dpo_row(tmp_path):
    """Why data are handed on without their format; once TRL reads them, `as_python` can go."""
    with pytest.raises(RuntimeError, match="size of tensor"):
        upstream("dpo", tmp_path, data=pairs().with_format("torch"), peft_config=SteeringVectorConfig())
