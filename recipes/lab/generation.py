"""Answers of a model to prompts, and how many tokens prompts take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.files import ArmError


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Any], new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """Answers to prompts (strings or lists of messages), generated as one left-padded batch: greedily, or with
    `seed`'s random numbers at a temperature above 0."""
    chat = not isinstance(prompts[0], str)
    texts = as_asked(tokenizer, prompts)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat).to(model.device)
    finally:
        tokenizer.padding_side = side
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        end = tokenizer.eos_token_id
        out = model.generate(**inputs, max_new_tokens=new_tokens, pad_token_id=end, **sampling)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def prompt_lengths(tokenizer: Any, prompts: Sequence[Any]) -> list[int]:
    """Tokens of prompts (strings or lists of messages) as `generate` asks them."""
    special = isinstance(prompts[0], str)
    return [len(ids) for ids in tokenizer(as_asked(tokenizer, prompts), add_special_tokens=special)["input_ids"]]


def check_context(model: Any, tokenizer: Any, rows: Dataset, new_tokens: int, what: str) -> None:
    """Refuse prompts that the model would read cut off.

    Args:
        model: Which says how much it reads.
        tokenizer: Its tokenizer.
        rows: Prompts, and the answers that stand behind them, if any.
        new_tokens: How long an answer of the model's own may become.
        what: Whose prompts they are.

    Raises:
        ArmError: the longest one and its answer are longer than the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    longest = max(prompt_lengths(tokenizer, rows["prompt"])) + new_tokens
    if {"chosen", "completion"} & set(rows.column_names):
        [batch] = batches(tokenizer, rows, len(rows))  # as wide as its longest row
        longest = max(longest, batch.inputs["input_ids"].shape[1])
    if context is not None and longest > context:
        raise ArmError(
            f"{what}: a prompt and its answer take {longest} tokens, the model reads {context}. Fewer demonstrations, "
            "a shorter instruction, or shorter answers."
        )


def as_asked(tokenizer: Any, prompts: Sequence[Any]) -> list[str]:
    """Prompts as the model reads them: strings as they are, messages through the chat template."""
    if isinstance(prompts[0], str):
        return [*prompts]
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]


def plain(prompt: Any) -> str:
    """A text, or the content of the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
