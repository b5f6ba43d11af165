"""Rows keep to what the model reads: the trainers cut them there, and say so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from datasets import Dataset
from tiny_data import TRAINERS, WORDS, arguments, demonstrations, pairs, tokenizer, trained, trainer
from tiny_models import tiny
from transformers import AutoConfig
from trl import DPOConfig, SFTConfig

from steertune.trainers import DataError, context_length, tokenise
from steertune.trainers.row_checks import TokenLimits, check_tokenised

LONG = " ".join(WORDS * 18)[:1200]  # some 300 words, each a token
WITHOUT_EOS = "The tokenizer has no EOS token"


def longest(made: Any) -> list[int]:
    """Tokens of the longest row of every batch that a trainer reads."""
    return [batch["input_ids"].shape[1] for batch in made.get_train_dataloader()]


@pytest.mark.parametrize("kind", ["dpo", "sft", "plain"])
def test_long_rows_are_cut_at_the_context_and_it_is_said(kind, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    data = demonstrations() if kind == "sft" else pairs()
    answer = "completion" if kind == "sft" else "chosen"
    long = Dataset.from_list([dict(row, **{answer: LONG}) if i == 2 else row for i, row in enumerate(data.to_list())])
    loss = "dpo" if kind == "plain" else None
    made = trainer(kind, tmp_path, model=tiny(max_position_embeddings=64), data=long, loss=loss)
    assert max(longest(made)) == 64, "TRL's default max_length is 1024"
    said = [record.message for record in caplog.records if "max_length=64 (all that the model" in record.message]
    assert len(said) == 1 and said[0].startswith("1 of 8")
    made.train()


@pytest.mark.parametrize("kind, config", [("dpo", DPOConfig), ("sft", SFTConfig)])
def test_the_users_own_arguments_stay_and_shorter_limits_count(kind, config, tmp_path):
    args = arguments(kind, tmp_path, max_length=None)
    model, data = tiny(max_position_embeddings=64), demonstrations() if kind == "sft" else pairs()
    made = TRAINERS[kind](model=model, args=args, train_dataset=data, processing_class=tokenizer())
    assert args.max_length is None and made.args.max_length == 64
    shorter = arguments(kind, tmp_path, max_length=20)
    assert (
        TRAINERS[kind](model=tiny(), args=shorter, train_dataset=data, processing_class=tokenizer()).args.max_length
        == 20
    )
    assert isinstance(made.args, config)


def test_tokenised_rows_beyond_the_context_are_refused(tmp_path):
    rows = tokenise(Dataset.from_list([{"text": LONG}]), tokenizer())
    with pytest.raises(DataError, match="Row 0 has 2.. tokens, but the model reads only 64"):
        trainer("plain", tmp_path, model=tiny(), data=rows, loss="cross_entropy")


@pytest.mark.parametrize(
    "config, limit, expected",
    [
        ({"max_position_embeddings": 64}, 10**30, 64),
        ({"max_position_embeddings": 64}, 48, 48),
        ({"max_position_embeddings": 64}, 512, 64),
        (
            {
                "max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4,
                },
            },
            10**30,
            128,
        ),
    ],
)  # fmt: skip
def test_the_context_is_the_smaller_of_what_model_and_tokenizer_say(config, limit, expected):
    assert context_length(AutoConfig.for_model("llama", **config), tokenizer(model_max_length=limit)) == expected


def test_pairs_that_nothing_cuts_are_refused():
    """TRL makes its own arguments where none are given, with max_length=1024."""
    rows = tokenise(Dataset.from_list([{"prompt": "the ", "chosen": LONG, "rejected": "cat"}]), tokenizer())
    for limit in (None, 1024):
        with pytest.raises(DataError, match="Row 0 has 2.. tokens, but the model reads only 64.*max_length=64"):
            check_tokenised(rows, rows, TokenLimits(max_length=limit, context=64))
    check_tokenised(rows, rows, TokenLimits(max_length=64, context=64))


def test_without_a_limit_there_is_none():
    assert context_length(None) is None
    assert context_length(AutoConfig.for_model("bloom"), tokenizer(model_max_length=10**30)) is None


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_plain_text_needs_an_eos_token(kind, tmp_path):
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(DataError, match=WITHOUT_EOS):
        trainer(kind, tmp_path, processing_class=made)


@pytest.mark.parametrize("kind", ["dpo", "sft", "plain"])
def test_a_tokenizer_without_padding_token_trains(kind, tmp_path):
    made = tokenizer()
    made.pad_token = None
    trained(kind, tmp_path, processing_class=made, loss="dpo" if kind == "plain" else None)


def test_a_template_that_refuses_the_messages_is_named_before_training(tmp_path):
    refusing = tokenizer(template="{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}")
    row = {
        "prompt": [{"role": "system", "content": "red"}, {"role": "user", "content": "sky"}],
        "chosen": [{"role": "assistant", "content": "sea"}],
        "rejected": [{"role": "assistant", "content": "now"}],
    }
    with pytest.raises(DataError, match="Row 0: the chat template refuses its messages: no system"):
        trainer("dpo", tmp_path, data=Dataset.from_list([row]), processing_class=refusing)
