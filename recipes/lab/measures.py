"""What a trained adapter does: preference on held-out pairs, distance from the base model, free generations."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from steertune.recipes.lab.arm import ArmError
from steertune.recipes.lab.paths import TASKS
from steertune.trainers import Batch, ModelAt, collator, labelled_logits, tokenise

_PROCESS = Path("/proc/self")
NEUTRAL = TASKS / "neutral.jsonl"


@torch.no_grad()
def pair_margins(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    strengths: Sequence[float],
    batch_size: int = 8,
    show: bool = True,
) -> dict[float, Tensor]:
    """`log p(chosen) - log p(rejected)` in nats per held-out pair, at each strength: strength -> `(pairs,)`."""
    margins: dict[float, list[Tensor]] = {s: [] for s in strengths}
    with tqdm(total=len(pairs) * len(strengths), desc="Held-out pairs", unit="pair", disable=not show) as bar:
        for batch in batches(tokenizer, pairs, max(1, batch_size // 2)):
            at = ModelAt(model, model, batch.to(model.device))
            for strength in strengths:
                outputs = at(strength)
                margins[strength].append((outputs.chosen.logps - outputs.rejected.logps).cpu())
                bar.update(len(outputs.mask) // 2)
    return {strength: torch.cat(values) for strength, values in margins.items()}


def batches(tokenizer: PreTrainedTokenizerBase, data: Dataset, size: int) -> list[Batch]:
    """Pairs or demonstrations, tokenised and collated as TRL does, `size` a batch."""
    tokenised = tokenise(data, tokenizer)
    collate, rows = collator(tokenised, tokenizer), tokenised.to_list()
    return [Batch.read(collate(rows[i : i + size])) for i in range(0, len(rows), size)]


def neutral_rows() -> Dataset:
    """Everyday questions and answers that no behaviour is about."""
    return Dataset.from_list([json.loads(line) for line in NEUTRAL.read_text(encoding="utf-8").splitlines()])


@torch.no_grad()
def neutral_logps(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Per neutral answer, log-probabilities of every token `(tokens, vocabulary)` and the true tokens `(tokens,)`."""
    found = []
    for row in tokenise(neutral_rows() if rows is None else rows, tokenizer).to_list():
        labels = torch.tensor([row["labels"]], device=model.device)
        ids = torch.tensor([row["input_ids"]], device=model.device)
        batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, pairs=False)
        logps = F.log_softmax(labelled_logits(model, model, batch), dim=-1)
        found.append((logps.cpu(), batch.targets[0].cpu()))
    return found


def side_effects(steered: list[tuple[Tensor, Tensor]], base: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """What the adapter does to text it should leave alone.

    Args:
        steered: `neutral_logps` of the trained model.
        base: `neutral_logps` of the base model.

    Returns:
        `kl`: mean KL(steered || base) per token, in nats; `perplexity` and `base_perplexity` of the neutral answers.
    """
    tokens = sum(len(targets) for _, targets in base)
    pairs = zip(steered, base, strict=True)
    kl = sum(float((ours.exp() * (ours - theirs)).sum()) for (ours, _), (theirs, _) in pairs)
    return {"kl": kl / tokens, "perplexity": _perplexity(steered), "base_perplexity": _perplexity(base)}


def _perplexity(rows: list[tuple[Tensor, Tensor]]) -> float:
    nll = sum(float(F.nll_loss(logps, targets, reduction="sum")) for logps, targets in rows)
    return math.exp(nll / sum(len(targets) for _, targets in rows))


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


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Share of word n-grams that stood before in the same text, averaged over texts that have any."""
    shares = []
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def reset_peak_memory() -> None:
    """Count the peak memory from now on, where the system can (CUDA, Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _PROCESS.is_dir():
        with suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Peak memory of the process, or of the GPU where there is one, in GB, since `reset_peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if _PROCESS.is_dir():
        status = (_PROCESS / "status").read_text()
        return float(status.split("VmHWM:")[1].split()[0]) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6
