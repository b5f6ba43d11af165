"""The first-order estimate of every unit vector's effect, for the price of one backward pass.

With strength t_l of the vector at layer l, `A_l = dm/dt_l` at t = 0, where m is the margin of a pair in nats per
token: the sum over tokens of the gradient of m with respect to the state, times the vector. One pass gives all layers,
as if they did not interact.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steertune.adapters.blocks import find_blocks
from steertune.adapters.outputs import adding
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.observe import HeldOut
from steertune.recipes.mapping.effects import Values
from steertune.trainers import ModelAt


def first_order(base: Any, held_out: HeldOut, vectors: Mapping[int, Tensor]) -> dict[int, Values]:
    """Layer -> the estimate for every test pair, `(pairs,)`, in nats per token."""
    estimates: dict[int, list[float]] = {layer: [] for layer in vectors}
    blocks = [block for _, block in find_blocks(base)]
    for batch in batches(held_out.tokenizer, held_out.pairs, max(1, held_out.batch_size // 2)):
        on_device = batch.to(base.device)
        rows = len(on_device.labels)
        # one strength for every row and layer, all of them 0
        strengths = {layer: torch.zeros(rows, device=base.device, requires_grad=True) for layer in vectors}
        with ExitStack() as stack, torch.enable_grad():
            for layer, vector_D in vectors.items():
                change_R1D = strengths[layer][:, None, None] * vector_D.to(base.device)
                stack.enter_context(adding(blocks[layer], change_R1D))
            outputs = ModelAt(base, base, on_device)(1.0)
            chosen, rejected = outputs.chosen, outputs.rejected
            margin_P = chosen.logps / chosen.mask.sum(dim=1) - rejected.logps / rejected.mask.sum(dim=1)
            gradients = torch.autograd.grad(margin_P.sum(), list(strengths.values()))
        for layer, gradient_R in zip(strengths, gradients, strict=True):
            # a pair has two rows, and its vector is on both
            estimates[layer] += gradient_R.view(2, -1).sum(dim=0).tolist()
    return {layer: np.array(values) for layer, values in estimates.items()}
