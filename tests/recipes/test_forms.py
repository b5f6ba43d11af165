"""Rows in the form that a tokenizer reads, generation with every kind of tokenizer, and the try of one row."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_data
import torch
from datasets import Dataset
from tiny_models import tiny

from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.forms import NOTE, notes_on_form, readable, written
from steertune.recipes.lab.generation import generate, left_padded, prompt_ids
from steertune.recipes.lab.observe import HeldOut, neutral_rows
from steertune.recipes.lab.rehearsal import rehearse, rehearse_training
from steertune.recipes.lab.tables import ModelTable
from steertune.trainers import DataError

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
STRIPPING = tiny_data.TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
if STRIPPING == tiny_data.TEMPLATE:
    STRIPPING = tiny_data.TEMPLATE.replace("m.content", "m.content | trim")


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_conversations_become_questions_and_answers() -> None:
    row = {
        "prompt": [turn("system", "Be brief."), turn("user", "One?"), turn("assistant", "Yes."), turn("user", "Two?")],
        "chosen": [turn("assistant", "No.")],
        "rejected": [turn("assistant", "Maybe.")],
        "id": 7,
    }
    [text] = readable(Dataset.from_list([row]), tiny_data.tokenizer(template=None))
    assert text == {
        "prompt": "Be brief.\nQuestion: One?\nAnswer: Yes.\nQuestion: Two?\nAnswer:",
        "chosen": " No.",
        "rejected": " Maybe.",
        "id": 7,
    }


def test_whole_conversations_become_texts() -> None:
    rows = Dataset.from_list([{"messages": [turn("user", "One?"), turn("assistant", "Yes.")]}])
    assert readable(rows, tiny_data.tokenizer(template=None)).to_list() == [{"text": "Question: One?\nAnswer: Yes."}]


def test_rows_that_the_tokenizer_reads_stay() -> None:
    chat, plain = tiny_data.tokenizer(), tiny_data.tokenizer(template=None)
    texts, messages = tiny_data.pairs(), tiny_data.conversational(tiny_data.pairs())
    assert readable(messages, chat) is messages and readable(texts, plain) is texts and readable(texts, chat) is texts
    assert [notes_on_form(rows, plain) for rows in (messages, texts)] == [[NOTE], []]
    assert notes_on_form(messages, chat) == []
    assert isinstance(neutral_rows(plain)[0]["prompt"], str) and isinstance(neutral_rows(chat)[0]["prompt"], list)


def test_messages_that_are_no_texts_are_named() -> None:
    rows = Dataset.from_list([{"prompt": [turn("tool", "3")], "completion": [turn("assistant", "three")]}])
    with pytest.raises(ArmError, match="Row 0: 'prompt' has the message .*cannot be read as plain text"):
        readable(rows, tiny_data.tokenizer(template=None))


def test_what_a_template_refuses_or_a_tokenizer_lacks_is_said() -> None:
    with pytest.raises(ArmError, match="no chat template.*Give the prompt as text"):
        written(tiny_data.tokenizer(template=None), [turn("user", "One?")])
    with pytest.raises(ArmError, match="refuses the messages.*System role not supported.*where = 'before'"):
        written(tiny_data.tokenizer(template=NO_SYSTEM), [turn("system", "Be brief."), turn("user", "One?")])


# -- generation with every kind of tokenizer --------------------------------------------------------------------------

PROMPTS = ["the cat runs", "red sky sea now then we"]


@pytest.mark.parametrize(
    "without", [["pad_token"], ["pad_token", "bos_token"], ["pad_token", "bos_token", "eos_token"]]
)
def test_a_batch_without_special_tokens_gets_the_answers_of_its_rows(without: list[str]) -> None:
    model, tokenizer = tiny(max_position_embeddings=128, eos_token_id=None), tiny_data.tokenizer()
    model.generation_config.eos_token_id = None
    for name in without:
        setattr(tokenizer, name, None)
    together = generate(model, tokenizer, PROMPTS, 5)
    assert together == [generate(model, tokenizer, [prompt], 5)[0] for prompt in PROMPTS]


def test_the_filler_is_masked() -> None:
    inputs, filler = left_padded(tiny_data.tokenizer(), [[5, 6, 7], [8]])
    assert filler == 2, "EOS, which ends answers too"
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_eos_that_the_tokenizer_adds_does_not_end_the_prompt() -> None:
    from tokenizers import processors

    made: Any = tiny_data.tokenizer(template=None)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    plain = tiny_data.tokenizer(adds_bos=True, template=None)
    assert prompt_ids(made, PROMPTS) == prompt_ids(plain, PROMPTS)


def test_the_models_eos_is_used_where_the_tokenizer_has_none(tmp_path: Any) -> None:
    tiny().save_pretrained(tmp_path)
    made = tiny_data.tokenizer(template=None)
    made.eos_token = None
    made.save_pretrained(tmp_path)
    _, tokenizer = load_model(ModelTable(name=str(tmp_path)))
    assert tokenizer.eos_token == "</s>"


# -- one row of everything --------------------------------------------------------------------------------------------


def held_out(rows: Dataset, tokenizer: Any = None, context: int = 64, **options: Any) -> HeldOut:
    model = options.pop("model", None) or tiny(max_position_embeddings=context)
    return HeldOut(model, tokenizer or tiny_data.tokenizer(), rows, tiny_data.demonstrations(), **options)


def test_every_form_passes_with_every_template() -> None:
    texts = tiny_data.pairs()
    for template in (tiny_data.TEMPLATE, STRIPPING, None):
        tokenizer = tiny_data.tokenizer(template=template)
        for rows in (texts, tiny_data.conversational(texts)):
            rows = readable(rows, tokenizer)
            rehearse(held_out(rows, tokenizer, generations=2, neutral_generations=1, new_tokens=4))
            assert rehearse_training(load_arm("vector_dpo"), tiny(), tokenizer, rows) == []


def test_rows_and_answers_beyond_the_context_are_refused() -> None:
    rows = tiny_data.pairs().to_list()
    long = Dataset.from_list([dict(row, chosen="red " * 70) if i == 5 else row for i, row in enumerate(rows)])
    with pytest.raises(ArmError, match="test rows: a prompt .*the model reads 64 .row 5; 1 of 8"):
        rehearse(held_out(long))
    with pytest.raises(ArmError, match="test rows, with generated answers: .*2 of 2"):
        rehearse(held_out(Dataset.from_list(rows), generations=2, new_tokens=64))
    [note] = rehearse_training(None, tiny(), tiny_data.tokenizer(), long)
    assert note.startswith("1 of 8 training rows are longer than the model's context of 64 tokens")


def test_a_view_that_the_template_refuses_is_found_before_training() -> None:
    rows = tiny_data.conversational(tiny_data.pairs())
    words = ["--views.good.name=instruction", "--views.good.text=red", "--views.good.where=system"]
    arm = load_arm("vector_distillation", words)
    with pytest.raises(ValueError, match="View 'good': the chat template refuses it .System role not supported"):
        rehearse_training(arm, tiny(), tiny_data.tokenizer(template=NO_SYSTEM + tiny_data.TEMPLATE), rows)
    with pytest.raises(ValueError, match="where='system' needs conversations"):
        rehearse_training(arm, tiny(), tiny_data.tokenizer(template=None), tiny_data.pairs())


def test_neutral_views_follow_the_tokenizer() -> None:
    rows, plain = tiny_data.pairs(), tiny_data.tokenizer(template=None)
    model = tiny(max_position_embeddings=512)
    assert rehearse_training(load_arm("vector_neutral_dpo"), model, plain, rows) == []


def test_test_rows_are_checked_like_training_rows() -> None:
    rows = tiny_data.pairs().to_list()
    rows[3]["rejected"] = rows[3]["chosen"]
    with pytest.raises(DataError, match="Row 3: chosen equals rejected"):
        rehearse(held_out(Dataset.from_list(rows)))


def test_a_model_without_finite_probabilities_is_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(ArmError, match="not finite"):
        rehearse(held_out(tiny_data.pairs(), model=model))
