"""Draw the next token of one row. Other rows play no part, so an answer does not depend on its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steertune.recipes.serving.jobs import Sampling, Scored


class Sampler:
    """Draws the tokens of one answer.

    The largest of logits plus Gumbel noise is a draw from their softmax (Gumbel 1954). Each answer has its own noise
    generator on the CPU, so that a seed gives the same draws on every device.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, logits_V: Tensor, answer: Sequence[int]) -> int:
        """The next token.

        Args:
            logits_V: Logits of the next token, `(vocabulary,)`.
            answer: The tokens so far, for penalties.
        """
        chosen = self.sampling
        scores_V = self._changed(logits_V, answer)
        if chosen.temperature == 0:
            return int(scores_V.argmax())
        scores_V = scores_V.double() / chosen.temperature
        if chosen.top_p < 1:
            scores_V = _nucleus(scores_V, chosen.top_p)
        uniform_V = torch.rand(len(scores_V), generator=self._generator, dtype=torch.float64)
        gumbel_V = -torch.log(-torch.log(uniform_V.clamp_min(torch.finfo(torch.float64).tiny)))
        return int((scores_V + gumbel_V.to(scores_V.device)).argmax())

    def _changed(self, logits_V: Tensor, answer: Sequence[int]) -> Tensor:
        """Logits after bias and penalties."""
        chosen = self.sampling
        penalised = bool(answer) and bool(chosen.frequency_penalty or chosen.presence_penalty)
        if not penalised and not chosen.logit_bias:
            return logits_V
        logits_V = logits_V.clone()
        for token, bias in chosen.logit_bias.items():
            logits_V[token] += bias
        if penalised:
            tokens, counts = torch.tensor(answer, device=logits_V.device).unique(return_counts=True)
            logits_V[tokens] -= chosen.frequency_penalty * counts + chosen.presence_penalty
        return logits_V


def _nucleus(scores_V: Tensor, top_p: float) -> Tensor:
    """Exclude all but the most probable tokens whose probabilities add up to `top_p` (Holtzman et al. 1904.09751)."""
    sorted_V, order_V = scores_V.sort(descending=True)
    before_V = sorted_V.softmax(0).cumsum(0) - sorted_V.softmax(0)
    return scores_V.index_fill(0, order_V[before_V >= top_p], -torch.inf)


def scored(logits_TV: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Tokens with their log-probabilities.

    Args:
        logits_TV: The logits that predict each of them, `(tokens, vocabulary)`.
        tokens: Their ids.
        top: How many of the most probable tokens to list.
    """
    result = []
    # in parts, since the logits of a long prompt would be in memory several times
    for start in range(0, len(tokens), 256):
        part = tokens[start : start + 256]
        logprobs_TV = logits_TV[start : start + 256].float().log_softmax(-1)
        ids_T1 = torch.tensor(part, device=logprobs_TV.device)[:, None]
        values = logprobs_TV.gather(1, ids_T1)[:, 0].tolist()
        best = logprobs_TV.topk(min(top, logprobs_TV.shape[1]))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for token, value, (ids, best_values) in zip(part, values, rows, strict=True):
            result.append(Scored(token, value, tuple(zip(ids, best_values, strict=True))))
    return result


def prompt_scores(logits_TV: Tensor, prompt: Sequence[int], top: int) -> list[Scored]:
    """The tokens of a prompt, each with its log-probability given the tokens before it.

    Args:
        logits_TV: Logits of the prompt and its left padding, `(tokens, vocabulary)`.
        prompt: Its tokens.
        top: How many of the most probable tokens to list.
    """
    # the last logits predict the answer
    return [Scored(prompt[0], None), *scored(logits_TV[-len(prompt) : -1], prompt[1:], top)]
