"""`at(0)` of every row once: what the reference says of an answer does not change while an adapter trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from ...losses import Outputs
from ..batch import Batch
from ..host_copies import both, on_host
from .cut import base_of
from .keys import Unknown, attention_of, config_of, row_key, rows_of, weights_key
from .memo import Memo
from .notices import Notices, in_words


class ReferenceMemo:
    """Token log-probabilities under the reference, kept by content.

    Args:
        memo: Where they are kept.
        reference: The model that gives the reference: one with adapters, which are frozen or off then, or a model of
            its own.
        trained: Whether parameters that require gradients are not part of the reference.
    """

    def __init__(self, memo: Memo, reference: nn.Module, trained: bool) -> None:
        self.memo, self._failed = memo, False
        tensors = [(name, p) for name, p in reference.named_parameters() if not (trained and p.requires_grad)]
        base = base_of(reference)
        settings = ("reference", attention_of(base), config_of(base), _frozen_adapters(reference, tensors))
        self._namespace = weights_key([*tensors, *reference.named_buffers()], *settings)

    def outputs(
        self, batch: Batch, compute: Callable[[Batch], Outputs], layers: Sequence[int] = (), site: str = "block"
    ) -> Outputs:
        """The outputs of a batch, `compute`d row by row where they are not known.

        Args:
            batch: The batch.
            compute: Outputs of one row under the reference, with the hidden states of `layers`.
            layers: Whose hidden states are asked for.
            site: Which of their states.
        """
        failure = ""
        if not self._failed:
            try:
                return self._outputs(batch, compute, layers, site)
            except Unknown:
                pass
            except Exception as error:
                failure = in_words(error)
        outputs = compute(batch)  # if the model is at fault, it raises its error again
        if failure:
            self._failed = True
            Notices(logging.WARNING).failed("the memo of the reference", failure)
        return outputs

    def _outputs(self, batch: Batch, compute: Callable[[Batch], Outputs], layers: Sequence[int], site: str) -> Outputs:
        rows = rows_of(batch.inputs)
        device = batch.labels.device
        labels = [_first(batch.labels, i, row["input_ids"].shape[1]) for i, row in enumerate(rows)]
        labelled = int((on_host(batch.labels)[:, 1:] != -100).sum())
        if sum(int((on_host(own)[:, 1:] != -100).sum()) for own in labels) != labelled:  # labels on padding
            return compute(batch)
        found: list[Tensor] = []
        hidden: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for row, own in zip(rows, labels, strict=True):
            logps, states = self._row({**row, "labels": own}, {layer: f"{site}/{layer}" for layer in layers}, compute)
            found.append(logps)
            for layer, state in zip(layers, states, strict=True):
                hidden[layer].append(state.to(device, non_blocking=True))
        token_logps = batch.spread(torch.cat([logps.to(device, non_blocking=True) for logps in found]))
        states = {layer: torch.cat(states) for layer, states in hidden.items()}
        return Outputs(token_logps, batch.targets != -100, states)

    def _row(
        self, row: dict[str, Tensor], layers: Mapping[int, str], compute: Callable[[Batch], Outputs]
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of a row's labels, `(labels,)`, and the states of every layer, `(labels, d)`, kept by
        its name."""
        keys = [row_key(self._namespace, row)]
        keys += [row_key(f"{self._namespace}/{name}", row) for name in layers.values()]
        known = [self.memo.get(key) for key in keys]
        if any(value is None for value in known):
            inputs = {name: value for name, value in row.items() if name != "labels"}
            found = compute(Batch(inputs, row["labels"], pairs=False))
            known = [found.token_logps[found.mask], *(found.hidden[layer] for layer in layers)]
            for key, value in zip(keys, known, strict=True):
                self.memo.put(key, value)
        logps, *states = (value for value in known if value is not None)
        return logps, states


def _first(labels: Tensor, row: int, length: int) -> Tensor:
    return both(lambda values: values[row : row + 1, :length], labels)


def _frozen_adapters(model: nn.Module, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, str]:
    """The settings of adapters that belong to the reference: their scale, say, is in no tensor."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    own = {name: any(f".{name}." in f"{key}." for key, _ in tensors) for name in configs}
    return {name: repr(sorted(config.to_dict().items(), key=str)) for name, config in configs.items() if own[name]}
