"""Contrast-consistent search: a probe that needs no labels (CCS, Burns et al. 2212.03827, section 2).

It fits a probability `p(x) = σ(w·x + b)` that is confident, and opposite for the two answers of a pair:

    mean of (p(x⁺) - (1 - p(x⁻)))² + min(p(x⁺), p(x⁻))²

after centring and scaling each side separately, and takes the best of ten starts. If `x⁺` were always the chosen
answer, the centring would remove the direction, so every second pair is swapped. Labels only give the sign. Length 1.
With more dimensions than pairs, many directions are consistent, so weight decay is used as in the paper.
"""

import torch
from torch import Tensor

POOL = "completion_mean"
_STARTS, _STEPS, _RATE, _DECAY = 10, 1000, 1e-2, 1e-2


def fit(chosen: dict[int, Tensor], rejected: dict[int, Tensor]) -> dict[int, Tensor]:
    """`(pairs, d)` per layer -> `(d,)` per layer.

    Raises:
        ValueError: there are fewer than 4 pairs, too few to centre both sides.
    """
    return {layer: _fit(chosen[layer].float(), rejected[layer].float()) for layer in chosen}


def _fit(chosen: Tensor, rejected: Tensor) -> Tensor:
    if len(chosen) < 4:
        raise ValueError(f"direction='ccs' needs at least 4 pairs, got {len(chosen)}.")
    swapped = (torch.arange(len(chosen)) % 2 == 1)[:, None]
    plain = [torch.where(swapped, b, a) for a, b in ((chosen, rejected), (rejected, chosen))]
    sides = [(side - side.mean(dim=0)) / side.std(dim=0).clamp_min(1e-6) for side in plain]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_STARTS, chosen.shape[1], generator=generator) / chosen.shape[1] ** 0.5
    weights = weights.requires_grad_()
    bias = torch.zeros(_STARTS, requires_grad=True)
    optimiser = torch.optim.AdamW([weights, bias], lr=_RATE, weight_decay=_DECAY)
    losses = torch.zeros(_STARTS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            first, second = (torch.sigmoid(side @ weights.T + bias) for side in sides)
            losses = ((first - (1 - second)) ** 2 + torch.minimum(first, second) ** 2).mean(dim=0)
            optimiser.zero_grad()
            losses.sum().backward()
            optimiser.step()
    # The direction was fitted on scaled states, but it is applied to unscaled ones.
    scale = torch.stack([side.std(dim=0) for side in plain]).mean(dim=0).clamp_min(1e-6)
    direction = weights[losses.argmin()].detach() / scale
    sign = torch.sign(direction @ (chosen - rejected).mean(dim=0))
    return direction / direction.norm() * (sign if sign != 0 else 1)
