"""The effect of steering on texts: log-probabilities of their tokens, KL to the base model, monitors' scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steertune.adapters import prompt_length
from steertune.adapters.analysis.activations import outputs_of
from steertune.adapters.rows import RowVector, steer_rows
from steertune.recipes.lab.files import read_jsonl
from steertune.recipes.lab.forms import has_template
from steertune.recipes.lab.generation import plain
from steertune.recipes.lab.observe import NEUTRAL
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.limits import read_prompt

NEUTRAL_ROWS, NEUTRAL_TOKENS = 4, 24
"""The amount of neutral text that is measured at a time: little, so that the result follows a slider."""

TokenRow = tuple[list[int], list[int]]
"""Tokens of a prompt and of what follows it."""


@dataclass(frozen=True)
class Effect:
    """The effect of steering on one text.

    Attributes:
        tokens: Ids of the tokens after the prompt.
        base: Log-probability of each under the base model, in nats.
        steered: Log-probability of each under the steered model.
        kl: KL(steered || base) of the distribution that each was drawn from.
        scores: Name of a monitor -> score of each token as the steered model reads it.
    """

    tokens: list[int]
    base: list[float]
    steered: list[float]
    kl: list[float]
    scores: dict[str, list[float]]


@torch.no_grad()
def effects(
    engine: Engine, rows: Sequence[TokenRow], vectors: Sequence[RowVector], monitors: Sequence[str] = ()
) -> list[Effect]:
    """Read texts with the base model and with the steered one; must run on the engine's thread.

    Args:
        engine: The engine whose model reads them.
        rows: The texts.
        vectors: The vectors that steer.
        monitors: Names of the monitors that score their tokens.
    """
    base, names = engine.base, sorted(set(monitors))
    watched = {n: base.get_submodule(engine.monitors[name].module) for n, name in enumerate(names)}
    measured = []
    for prompt, answer in rows:
        ids_2T = torch.tensor([prompt + answer] * 2, device=base.device)
        with (
            steer_rows(engine.vectors.model, [(), tuple(vectors)]),
            prompt_length(engine.vectors.model, len(prompt)),
            outputs_of(base, watched, ends_early=False) as states,
        ):
            logits_2TV = base(input_ids=ids_2T, attention_mask=torch.ones_like(ids_2T)).logits
        # the logits at a position predict the token after it
        logps_2AV = logits_2TV[:, len(prompt) - 1 : -1].float().log_softmax(-1)
        scores = {
            name: engine.monitors[name].token_scores(states[n][1, len(prompt) :][None])[0].tolist()
            for n, name in enumerate(names)
        }
        measured.append(_effect(answer, logps_2AV, scores))
    return measured


def _effect(answer: list[int], logps_2AV: Tensor, scores: dict[str, list[float]]) -> Effect:
    ids_A1 = torch.tensor(answer, device=logps_2AV.device)[:, None]
    base_A, steered_A = (logps_AV.gather(1, ids_A1)[:, 0].tolist() for logps_AV in logps_2AV)
    base_AV, steered_AV = logps_2AV
    kl_A = (steered_AV.exp() * (steered_AV - base_AV)).sum(-1).clamp_min(0)
    return Effect(answer, base_A, steered_A, kl_A.tolist(), scores)


def summary(measured: Sequence[Effect]) -> dict[str, Any]:
    """Mean KL in nats per token, and both perplexities."""
    kl = [value for one in measured for value in one.kl]
    base = [value for one in measured for value in one.base]
    steered = [value for one in measured for value in one.steered]
    return {
        "tokens": len(kl),
        "kl": sum(kl) / len(kl),
        "perplexity": {"base": _perplexity(base), "steered": _perplexity(steered)},
    }


def _perplexity(logps: Sequence[float]) -> float:
    return math.exp(min(-sum(logps) / len(logps), 700.0))  # avoid overflow


def neutral_rows(tokenizer: Any) -> list[TokenRow]:
    """The first neutral prompts and answers of the package."""
    rows = []
    for row in read_jsonl(NEUTRAL)[:NEUTRAL_ROWS]:
        prompt = row["prompt"] if has_template(tokenizer) else plain(row["prompt"])
        answer = tokenizer(plain(row["completion"]), add_special_tokens=False)["input_ids"]
        rows.append((read_prompt(tokenizer, prompt), answer[:NEUTRAL_TOKENS]))
    return rows
