"""Generate answers to prompts, and count the tokens of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from steertune.adapters import steering_layers
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.forms import written
from steertune.trainers import NonFiniteError, context_length
from steertune.trainers.data import tokenised_rows
from steertune.trainers.padding import padded

_PLAIN = 1e6  # strengths up to here are not checked
LONGEST = 1e18
"""The longest vector that can be added to a state; the square of its length must fit in float32."""


class FiniteLogits(LogitsProcessor):
    """Ends a generation whose logits are not finite: they would generate an empty text, or noise."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Check the logits of the next token, `(rows, vocabulary)`.

        Raises:
            NonFiniteError: see `check_finite`.
        """
        check_finite(scores)
        return scores


def broken_rows(logits: Tensor) -> Tensor:
    """Which rows of logits, `(rows, vocabulary)`, are broken, `(rows,)`: a logit is NaN or +inf, or none is finite.

    A single -inf is allowed: it excludes a token.
    """
    return ~logits.max(dim=-1).values.isfinite()  # NaN is the maximum of every row that holds it


def check_finite(logits: Tensor) -> None:
    """Refuse logits, `(rows, vocabulary)`, from which no answer can be generated.

    Raises:
        NonFiniteError: a row is broken (see `broken_rows`).
    """
    if broken_rows(logits).any():
        raise NonFiniteError(
            "The model's logits are NaN or infinite, so it has no answer: the strength is too large for the "
            "vector and the number format, or the weights are broken. Use a smaller strength, or float32."
        )


def check_strength(model: Any, strength: float, adapter: str | None = None) -> None:
    """Refuse a strength at which a steering vector's length squared exceeds float32: the norm of such a state is
    infinite, so the layers above see a state of zeros, and the answer is empty. Other adapters are not checked.

    Raises:
        ArmError: the message names the strength and the largest allowed one.
    """
    if abs(strength) <= _PLAIN:
        return
    length = longest_vector(model, adapter)
    if length and not abs(strength) * length <= LONGEST:
        raise ArmError(
            f"strength={strength:g} times a vector of length {length:.3g} is more than the model can add. Use a "
            f"strength below {LONGEST / length:.0e}; useful ones are mostly below 100."
        )


def longest_vector(model: Any, adapter: str | None = None) -> float:
    """Length of the longest steering vector, of one adapter or of all; 0 without any."""
    lengths = [
        layer.written(name).detach().double().norm()
        for layer in steering_layers(model)
        for name in layer.config
        if adapter in (None, name)
    ]
    return max(map(float, lengths), default=0.0)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Any], new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """Answers to prompts (strings or lists of messages), generated as one left-padded batch: greedily, or with
    `seed`'s random numbers at a temperature above 0.

    Raises:
        NonFiniteError: the model computes no answer (see `FiniteLogits`).
    """
    return generate_and_look(model, tokenizer, prompts, new_tokens, temperature, seed)[0]


@torch.no_grad()
def generate_and_look(
    model: Any, tokenizer: Any, prompts: Sequence[Any], new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> tuple[list[str], list[bool]]:
    """Like `generate`, and also returns whether each answer was cut off: it had not ended after `new_tokens`."""
    inputs, filler = left_padded(tokenizer, prompt_ids(tokenizer, prompts))
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            **{name: values.to(model.device) for name, values in inputs.items()},
            max_new_tokens=new_tokens,
            pad_token_id=filler,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
            **sampling,
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(sorted(end_tokens(model, tokenizer)), dtype=new.dtype, device=new.device)
    ended = torch.isin(new, ends).any(dim=1)
    texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts, (~ended).tolist()


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those of the model's generation configuration, else the tokenizer's."""
    config = model.generation_config
    ids = None if config is None else config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return set() if ids is None else {*ids} if isinstance(ids, list) else {ids}


def prompt_ids(tokenizer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of prompts (strings or lists of messages), up to where the answer begins.

    Raises:
        ArmError: the tokenizer cannot format the messages; see `forms.written`.
    """
    ids = []
    for prompt in prompts:
        is_text, text = isinstance(prompt, str), written(tokenizer, prompt)
        row = list(tokenizer(text, add_special_tokens=is_text)["input_ids"])
        # some tokenizers add EOS to every text, which would end the prompt
        ends = is_text and row[-1:] == [tokenizer.eos_token_id] and not text.endswith(str(tokenizer.eos_token))
        ids.append(row[:-1] if ends else row)
    return ids


def left_padded(tokenizer: Any, ids: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], int]:
    """Rows as one batch, `(rows, tokens)`, padded on the left, and the padding token.

    Base models often come without a padding token, some without EOS. Whatever fills the batch is masked.
    """
    filler = next(i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id, 0) if i is not None)
    ids_BT, mask_BT = padded(ids, filler)
    return {"input_ids": ids_BT, "attention_mask": mask_BT}, filler


def prompt_lengths(tokenizer: Any, prompts: Sequence[Any]) -> list[int]:
    """The number of tokens of prompts (strings or lists of messages), as `generate` reads them."""
    return [len(ids) for ids in prompt_ids(tokenizer, prompts)]


def check_context(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    new_tokens: int,
    what: str,
    fix: str = "Give fewer demonstrations, a shorter instruction, or shorter answers.",
) -> None:
    """Refuse rows that exceed the model's context, with room for an answer of `new_tokens`. `what` names the rows in
    the error, and `fix` is its end.

    Raises:
        ArmError: one of them and its answer are longer than the model's context; the message names the first.
    """
    context = context_length(model.config, tokenizer)
    if context is None or not len(rows):
        return
    lengths = row_lengths(tokenizer, rows, new_tokens)
    if long := [i for i, length in enumerate(lengths) if length > context]:
        raise ArmError(
            f"{what}: a prompt and its answer take {lengths[long[0]]} tokens, the model reads {context} "
            f"(row {long[0]}; {len(long)} of {len(rows)} rows are too long). {fix}"
        )


def row_lengths(tokenizer: Any, rows: Dataset, new_tokens: int = 0) -> list[int]:
    """Tokens of every row: the larger of its prompt with its answers, and its prompt with `new_tokens`."""
    lengths = [0] * len(rows)
    if "prompt" in rows.column_names:
        lengths = [length + new_tokens for length in prompt_lengths(tokenizer, rows["prompt"])]
    if {"chosen", "completion", "text", "messages"} & {*rows.column_names}:
        for i, row in enumerate(tokenised_rows(rows, tokenizer)):
            answers = [len(row.get(name, ())) for name in ("input_ids", "chosen_ids", "rejected_ids")]
            lengths[i] = max(lengths[i], len(row.get("prompt_ids", ())) + max(answers))
    return lengths


def plain(prompt: Any) -> str:
    """A text, or the content of the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
