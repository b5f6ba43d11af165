"""Compute the change of the residual stream that each `form` makes.

Every form is `change(h) = gate(h) · V` with write vectors `V` of shape `(rank, d)`:

| form | gate(h) |
|---|---|
| `bias` | 1 |
| `span` | 1, and `V = Σ cₖ bₖ` over fixed vectors bₖ |
| `gated` | relu(w·h + b) |
| `linear` | w·h + b |
| `low_rank` | Wh + b, `rank` of them |
| `project` | -h·u, and `V = u`, the unit vector along v |
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import CONSTANT_FORMS, Form

_TINY = 1e-12


def null(hidden: Tensor, v: Tensor) -> Tensor:
    """The change that removes the direction from the states that point along it: `-relu(h·v) v / |v|²`.

    Wu et al. 2505.20809, section 3.2. Zero for a vector of zeros.

    Args:
        hidden: Residual states, `(batch, tokens, d)`.
        v: The vector, `(d,)`.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        v = v.to(exact)
        along = torch.relu(hidden.to(exact) @ v) / (v @ v).clamp_min(_TINY)
        return -along[..., None] * v


def projection(hidden: Tensor, v: Tensor) -> Tensor:
    """The change that removes the direction from every state, `-(h·u) u` with `u = v / |v|`; zero if `v` is.

    Args:
        hidden: Residual states, `(batch, tokens, d)`.
        v: The direction, `(d,)`, of any length.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        u = v.to(exact) / torch.linalg.vector_norm(v.to(exact)).clamp_min(_TINY)
        return -(hidden.to(exact) @ u)[..., None] * u


def change(form: Form, hidden: Tensor, v: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The change of the residual stream at strength 1, in fp32 (fp64 on an fp64 base).

    Args:
        form: One of the forms.
        hidden: Residual states, `(batch, tokens, d)`.
        v: Write vector(s), `(d,)` or `(rank, d)`.
        w: Read vector(s), same shape as `v`; None for a form that adds a constant.
        b: Gate offsets, `(rank,)`; also None for such a form.

    Returns:
        `(d,)` for a form that adds a constant, else `(batch, tokens, d)`.
    """
    if form in CONSTANT_FORMS:
        return v
    if form == "project":
        return projection(hidden, v)
    assert w is not None and b is not None
    d, exact = v.shape[-1], torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round both products
        gate = hidden.to(exact) @ w.reshape(-1, d).T.to(exact) + b
        if form == "gated":
            gate = torch.relu(gate)
        return gate @ v.reshape(-1, d).to(exact)
