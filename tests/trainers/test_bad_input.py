"""Bad data, bad combinations and numbers that are not finite: refused, with the fix in the message."""

from __future__ import annotations

import os

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from poison import Poison
from tiny_data import conversational, demonstrations, losses, pairs, tokenizer, trained, trainer
from tiny_models import steered, tiny, vector_of
from transformers import default_data_collator

from steertune.adapters import SteeringVectorConfig
from steertune.losses import get_loss
from steertune.trainers import NonFiniteError

LONG = "the cat runs " * 8


def rows(*changed: dict, kind: str = "dpo") -> Dataset:
    """Good rows, then bad ones."""
    good = (demonstrations if kind == "sft" else pairs)(2).to_list()
    return Dataset.from_list([*good, *changed])


def renamed(data: Dataset, **columns: str) -> Dataset:
    return data.rename_columns(columns)


PAIR = {"prompt": "the ", "chosen": "cat runs", "rejected": "dog sits"}
DEMONSTRATION = {"prompt": "the ", "completion": "cat runs"}
LONG_PAIRS = Dataset.from_list([PAIR | {"prompt": LONG}] * 2)
LONG_DEMONSTRATIONS = Dataset.from_list([DEMONSTRATION | {"prompt": LONG}] * 2)
NO_TEMPLATE = dict(processing_class=tokenizer(template=None))
ADDS_BOS = dict(processing_class=tokenizer(adds_bos=True))
SHORT = dict(max_length=12)
SHORT_TOKENIZER = dict(processing_class=tokenizer(model_max_length=12))
PACKED = dict(packing=True, max_length=16, peft_config=SteeringVectorConfig(positions="completion"))
SECOND = dict(model=steered(), peft_config=LoraConfig())

# trainer, loss, data, what the message says, further options
BAD = {
    "empty": ("dpo", "dpo", rows().select([]), "data set is empty"),
    "empty, SFT": ("sft", None, rows(kind="sft").select([]), "data set is empty"),
    "empty, plain": ("plain", "dpo", rows().select([]), "data set is empty"),
    "empty completion": (
        "sft",
        None,
        rows(DEMONSTRATION | {"completion": ""}, kind="sft"),
        "Row 2: 'completion' is empty.*Remove",
    ),
    "blank completion": (
        "plain",
        None,
        rows(DEMONSTRATION | {"completion": " \n"}, kind="sft"),
        "Row 2: 'completion' is empty.*Remove",
    ),
    "empty chosen": ("dpo", None, rows(PAIR | {"chosen": ""}), "Row 2: 'chosen' is empty.*Remove"),
    "empty rejected": ("plain", "dpo", rows(PAIR | {"rejected": ""}), "Row 2: 'rejected' is empty.*Remove"),
    "empty message": (
        "dpo",
        "dpo",
        conversational(rows(PAIR | {"rejected": ""})),
        "Row 2: 'rejected' is empty.*Remove",
    ),
    "chosen == rejected": (
        "dpo",
        "dpo",
        rows(PAIR | {"rejected": "cat runs"}),
        "Row 2: chosen equals rejected.*Remove",
    ),
    "chosen == rejected in tokens": ("dpo", "dpo", rows(PAIR | {"rejected": "cat  runs "}), "have the same tokens"),
    "chosen == rejected in tokens, plain": (
        "plain",
        "dpo",
        rows(PAIR | {"rejected": "cat  runs "}),
        "Row 2.*have the same tokens",
    ),
    "only long prompts": ("dpo", "dpo", LONG_PAIRS, "No row has a label left.*max_length=12.*Raise max_length", SHORT),
    "only long prompts, TRL's loss": ("dpo", None, LONG_PAIRS, "No row has a label left.*max_length=12", SHORT),
    "only long prompts, SFT": ("sft", None, LONG_DEMONSTRATIONS, "No row has a label left.*max_length=12", SHORT),
    "only long prompts, plain": (
        "plain",
        None,
        LONG_DEMONSTRATIONS,
        "No row has a label left.*max_length=12",
        SHORT_TOKENIZER,
    ),
    "only long prompts, plain, pairs": (
        "plain",
        "dpo",
        LONG_PAIRS,
        "No row has a label left.*max_length=12",
        SHORT_TOKENIZER,
    ),
    "wrong column": ("dpo", None, renamed(rows(), chosen="choosen"), "rename 'choosen' to 'chosen'"),
    "wrong columns": (
        "plain",
        "dpo",
        renamed(rows(), chosen="choosen", rejected="rejcted"),
        "rename 'choosen' to 'chosen' and rename 'rejcted' to 'rejected'",
    ),
    "wrong column, SFT": (
        "sft",
        None,
        renamed(rows(kind="sft"), completion="completions"),
        "rename 'completions' to 'completion'",
    ),
    "wrong column, messages": ("plain", None, Dataset.from_list([{"message": []}]), "rename 'message' to 'messages'"),
    "unheard-of column": ("plain", None, Dataset.from_list([{"x": 1}]), "none of the known formats"),
    "no chat template": ("dpo", None, conversational(rows()), "Set tokenizer.chat_template", NO_TEMPLATE),
    "no chat template, SFT": (
        "sft",
        None,
        conversational(rows(kind="sft")),
        "Set tokenizer.chat_template",
        NO_TEMPLATE,
    ),
    "no chat template, plain": ("plain", "dpo", conversational(rows()), "Set tokenizer.chat_template", NO_TEMPLATE),
    "two BOS": (
        "sft",
        None,
        rows({"prompt": "<s> the ", "completion": "cat"}, kind="sft"),
        "starts with two BOS.*Remove it",
        ADDS_BOS,
    ),
    "two BOS, DPO": ("dpo", "dpo", rows(PAIR | {"prompt": "<s> the "}), "starts with two BOS.*Remove it", ADDS_BOS),
    "two BOS, plain": (
        "plain",
        "dpo",
        rows(PAIR | {"prompt": "<s> the "}),
        "starts with two BOS.*Remove it",
        ADDS_BOS,
    ),
    "pair loss on demonstrations": ("sft", "dpo", rows(kind="sft"), "DPO compares.*loss='cross_entropy'"),
    "pair loss on demonstrations, plain": ("plain", "simpo", rows(kind="sft"), "SimPO compares.*loss='cross_entropy'"),
    "pairs without a loss": ("plain", None, rows(), "Give one, such as loss='dpo'"),
    "pairs to SFT": ("sft", None, rows(), "SteeringDPOTrainer does"),
    "demonstrations to DPO": ("dpo", None, rows(kind="sft"), "SteeringSFTTrainer does"),
    "unknown loss": ("dpo", "dppo", rows(), "Did you mean 'dpo'"),
    "unknown loss, SFT": ("sft", "crossentropy", rows(kind="sft"), "Did you mean 'cross_entropy'"),
    "packed rows have several prompts": (
        "sft",
        None,
        rows(kind="sft"),
        "positions='completion'.*Set packing=False",
        PACKED,
    ),
    "two adapters": ("plain", "dpo", rows(), "already has an adapter.*leave peft_config out", SECOND),
    "two adapters, DPO": ("dpo", "dpo", rows(), "PeftModel", SECOND),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_before_training(name, tmp_path):
    kind, loss, data, message, *options = BAD[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        trainer(kind, tmp_path, data=data, loss=loss, **(options[0] if options else {}))


@pytest.mark.parametrize("kind", ["plain", "dpo"])
def test_streamed_bad_data_are_refused_by_their_first_row(kind, tmp_path):
    def stream(*given):
        return IterableDataset.from_generator(lambda: iter(given))

    with pytest.raises(ValueError, match="data set is empty"):
        trainer(kind, tmp_path, data=stream(), loss="dpo")
    with pytest.raises(ValueError, match="Row 0: chosen equals rejected"):
        trainer(kind, tmp_path, data=stream(PAIR | {"rejected": PAIR["chosen"]}), loss="dpo")


def test_a_stream_of_text_to_the_plain_trainer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Use SteeringDPOTrainer"):
        trainer("plain", tmp_path, data=IterableDataset.from_generator(lambda: iter([PAIR])), loss="dpo")


def test_pair_loss_on_batches_of_a_callers_own_collator(tmp_path):
    def collate(rows):
        ids = torch.tensor([[6, 7, 8]] * len(rows))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    made = trainer("plain", tmp_path, loss="dpo", data_collator=collate, remove_unused_columns=False)
    with pytest.raises(ValueError, match="DPO compares.*the batch has no pairs"):
        made.train()


# -- rows without a label -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [None, "ours"])
@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
def test_rows_whose_labels_are_all_cut_are_left_out_with_one_line(kind, loss, tmp_path, caplog):
    """As TRL leaves them out: training ends where it ends without them."""
    if kind == "plain" and loss is None:
        data, loss = rows(DEMONSTRATION | {"prompt": LONG}, kind="sft"), None
    else:
        pair = kind == "dpo"
        data = rows((PAIR if pair else DEMONSTRATION) | {"prompt": LONG}, kind=kind if pair else "sft")
        loss = loss and ("dpo" if pair else "cross_entropy")
    cut = SHORT_TOKENIZER if kind == "plain" else SHORT
    made = trained(kind, tmp_path / "a", data=data, loss=loss, max_steps=2, eval_dataset=data, **cut)
    lines = [record.message for record in caplog.records if "rows have no label left" in record.message]
    limit = "max_length=12" + (" (all that the model and its tokenizer read)" if kind == "plain" else "")
    line = f"1 of 3 rows have no label left, because their prompts fill {limit}: they add nothing to the loss."
    assert lines == [line] * 2, "one for the training rows, one for the evaluation rows"
    without = trained(kind, tmp_path / "b", data=data.select(range(2)), loss=loss, max_steps=2, **cut)
    assert losses(made) == losses(without)
    assert made.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
def test_tokenised_rows_without_a_label_add_nothing(loss, tmp_path, caplog):
    labels = [[-100, 7, 8], [-100, -100, -100]]
    data = Dataset.from_list([{"input_ids": [6, 7, 8], "attention_mask": [1, 1, 1], "labels": own} for own in labels])
    options = dict(loss=loss, data_collator=default_data_collator, per_device_train_batch_size=2, max_steps=1)
    both = trained("plain", tmp_path / "a", data=data, **options)
    alone = trained("plain", tmp_path / "b", data=data.select([0]), **options)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-6)


# -- rows that are given to evaluate --------------------------------------------------------------------------------

CONVERSATIONS = {"pairs": conversational(pairs(4)), "demonstrations": conversational(demonstrations(4))}
TOKENS = Dataset.from_list([{"prompt_ids": [6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}])
TEXTS = {"pairs": pairs(4), "demonstrations": demonstrations(4)}


@pytest.mark.parametrize("form", [TEXTS, CONVERSATIONS])
@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("plain", "dpo"),
        ("plain", "cross_entropy"),
        ("sft", None),
        ("sft", "cross_entropy"),
        ("dpo", None),
        ("dpo", "dpo"),
    ],
)
def test_rows_given_to_evaluate_are_read_like_those_of_the_constructor(kind, loss, form, tmp_path):
    rows = form["pairs" if "dpo" in (kind, loss) else "demonstrations"]
    made = trainer(kind, tmp_path, data=rows, loss=loss, eval_dataset=rows)
    assert made.evaluate(rows)["eval_loss"] == made.evaluate()["eval_loss"]
    assert made.evaluate({"one": rows})["eval_one_loss"] == made.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("kind", "loss", "data", "message"),
    [
        ("plain", "dpo", TEXTS["demonstrations"], "DPO compares"),
        ("sft", None, TEXTS["pairs"], "SteeringDPOTrainer does"),
        ("dpo", None, TEXTS["demonstrations"], "SteeringSFTTrainer does"),
        ("dpo", "dpo", Dataset.from_list([{"x": 1}]), "match none of the known formats"),
        ("sft", None, rows(DEMONSTRATION | {"completion": ""}, kind="sft"), "Row 2: 'completion' is empty"),
        ("dpo", None, TOKENS, "already tokenised.*Leave eval_dataset out, or give the rows as text"),
        ("dpo", "dpo", TOKENS, "already tokenised.*Leave eval_dataset out, or give the rows as text"),
    ],
)
def test_rows_that_evaluate_cannot_read_are_refused(kind, loss, data, message, tmp_path):
    made = trainer(kind, tmp_path, loss=loss)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        made.evaluate(data)


def test_text_to_evaluate_on_is_refused_by_a_trainer_of_tokenised_rows(tmp_path):
    data = Dataset.from_list([{"input_ids": [6, 7, 8], "labels": [-100, 7, 8]}] * 2)
    made = trainer("plain", tmp_path, data=data)
    with pytest.raises(ValueError, match="are text, but this trainer was made with tokenised rows"):
        made.evaluate(demonstrations(2))


# -- good input that looks bad --------------------------------------------------------------------------------------


def test_keep_end_truncation_keeps_the_answer_of_a_long_prompt(tmp_path):
    data = rows(PAIR | {"prompt": LONG})
    made = trained("dpo", tmp_path, data=data, loss="dpo", max_length=12, truncation_mode="keep_end", max_steps=1)
    assert len(made.train_dataset) == 3


def test_message_content_in_parts_is_not_empty(tmp_path):
    def parts(row):
        return {name: [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
                for name, messages in row.items()}  # fmt: skip

    template = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}</s>{% endfor %}"
    data = Dataset.from_list([parts(row) for row in conversational(demonstrations(4))])
    trainer("sft", tmp_path, data=data, processing_class=tokenizer(template=template))


# -- numbers that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
def test_training_stops_and_keeps_the_state_before_the_bad_step(kind, where, accumulation, tmp_path):
    loss = Poison(3 * accumulation, where)
    made = loss.made = trainer(
        kind, tmp_path, loss=loss, max_steps=5, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=f"(?i){where}.* is not finite at step 3.*after step 2 is saved") as error:
        made.train()
    folder = os.path.join(str(tmp_path), "last-good")
    assert folder in str(error.value) and made.state.global_step == 2
    kept = PeftModel.from_pretrained(tiny(), folder)
    [before] = loss.before.values()
    assert torch.equal(vector_of(kept), before)
    assert torch.isfinite(before).all() and before.norm() > 0


@pytest.mark.parametrize(("kind", "loss"), [("sft", None), ("dpo", None), ("dpo", "dpo")])
def test_a_base_that_is_not_finite_stops_the_first_step_under_every_loss(kind, loss, tmp_path):
    model = tiny()
    model.lm_head.weight.data[7, 0] = torch.inf
    made = trainer(kind, tmp_path, model=model, loss=loss)
    with pytest.raises(NonFiniteError, match="not finite at step 1"):
        made.train()
    assert not vector_of(made.model).any()


def test_a_plain_parent_is_not_guarded(tmp_path):
    """`peft_config=None` without a loss is the parent, so it does what the parent does."""
    model = tiny()
    model.lm_head.weight.data[7, 0] = torch.inf
    made = trained("sft", tmp_path, model=model, peft_config=None, logging_nan_inf_filter=False)
    assert len(losses(made)) == 3


def test_a_finite_run_writes_no_last_good_folder(tmp_path):
    trained("dpo", tmp_path, loss="dpo", peft_config=SteeringVectorConfig())
    assert not os.path.exists(tmp_path / "last-good")


def test_arguments_of_trls_own_loss_are_not_dropped_in_silence(tmp_path):
    with pytest.raises(ValueError, match=r"beta=0.5 belongs to TRL's own loss"):
        trainer("dpo", tmp_path, loss="dpo", beta=0.5)
    with pytest.raises(ValueError, match=r"loss_type=\['ipo'\] belongs to TRL's own loss"):
        trainer("dpo", tmp_path, loss="dpo", loss_type="ipo")
    trainer("dpo", tmp_path, loss=get_loss("dpo", beta=0.5), beta=0.5)
    trainer("dpo", tmp_path, loss=None, beta=0.5)
