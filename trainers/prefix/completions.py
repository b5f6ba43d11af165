"""Run completions only: where no prompt token is steered, a prompt's keys and values are constants in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import DynamicCache

from ...adapters import SteeringVectorLayer, steering_layers
from ...adapters.observing import evaluating
from ..host_copies import both, on_host
from .cut import base_of
from .decoder import Decoder
from .keys import attention_of, config_of, row_key, weights_key
from .memo import Memo
from .prompts import Split, continue_prompts, part, row_lengths


class PromptCaches:
    """Keys and values of prompts above the cut, kept by content.

    Args:
        memo: Where they are kept.
        model: The model, with or without PEFT.
        decoder: Its stack of blocks.
    """

    def __init__(self, memo: Memo, model: nn.Module, decoder: Decoder) -> None:
        self.memo, self.model, self.decoder = memo, model, decoder
        self._namespace: str | None = None
        self._new: dict[str, Tensor] = {}

    def split(self, call: Mapping[str, Any]) -> Split | None:
        """Every row's prompt, without its last token (which predicts the first label); None where that cannot be."""
        lengths, end = row_lengths(call), next(iter(steering_layers(self.model))).boundary.prompt_end
        if lengths is None or end is None or len(end) != len(lengths):
            return None
        prompts = torch.minimum(on_host(end), lengths) - 1
        index = torch.arange(len(lengths))
        return Split(prompts, index, index, lengths) if int(prompts.min()) > 0 else None

    def run(self, call: Mapping[str, Any], rows: Sequence[Mapping[str, Tensor]], states: Tensor, split: Split) -> Any:
        """The decoder's output, right on the last prompt token and after it; before, it means nothing.

        Args:
            call: Arguments of the decoder.
            rows: Its rows, each alone.
            states: States at the cut, `(rows, tokens, d)`.
            split: The prompts.
        """
        width, rest = int(split.prompts.max()), int((split.lengths - split.starts).max())
        known = [
            self._of(row, i, states[i : i + 1], n)
            for i, (row, n) in enumerate(zip(rows, split.prompts.tolist(), strict=True))
        ]
        layers, _, heads, _, size = known[0].shape
        shape = (layers, 2, len(rows), heads, width, size)
        caches = torch.zeros(shape, dtype=known[0].dtype, device=states.device)
        for i, cache in enumerate(known):
            caches[:, :, i, :, : cache.shape[3]].copy_(cache, non_blocking=True)
        split = split.to(states.device)
        output = continue_prompts(
            self.model, self.decoder, call, states, split, [(kv[0], kv[1]) for kv in caches], width, rest
        )
        place = torch.arange(call["input_ids"].shape[1], device=states.device) - split.starts[:, None]
        place = place.clamp(0, output[0].shape[1] - 1)
        output.last_hidden_state = output[0].gather(1, place[..., None].expand(-1, -1, output[0].shape[-1]))
        setattr(output, self.decoder.cache, None)
        return output

    def keep(self) -> None:
        """Memoise what the runs since the last time computed: they were right."""
        for key, known in self._new.items():
            self.memo.put(key, known)
        self._new.clear()

    @torch.no_grad()
    def _of(self, row: Mapping[str, Tensor], index: int, state: Tensor, length: int) -> Tensor:
        """Keys and values of the first `length` tokens of row `index`, `(layers, 2, heads, length, size)`.

        The row's own prompt end counts: behind another's, its prompt would be steered.
        """
        if self._namespace is None:
            base = base_of(self.model)
            vectors = {id(p) for layer in steering_layers(self.model) for p in layer.parameters()}
            frozen = [(name, p) for name, p in base.named_parameters() if id(p) not in vectors]
            settings = ("prompts", self.decoder.count, attention_of(base), config_of(base))
            self._namespace = weights_key([*frozen, *base.named_buffers()], *settings)
        prompt = {name: both(lambda v: v[:, :length], value) for name, value in row.items()}
        key = row_key(self._namespace, prompt)
        known = self._new.get(key)
        if known is None and (known := self.memo.get(key)) is None:
            column = torch.arange(length, device=state.device)[None]
            with evaluating(self.model), part(self.model, torch.tensor([index], device=state.device), column):
                call = {**prompt, self.decoder.cache: DynamicCache(), "use_cache": True}
                cache = getattr(self.decoder.run(call, state[:, :length]), self.decoder.cache)
            layers = cache.layers[self.decoder.count :]
            known = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
            self._new[key] = known
        return known


def prompts_are_constant(model: nn.Module, training: bool) -> bool:
    """Whether all that is adapted or trained in `model` changes completion tokens only."""
    owned = set()
    for module in model.modules():
        if isinstance(module, SteeringVectorLayer):
            if any(config.positions != "completion" for config in module.config.values()):
                return False
            owned |= {id(parameter) for parameter in module.parameters()}
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return False
    trained = any(p.requires_grad and id(p) not in owned for p in model.parameters())
    return bool(owned) and not (training and trained)
