"""Collect the states that monitors read, from a running model with its adapters.

A steering vector at the same place is included in what is read, since the layers above get the steered state. States
of layers below it are those of the base model.

Shapes: B rows of a batch, T tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..analysis.activations import Enough, outputs_of
from ..blocks import find_blocks, resolve_layers, site_name
from ..observing import base_model, evaluating
from ..prompts import prompts_by_labels
from ..stream import is_sharded
from ..types import Layers, Site

Tokens = Literal["answer", "prompt", "all"]
"""Which tokens of a row are read."""


@dataclass(frozen=True)
class PooledStates:
    """One state for every row.

    Attributes:
        mean: Layer index -> the mean over the tokens that are read, `(rows, d)`, fp32, on the CPU.
        last: Layer index -> the state of the last of them, `(rows, d)`.
    """

    mean: dict[int, Tensor]
    last: dict[int, Tensor]


@torch.no_grad()
def pooled_states(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: Layers = "all",
    site: Site = "block",
    tokens: Tokens = "answer",
) -> PooledStates:
    """The states of rows, at one site of several layers.

    Args:
        model: A transformers model, with or without adapters, which are not changed.
        batches: Batches with `input_ids`, `labels` (-100 on the prompt) and, if rows are padded, `attention_mask`.
        layers: As in `SteeringVectorConfig`.
        site: As in `SteeringVectorConfig`.
        tokens: Which tokens of a row are read.

    Raises:
        ValueError: there is no batch, the model has no such layer or site, or a row has no token that is read.
    """
    indices = resolve_layers(layers, len(find_blocks(base_model(model))))
    mean: dict[int, list[Tensor]] = defaultdict(list)
    last: dict[int, list[Tensor]] = defaultdict(list)
    for batch, states in passes(model, batches, [(i, site) for i in indices]):
        mask_BT = read_mask(batch, tokens)
        column_T = torch.arange(mask_BT.shape[1])
        last_B = (mask_BT * (column_T + 1)).argmax(dim=1)
        for (layer, _), h_BTD in states.items():
            weights_BT = (mask_BT / mask_BT.sum(dim=1, keepdim=True)).to(h_BTD)
            mean[layer].append(torch.einsum("btd,bt->bd", h_BTD, weights_BT).cpu())
            last[layer].append(h_BTD[torch.arange(len(h_BTD)), last_B.to(h_BTD.device)].cpu())
    if not mean:
        raise ValueError("No rows to read: at least one is needed.")
    return PooledStates(*({i: torch.cat(parts) for i, parts in of.items()} for of in (mean, last)))


def read_mask(batch: Mapping[str, Any], tokens: Tokens) -> Tensor:
    """True on the tokens that are read, `(rows, tokens)`, on the CPU.

    Raises:
        ValueError: a row has none.
    """
    labels_BT = torch.as_tensor(batch["labels"]).cpu()
    real_BT = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else torch.ones_like(labels_BT).bool()
    answer_BT = labels_BT != -100
    mask_BT = {"answer": answer_BT, "prompt": real_BT & ~answer_BT, "all": real_BT}[tokens]
    if not mask_BT.any(dim=1).all():
        raise ValueError(f"A row has no token to read (tokens={tokens!r}). Drop empty rows, or read other tokens.")
    return mask_BT


def passes(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], places: Sequence[tuple[int, Site]]
) -> Iterator[tuple[Mapping[str, Any], dict[tuple[int, Site], Tensor]]]:
    """For every batch: the batch, and the states of the model at every place, `(rows, tokens, d)`, fp32.

    Args:
        model: As in `pooled_states`.
        batches: As in `pooled_states`.
        places: Layer indices and sites.

    Raises:
        ValueError: the model has no such layer or site.
    """
    base = base_model(model)
    blocks = find_blocks(base)
    # attention runs before the MLP, and both before their block ends
    order = {"attention": 0, "mlp": 1, "block": 2}
    ordered = sorted(places, key=lambda place: (place[0], order[place[1]]))
    for layer, _ in ordered:
        resolve_layers(layer, len(blocks))
    modules = {n: base.get_submodule(site_name(*blocks[layer], site)) for n, (layer, site) in enumerate(ordered)}
    ends_early = not any(is_sharded(parameter) for parameter in base.parameters())
    device = next(base.parameters()).device
    for batch in batches:
        ids_BT, labels_BT = batch["input_ids"].to(device), torch.as_tensor(batch["labels"]).to(device)
        mask_BT = batch["attention_mask"].to(device) if "attention_mask" in batch else torch.ones_like(ids_BT)
        with ExitStack() as stack:
            # Hooks are attached for one batch, because the caller may run the model between batches.
            stack.enter_context(evaluating(base))
            stack.enter_context(prompts_by_labels(model, labels_BT))
            outputs = stack.enter_context(outputs_of(base, modules, ends_early))
            with suppress(Enough):
                base(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
            states = {ordered[n]: outputs[n].float() for n in modules}
        yield batch, states
