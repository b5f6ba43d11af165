"""Answers of a model to prompts, and how many tokens prompts take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from steertune.adapters import steering_layers
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.files import ArmError
from steertune.trainers import NonFiniteError

_PLAIN = 1e6  # strengths up to here are not looked at
_LONGEST = 1e18  # of what is added to a state; its square must be a number of float32


class FiniteLogits(LogitsProcessor):
    """Ends a generation whose logits are no numbers: what is generated from them is an empty text, or noise."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Check the logits of the next token, `(rows, vocabulary)`.

        Raises:
            NonFiniteError: see `broken_rows`.
        """
        if broken_rows(scores).any():
            raise NonFiniteError(
                "The model's logits are NaN or infinite, so it has no answer: the strength is too large for the "
                "vector and the number format, or the weights are broken. Use a smaller strength, or float32."
            )
        return scores


def broken_rows(logits: Tensor) -> Tensor:
    """Which rows of logits, `(rows, vocabulary)`, say nothing, `(rows,)`: one is NaN or +inf, or none is finite.

    -inf alone is a token that is ruled out.
    """
    return ~logits.max(dim=-1).values.isfinite()  # NaN is the maximum of every row that holds it


def check_strength(model: Any, strength: float, adapter: str | None = None) -> None:
    """Refuse a strength at which a steering vector's length squared is more than float32 holds: the norm of such a
    state is infinite, so the layers above see a state of zeros, and answer nothing.

    Args:
        model: With steering vectors; other adapters are not looked at.
        strength: Of the vectors.
        adapter: One of them; None: all.

    Raises:
        ArmError: names the strength and the largest one.
    """
    if abs(strength) <= _PLAIN:
        return
    lengths = [
        float(layer.written(name).detach().float().norm())
        for layer in steering_layers(model)
        for name in layer.config
        if adapter in (None, name)
    ]
    if lengths and not abs(strength) * max(lengths) <= _LONGEST:
        raise ArmError(
            f"strength={strength:g} times a vector of length {max(lengths):.3g} is more than the model can add. Use "
            f"one below {_LONGEST / max(lengths):.0e}; those that change an answer are mostly below 100."
        )


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Any], new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """Answers to prompts (strings or lists of messages), generated as one left-padded batch: greedily, or with
    `seed`'s random numbers at a temperature above 0.

    Raises:
        NonFiniteError: the model computes no answer (see `FiniteLogits`).
    """
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
        out = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            pad_token_id=end,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
            **sampling,
        )
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
