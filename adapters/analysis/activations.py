"""Collect residual states, from which closed-form directions are computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm  # which `disable_progress_bar` switches off

from ..blocks import find_blocks, resolve_layers, site_name
from ..observing import adapters_off, base_model, evaluating
from ..outputs import states_in
from ..registry import choose
from ..stream import is_sharded
from ..types import Layers, Site

Pool = Literal["completion_mean", "last"]


@dataclass(frozen=True)
class Activations:
    """Residual states of contrast pairs, one vector per answer and layer.

    Attributes:
        chosen: Layer index -> `(pairs, d)`, fp32, on the CPU.
        rejected: The same for the rejected answers.
        residual_norms: Layer index -> mean norm over all real tokens of all answers.
        pool: Which tokens were pooled: the mean over the completion, or its last token.
    """

    chosen: dict[int, Tensor]
    rejected: dict[int, Tensor]
    residual_norms: dict[int, float]
    pool: Pool


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    layers: Layers = "all",
    site: Site = "block",
    pool: Pool = "completion_mean",
) -> Activations:
    """Run the base model (adapters off) over contrast pairs and return one state per answer and layer.

    Args:
        model: A transformers model, with or without adapters.
        batches: Batches as TRL's preference collator makes them: `input_ids`, `attention_mask` and
            `completion_mask` of shape `(2 * pairs, tokens)`, the chosen answers first. `labels` (-100 on the prompt)
            may replace `completion_mask`.
        layers: As in `SteeringVectorConfig`.
        site: As in `SteeringVectorConfig`.
        pool: Which tokens represent an answer.

    Raises:
        ValueError: `batches` is empty, a batch does not mark its answers or has an odd number of rows, an answer has
            no tokens, or the pool is unknown.
    """
    choose("pool", pool, get_args(Pool))
    if any(not {"completion_mask", "labels"} & set(batch) for batch in batches):
        raise ValueError("A batch has neither completion_mask nor labels, which mark the tokens of the answers.")
    if odd := [len(batch["input_ids"]) for batch in batches if len(batch["input_ids"]) % 2]:
        raise ValueError(
            f"A batch has {odd[0]} rows, an odd number. The first half of a batch must be the chosen answers, and the "
            "second half the rejected ones."
        )
    pooled: dict[int, list[Tensor]] = defaultdict(list)
    norms = _MeanNorms()
    with closing(_states(model, batches, layers, site)) as passes:
        for batch, mask, states in passes:  # mask: (rows, tokens), states: layer -> (rows, tokens, d)
            completion = batch["completion_mask"] if "completion_mask" in batch else batch["labels"] != -100
            weights = _pool_weights(completion.to(mask.device).long(), pool)
            norms.add(mask, states)
            for i, hidden in states.items():
                pooled[i].append(torch.einsum("btd,bt->bd", hidden, weights).cpu())  # (rows, d)
    # The first half of the rows of each batch are chosen answers, the second half rejected ones.
    halves = {
        i: [torch.cat(part) for part in zip(*(rows.chunk(2) for rows in of_layer), strict=True)]
        for i, of_layer in pooled.items()
    }
    return Activations(
        chosen={i: chosen for i, (chosen, _) in halves.items()},
        rejected={i: rejected for i, (_, rejected) in halves.items()},
        residual_norms=norms.read(),
        pool=pool,
    )


@torch.no_grad()
def residual_norms(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], layers: Layers = "all", site: Site = "block"
) -> dict[int, float]:
    """Mean norm of the base model's states over all real tokens, by layer index.

    Args:
        model: As in `collect`.
        batches: Batches with `input_ids` and, where rows are padded, `attention_mask`.
        layers: As in `SteeringVectorConfig`.
        site: As in `SteeringVectorConfig`.

    Raises:
        ValueError: `batches` is empty.
    """
    norms = _MeanNorms()
    with closing(_states(model, batches, layers, site)) as passes:
        for _, mask, states in passes:
            norms.add(mask, states)
    return norms.read()


class _MeanNorms:
    def __init__(self) -> None:
        self.sums: dict[int, float] = defaultdict(float)
        self.tokens = 0

    def add(self, mask: Tensor, states: Mapping[int, Tensor]) -> None:
        self.tokens += int(mask.sum())
        for i, hidden in states.items():
            self.sums[i] += float((hidden.norm(dim=-1) * mask).sum())

    def read(self) -> dict[int, float]:
        return {i: total / self.tokens for i, total in self.sums.items()}


def _states(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], layers: Layers, site: Site
) -> Generator[tuple[Mapping[str, Any], Tensor, dict[int, Tensor]]]:
    """For every batch: the batch, its attention mask, and the base model's states in fp32, by layer index."""
    if not batches:
        raise ValueError("No batches: at least one example is needed.")
    base = base_model(model)
    blocks = find_blocks(base)
    modules = {i: base.get_submodule(site_name(*blocks[i], site)) for i in resolve_layers(layers, len(blocks))}
    device = next(base.parameters()).device
    # If weights are gathered module by module, a pass that ends early would leave some of them gathered.
    ends_early = not any(is_sharded(parameter) for parameter in base.parameters())
    with adapters_off(model), evaluating(base), outputs_of(base, modules, ends_early) as outputs:
        quiet = torch.distributed.is_initialized() and torch.distributed.get_rank() > 0
        for batch in tqdm(batches, desc="Collecting activations", disable=quiet or len(batches) < 4):
            ids = batch["input_ids"].to(device)
            mask = batch["attention_mask"].to(device) if "attention_mask" in batch else torch.ones_like(ids)
            with suppress(Enough):
                base(input_ids=ids, attention_mask=mask)
            yield batch, mask, {i: outputs[i].float() for i in modules}


class Enough(Exception):
    """Raised by a hook of `outputs_of` once all requested layers have run, to skip the layers above and the head."""


@contextmanager
def outputs_of(base: nn.Module, modules: Mapping[int, nn.Module], ends_early: bool) -> Iterator[dict[int, Tensor]]:
    """Yield a dictionary that each forward pass fills with the outputs of `modules`, after any steering.
    With `ends_early`, a pass raises `Enough` after the last module, to skip the rest of the model."""
    outputs: dict[int, Tensor] = {}
    last = max(modules) if ends_early else None
    handles = [module.register_forward_hook(partial(_keep, outputs, i, i == last)) for i, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _keep(outputs: dict[int, Tensor], index: int, last: bool, module: nn.Module, args: Any, output: Any) -> None:
    outputs[index] = states_in(output)
    if last:
        raise Enough


def _pool_weights(completion_mask: Tensor, pool: Pool) -> Tensor:
    """`(rows, tokens)` weights that sum to 1 over the tokens that represent an answer."""
    if not completion_mask.any(dim=1).all():
        raise ValueError("An answer has no tokens, so it has no state. Drop empty or truncated completions.")
    if pool == "last":
        column = torch.arange(completion_mask.shape[1], device=completion_mask.device)
        last = (completion_mask * (column + 1)).argmax(dim=1)
        return (column == last[:, None]).float()
    return completion_mask / completion_mask.sum(dim=1, keepdim=True)
