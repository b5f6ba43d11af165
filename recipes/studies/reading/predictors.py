"""Cheap numbers that might say at which layer a direction controls best: none of them needs steering.

auroc, d_prime   how well it reads held-out answers
agreement        mean cosine of the differences of single pairs with it
logit_lens       share of pairs whose chosen answer has the tokens that the unembedding reads in it
gradient         cosine with the mean gradient of the margin with respect to the states
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from steertune.adapters.blocks import find_blocks
from steertune.adapters.outputs import adding
from steertune.recipes.lab.batches import batches
from steertune.recipes.studies.reading.jobs import Pairs
from steertune.trainers import ModelAt

PREDICTORS = ("auroc", "d_prime", "agreement", "logit_lens", "gradient")
_BATCH = 4


def agreement(direction_D: Tensor, pairs: Pairs) -> float:
    """Mean cosine of the pairs' differences with a direction."""
    return float(F.cosine_similarity(pairs[0] - pairs[1], direction_D[None], dim=1).mean())


def mean_gradients(model: Any, tokenizer: Any, pairs: Dataset, layers: Sequence[int]) -> dict[int, Tensor]:
    """Layer -> the gradient `(d,)` of the mean margin, in nats per token, with respect to one vector that is added to
    all its states: the direction of steepest control to first order. All layers come from one backward pass."""
    blocks = [block for _, block in find_blocks(model)]
    width = model.get_input_embeddings().weight.shape[1]
    sums = {layer: torch.zeros(width) for layer in layers}
    for batch in batches(tokenizer, pairs, _BATCH):
        on_device = batch.to(model.device)
        added = {layer: torch.zeros(1, 1, width, device=model.device, requires_grad=True) for layer in layers}
        with ExitStack() as stack, torch.enable_grad():
            for layer, zero_11D in added.items():
                stack.enter_context(adding(blocks[layer], zero_11D))
            outputs = ModelAt(model, model, on_device)(1.0)
            chosen, rejected = outputs.chosen, outputs.rejected
            margin_P = chosen.logps / chosen.mask.sum(dim=1) - rejected.logps / rejected.mask.sum(dim=1)
            gradients = torch.autograd.grad(margin_P.sum(), [*added.values()])
        for layer, gradient_11D in zip(layers, gradients, strict=True):
            sums[layer] += gradient_11D[0, 0].float().cpu()
    return {layer: total_D / len(pairs) for layer, total_D in sums.items()}


@torch.no_grad()
def logit_lens(model: Any, tokenizer: Any, pairs: Dataset, direction_D: Tensor) -> float:
    """Share of pairs whose chosen answer's tokens have the larger mean logit in the direction alone."""
    unembedding_VD = model.get_output_embeddings().weight.float().cpu()
    logits_V = unembedding_VD @ direction_D
    right = 0.0
    for batch in batches(tokenizer, pairs, _BATCH):
        answer_BT = batch.labels != -100
        means_B = (logits_V[batch.labels.clamp(min=0)] * answer_BT).sum(dim=1) / answer_BT.sum(dim=1)
        chosen_P, rejected_P = means_B.chunk(2)
        right += float((torch.sign(chosen_P - rejected_P) + 1).sum() / 2)
    return right / len(pairs)
