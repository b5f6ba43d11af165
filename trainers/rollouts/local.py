"""An engine that samples with transformers, each row of a batch with its own vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from ...adapters.blocks import find_blocks
from ...adapters.observing import base_model
from ...adapters.outputs import adding
from ..padding import padded
from .engine import Completion, Request, Sampling


class TransformersEngine:
    """Samples from a model with the adapters that it has, plus the vectors of each request.

    Args:
        model: A transformers model, with or without PEFT.
        rows: Rows per pass that scores completions. All completions are sampled at once.
    """

    def __init__(self, model: nn.Module, rows: int = 8) -> None:
        self.model, self.rows = model, rows

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Sample all completions in one batch, padded on the left, and score them under the same vectors."""
        model: Any = self.model
        width = max(len(request.prompt) for request in requests)
        device = next(model.parameters()).device
        ids_RC, mask_RC = padded([request.prompt for request in requests], sampling.pad_token_id, device)
        with steered(model, requests):
            sampled_RC = model.generate(input_ids=ids_RC, attention_mask=mask_RC, generation_config=_config(sampling))
        tokens = [_until_end(row, sampling.eos_token_id) for row in sampled_RC[:, width:].tolist()]
        logps = self._scores(requests, tokens, sampling)
        return [Completion(row, scores) for row, scores in zip(tokens, logps, strict=True)]

    def _scores(
        self, requests: Sequence[Request], tokens: Sequence[list[int]], sampling: Sampling
    ) -> list[list[float]]:
        """Log-probabilities of sampled tokens, a few rows at a time, because they need all logits."""
        model: Any = self.model
        device = next(model.parameters()).device
        scores: list[list[float]] = []
        for start in range(0, len(requests), self.rows):
            some, answers = requests[start : start + self.rows], tokens[start : start + self.rows]
            # padded like a batch of the trainer: prompts on the left, completions on the right
            prompts_RC, before_RC = padded([request.prompt for request in some], sampling.pad_token_id, device)
            answers_RA, after_RA = padded(answers, sampling.pad_token_id, device, left=False)
            with steered(model, some):
                logits_RAV = model(
                    input_ids=torch.cat([prompts_RC, answers_RA], dim=1),
                    attention_mask=torch.cat([before_RC, after_RA], dim=1),
                    logits_to_keep=answers_RA.shape[1] + 1,
                ).logits[:, :-1]
            logps_RAV = (logits_RAV.float() / sampling.temperature).log_softmax(dim=-1)
            logps_RA = logps_RAV.gather(-1, answers_RA[..., None])[..., 0]
            scores += [row[: len(answer)].tolist() for row, answer in zip(logps_RA, answers, strict=True)]
        return scores


@contextmanager
def steered(model: nn.Module, requests: Sequence[Request]) -> Iterator[None]:
    """Context in which forward passes of a batch add each row's vectors to the outputs of its blocks."""
    base: Any = base_model(model)
    blocks = [block for _, block in find_blocks(base)]
    embedding = base.get_input_embeddings().weight
    layers = sorted({layer for request in requests for layer in request.vectors})
    with ExitStack() as stack:
        for layer in layers:
            zero_D = torch.zeros(embedding.shape[-1])
            vectors_RD = torch.stack([request.vectors.get(layer, zero_D).float().cpu() for request in requests])
            if vectors_RD.any():
                stack.enter_context(adding(blocks[layer], vectors_RD[:, None].to(embedding.device)))
        yield


def _config(sampling: Sampling) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sampling.eos_token_id,
        pad_token_id=sampling.pad_token_id,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        **{"disable_compile": True, **sampling.more},
    )


def token_ids(prompts: Sequence[Any], tokenizer: Any, **template: Any) -> list[list[int]]:
    """Prompts as TRL tokenises them: conversations by the chat template, with the start of an answer.

    Args:
        prompts: All strings, or all conversations.
        tokenizer: The tokenizer.
        template: Arguments of the chat template.
    """
    from trl import is_conversational

    if not is_conversational({"prompt": prompts[0]}):
        return tokenizer(text=list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )["input_ids"]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to and including the first that ends the completion."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
