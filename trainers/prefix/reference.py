"""`at(0)` of every row once: what the reference says of an answer does not change while an adapter trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...losses import Outputs
from .._batch import Batch
from .cut import base_of
from .keys import Unknown, attention_of, row_key, rows_of, weights_key
from .memo import Memo


class ReferenceMemo:
    """Token log-probabilities under the reference, kept by content.

    Args:
        memo: Where they are kept.
        reference: The model that gives the reference: one with adapters, which are frozen or off then, or a model of
            its own.
        trained: Whether parameters that require gradients are not part of the reference.
    """

    def __init__(self, memo: Memo, reference: nn.Module, trained: bool) -> None:
        self.memo = memo
        tensors = [(name, p) for name, p in reference.named_parameters() if not (trained and p.requires_grad)]
        self._namespace = weights_key(
            [*tensors, *reference.named_buffers()], "reference", attention_of(base_of(reference))
        )

    def outputs(self, batch: Batch, compute: Callable[[Batch], Outputs]) -> Outputs:
        """The outputs of a batch, `compute`d row by row where they are not known."""
        try:
            rows = rows_of(batch.inputs)
        except Unknown:
            return compute(batch)
        mask = batch.targets[0] != -100
        token_logps = torch.zeros(mask.shape, device=mask.device)
        labels = [batch.labels[i : i + 1, : row["input_ids"].shape[1]] for i, row in enumerate(rows)]
        if sum(int((own[:, 1:] != -100).sum()) for own in labels) != int(mask.sum()):  # labels on padding
            return compute(batch)
        for i, (row, own) in enumerate(zip(rows, labels, strict=True)):
            key = row_key(self._namespace, {**row, "labels": own})
            logps = self.memo.get(key)
            if logps is None:
                found = compute(Batch(dict(row), own, pairs=False))
                logps = found.token_logps[found.mask]
                self.memo.put(key, logps)
            token_logps[i, mask[i]] = logps.to(mask.device, non_blocking=True)
        return Outputs(token_logps, mask)
