"""Score tokens and rows with monitors while a model runs.

Shapes: B rows of a batch, T tokens, D width of the residual stream, M monitors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Site
from .monitor import Monitor
from .reading import Tokens, passes, read_mask


def row_scores(monitor: Monitor, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """The score of every row by one monitor; for arguments and errors see `token_scores`."""
    return [monitor.pool(scores_T) for [scores_T] in token_scores([monitor], model, batches)]


@torch.no_grad()
def token_scores(
    monitors: Sequence[Monitor], model: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> Iterator[list[Tensor]]:
    """For every row, the scores `(tokens,)` of the tokens that each of the monitors reads, fp32, on the CPU.

    All monitors read in the same pass, so a hundred cost hardly more than one.

    Args:
        monitors: They may read different layers, sites and tokens.
        model: A transformers model, with or without adapters, which are not changed.
        batches: Batches with `input_ids`, `labels` (-100 on the prompt) and, if rows are padded, `attention_mask`.

    Raises:
        ValueError: a monitor has another width, its layer does not exist, or a row has no token that it reads.
    """
    by_place: dict[tuple[int, Site], list[int]] = defaultdict(list)
    for number, monitor in enumerate(monitors):
        by_place[monitor.layer, monitor.site].append(number)
    for batch, states in passes(model, batches, [*by_place]):
        rows = len(batch["input_ids"])
        kinds: set[Tokens] = {monitor.tokens for monitor in monitors}
        masks = {tokens: read_mask(batch, tokens) for tokens in kinds}
        scores: list[list[Tensor]] = [[torch.empty(0)] * len(monitors) for _ in range(rows)]
        for place, numbers in by_place.items():
            scores_BTM = _scores([monitors[m] for m in numbers], states[place])
            for b in range(rows):
                for column, m in enumerate(numbers):
                    scores[b][m] = scores_BTM[b, masks[monitors[m].tokens][b], column]
        yield from scores


def _scores(monitors: Sequence[Monitor], h_BTD: Tensor) -> Tensor:
    """Scores of the states of one place by the monitors that read it, `(rows, tokens, monitors)`, on the CPU."""
    for monitor in monitors:
        if h_BTD.shape[-1] != len(monitor.weight):
            raise ValueError(
                f"The monitor reads states of width {len(monitor.weight)}, but {monitor.module} of this model returns "
                f"width {h_BTD.shape[-1]}. Load the model that it was made for ({monitor.base_name})."
            )
    weight_MD = torch.stack([monitor.weight for monitor in monitors]).to(h_BTD.device)
    return (h_BTD @ weight_MD.T).cpu() + torch.tensor([monitor.bias for monitor in monitors])
