"""Three numbers of inductive bias, for any adapter with a strength: how easily a solution is reached and kept.

    efficiency      the area under the training loss against the norm of the parameters, as the solution is scaled from
                    zero to its trained size; of two solutions with the same loss, the one with the smaller area
                    needs less change
    stability       by how much the training loss rises under Gaussian noise that is orthogonal to the parameters, 0.1
                    to 1 times as long as they are; the mean over sizes and draws
    significance    KL to the base model on neutral text, over that of random directions that change the residual
                    stream by as much at every token

Soligo et al. (2506.11618) use the first two to compare general and narrow solutions of the same finetuning.

Shapes: B rows, T tokens, D width of the residual stream, L labelled tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from scipy.integrate import simpson
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from steertune.adapters import steering_layers
from steertune.adapters.blocks import find_blocks
from steertune.adapters.outputs import adding, states_in
from steertune.losses import Loss
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.progress import Bar, track
from steertune.trainers import Batch, FrozenPrefix, ModelAt, labelled_logits, scalable, scaled

SCALES = 0.0, 0.25, 0.5, 0.75, 1.0
"""Shares of the solution at which its loss is computed."""
SIZES = 0.1, 0.2, 0.5, 1.0
"""Lengths of the noise, as shares of the length of the parameters."""
DRAWS = 8
RANDOM = 19
"""Number of random directions: if all of them are below the adapter, p is 1/20."""
_BATCH = 4


@dataclass(frozen=True)
class Efficiency:
    """The training loss on the way to the solution.

    Attributes:
        norm: Norm of the parameters that were trained.
        losses: The loss at every share of `SCALES`, in nats.
        area: Area under the loss against the norm, from 0 to `norm`: nats times the unit of the norm.
    """

    norm: float
    losses: tuple[float, ...]
    area: float


@dataclass(frozen=True)
class Stability:
    """The training loss around the solution.

    Attributes:
        loss: The loss at the solution, in nats.
        losses: The mean loss over the draws, for every size of `SIZES`.
        rise: The mean of `losses` minus `loss`.
    """

    loss: float
    losses: tuple[float, ...]
    rise: float


@dataclass(frozen=True)
class Significance:
    """What an adapter does to neutral text, against random directions.

    Attributes:
        kl: KL to the base model, in nats per token.
        random: The KL of every random direction.
        ratio: `kl` over the median of `random`.
        p: From a permutation test: how often a random direction has a KL at least as large.
    """

    kl: float
    random: tuple[float, ...]
    ratio: float
    p: float


@dataclass(frozen=True)
class InductiveBias:
    """All three numbers."""

    efficiency: Efficiency
    stability: Stability
    significance: Significance


def inductive_bias(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, loss: Loss, neutral: Dataset, seed: int = 0
) -> InductiveBias:
    """All three numbers of a trained adapter, on its training rows and on neutral text.

    Raises:
        ArmError: the adapter has no strength, or the loss cannot be computed from the rows alone.
    """
    if not scalable(model):
        raise ArmError("Inductive bias is measured by scaling an adapter: a steering vector or a LoRA is needed.")
    if loss.needs.views:
        raise ArmError(
            f"The loss needs the views {list(loss.needs.views)}, which exist only in training. Choose another loss, "
            "such as cross_entropy or dpo."
        )
    shown = batches(tokenizer, rows, _BATCH)
    if loss.needs.pairs and not all(batch.pairs for batch in shown):
        raise ArmError("This loss compares chosen with rejected answers; the rows are not pairs. Use cross_entropy.")
    generator = torch.Generator().manual_seed(seed)
    bar = Bar(3)
    with torch.no_grad():
        # layers below the adapter are computed once; the hooks on blocks in the last step need whole passes
        with FrozenPrefix(warn=False).on(model, labels_only=True):
            with bar.step("efficiency", 0.3):
                efficient = efficiency(lambda scale: training_loss(model, shown, loss, scale), parameter_norm(model))
            with bar.step("stability", 1.5):
                stable = stability(trained_parameters(model), lambda: training_loss(model, shown, loss), generator)
        with bar.step("significance", 1.2):
            significant = significance(model, batches(tokenizer, neutral, _BATCH), generator)
    return InductiveBias(efficient, stable, significant)


def efficiency(loss: Callable[[float], float], norm: float) -> Efficiency:
    """The area under the loss against the norm, by Simpson's rule."""
    losses = [loss(scale) for scale in track(SCALES, "scale")]
    return Efficiency(norm, tuple(losses), float(simpson(losses, x=np.array(SCALES) * norm)))


def stability(parameters: Sequence[Tensor], loss: Callable[[], float], generator: torch.Generator) -> Stability:
    """The loss under noise that is drawn for each tensor. `parameters` are changed in place, and restored at the end.

    Raises:
        ArmError: all parameters are zero, so that the noise has no size.
    """
    noisy = [p for p in parameters if p.numel() > 1 and bool(p.detach().any())]
    if not noisy:
        raise ArmError("All parameters of the adapter are zero: it was not trained, and noise has no relative size.")
    before, losses = loss(), []
    for size in track(SIZES, "noise"):
        drawn = []
        for _ in range(DRAWS):
            with _moved(noisy, [size * orthogonal_noise(p, generator) for p in noisy]):
                drawn.append(loss())
        losses.append(float(np.mean(drawn)))
    return Stability(before, tuple(losses), float(np.mean(losses)) - before)


def orthogonal_noise(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise that is orthogonal to a tensor and as long as it is."""
    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
    noise -= parameter * (noise * parameter).sum() / parameter.square().sum()
    return noise * (parameter.norm() / noise.norm())


@contextmanager
def _moved(parameters: Sequence[Tensor], moves: Sequence[Tensor]) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.data.add_(move)
        yield
    finally:
        for parameter, values in zip(parameters, before, strict=True):
            parameter.data.copy_(values)


def significance(model: Any, shown: Sequence[Batch], generator: torch.Generator) -> Significance:
    """The KL of an adapter, against random directions added at the highest block that it changes. `shown` are batches
    of neutral text."""
    block = top_block(model)
    base, steered, moves = [], [], []
    for batch in shown:
        with scaled(model, 0.0), _output_of(block) as before:
            base.append(_logps(model, batch))
        with _output_of(block) as after:
            steered.append(_logps(model, batch))
        moves.append(after[0] - before[0])
    lengths = [move_BTD.norm(dim=-1) for move_BTD in moves]  # how far each state was moved
    directions_ND = F.normalize(torch.randn(RANDOM, moves[0].shape[-1], generator=generator), dim=1)
    kl = _kl(steered, base)
    drawn = []
    for direction in track([*directions_ND], "random direction"):
        moved = []
        for batch, length in zip(shown, lengths, strict=True):
            with scaled(model, 0.0), adding(block, length[..., None] * direction.to(length)):
                moved.append(_logps(model, batch))
        drawn.append(_kl(moved, base))
    as_large = sum(value >= kl for value in drawn)
    median = float(np.median(drawn))
    return Significance(kl, tuple(drawn), kl / median if median > 0 else math.nan, (1 + as_large) / (1 + len(drawn)))


def _kl(logps: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Mean over labelled tokens of KL(model || base), from log-probabilities `(L, V)` of every batch."""
    per_token = [(ours.exp() * (ours - theirs)).sum(dim=-1) for ours, theirs in zip(logps, base, strict=True)]
    return float(torch.cat(per_token).mean())


def _logps(model: Any, batch: Batch) -> Tensor:
    """Log-probabilities of all tokens at every label, `(L, V)`."""
    return F.log_softmax(labelled_logits(model, model, batch.to(model.device)), dim=-1)


def training_loss(model: Any, shown: Sequence[Batch], loss: Loss, scale: float = 1.0) -> float:
    """The mean loss over all examples or labelled tokens, with the solution scaled by a factor."""
    total, units = 0.0, 0
    for batch in shown:
        batch = batch.to(model.device)
        batch = batch if loss.needs.pairs or not batch.pairs else batch.chosen
        at = ModelAt(model, model, batch)

        def scaled_at(strength: Any, at: ModelAt = at, **options: Any) -> Any:
            return at(strength if strength == "null" else strength * scale, **options)

        total += float(loss(scaled_at, torch.Generator().manual_seed(0)).sum())
        units += int(batch.count(loss.needs.unit))
    return total / units


def trained_parameters(model: Any) -> list[Tensor]:
    """The parameters of the adapter that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_norm(model: Any) -> float:
    """Norm of what an adapter's strength scales: steering vectors, or the weight changes of a LoRA."""
    squares = [
        float(layer.get_delta_weight(name).square().sum())  # pyright: ignore[reportAttributeAccessIssue]
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for name in layer.active_adapters
    ]
    for layer in steering_layers(model):
        squares += [float(layer.written(name).square().sum()) for name in layer.config if name not in layer.tied_to]
    return math.sqrt(sum(squares))


def top_block(model: Any) -> nn.Module:
    """The highest block that an adapter changes.

    Raises:
        ArmError: the adapter changes no block.
    """
    blocks = [block for _, block in find_blocks(model.get_base_model())]
    changed = [block for block in blocks if any(isinstance(inner, BaseTunerLayer) for inner in block.modules())]
    if not changed:
        raise ArmError("The adapter changes no decoder block, so the states that it moves cannot be compared.")
    return changed[-1]


@contextmanager
def _output_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the residual stream after a block, `(B, T, D)` for each pass."""
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(states_in(output).detach().float())

    handle = block.register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()
