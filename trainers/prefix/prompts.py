"""Run the suffix on rows in two parts: prompts fill a cache of keys and values, and what follows them reads it.

This is used if rows cannot be packed (`packing.py`), because the model computes attention itself: the chosen and the
rejected answer of a pair follow one prompt, which runs once. It is also used if no prompt token is steered: then a
prompt's keys and values are constants in every block, and are stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...adapters import SteeringVectorLayer, steering_layers
from ...adapters.observing import ADAPTER_LAYERS, base_model, evaluating
from ..host_copies import both, on_host, sent
from .decoder import Decoder
from .store import TensorStore, attention_of, config_of, row_key, weights_key

_WORTH_IT = 0.9  # of the tokens: a second pass has a fixed cost


@dataclass(frozen=True)
class Split:
    """A batch of rows as prompts, some of them shared, and what follows them; on the host until `to` moves it.


    Attributes:
        prompts: Tokens of each distinct prompt, `(prompts,)`.
        owner: Row whose first tokens are the prompt, for each prompt, `(prompts,)`.
        prompt_of: Prompt of each row, `(rows,)`.
        lengths: Real tokens of each row, `(rows,)`.
    """

    prompts: Tensor
    owner: Tensor
    prompt_of: Tensor
    lengths: Tensor

    @property
    def starts(self) -> Tensor:
        """The first column after the prompt in each row, `(rows,)`."""
        return self.prompts[self.prompt_of]

    def to(self, device: torch.device) -> Split:
        """Copy to a device without waiting for it."""
        return Split(*(sent(getattr(self, name), device) for name in ("prompts", "owner", "prompt_of", "lengths")))

    def only(self, prompts: Collection[int]) -> tuple[Split, Tensor]:
        """The part of the batch that has these prompts, and its rows."""
        rows = torch.tensor([row for row, prompt in enumerate(self.prompt_of.tolist()) if prompt in prompts])
        selected, prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        owner = torch.searchsorted(rows, self.owner[selected])
        return Split(self.prompts[selected], owner, prompt_of, self.lengths[rows]), rows


def shared_prompts(call: Mapping[str, Any], ends: Tensor | None = None) -> Split | None:
    """The split of a batch whose two halves share the beginnings of their rows; None if that saves little.

    Args:
        call: Arguments of the decoder.
        ends: Where each row's prompt ends, if that decides what is steered: two rows share no token that one of them
            steers and the other does not, `(rows,)`.
    """
    ids, lengths = on_host(call["input_ids"]), row_lengths(call)
    rows, width = ids.shape
    half = rows // 2
    if rows % 2 or lengths is None:
        return None
    column = torch.arange(width)
    # the last token of a row is left to the second pass, which must not be empty
    same = (ids[:half] == ids[half:]) & (column < torch.minimum(lengths[:half], lengths[half:])[:, None] - 1)
    if ends is not None:
        # the last token of a prompt may be steered alone
        first, second = on_host(ends).chunk(2)
        same &= column < torch.where(first == second, first, torch.minimum(first, second) - 1)[:, None]
    prompts = same.long().cumprod(dim=1).sum(dim=1)
    index = torch.arange(half)
    split = Split(prompts, index, torch.cat([index, index]), lengths)
    # what two passes cost, padding included
    rest = int((lengths - split.starts).max())
    tokens = half * int(prompts.max()) + rows * rest
    return split if int(prompts.min()) > 0 and tokens <= _WORTH_IT * rows * width else None


def row_lengths(call: Mapping[str, Any]) -> Tensor | None:
    """Real tokens of every row, `(rows,)`, on the host; None unless all padding is on the right and positions are the
    default."""
    ids, mask = call["input_ids"], call.get("attention_mask")
    if call.get("position_ids") is not None or call.get("token_type_ids") is not None:
        return None
    if mask is None:
        return torch.full(ids.shape[:1], ids.shape[1])
    mask = on_host(mask)
    lengths = mask.sum(dim=1)
    # real tokens are the first ones of each row
    ends_there = mask.bool() == (torch.arange(ids.shape[1]) < lengths[:, None])
    return lengths if bool(ends_there.all()) else None


def run_split(model: nn.Module, decoder: Decoder, call: Mapping[str, Any], states: Tensor | None, split: Split) -> Any:
    """The decoder's output on a batch, its shared prompts computed once.

    Two passes: the prompts fill a cache of keys and values; what follows reads them. Both are differentiable.

    Args:
        model: The model around the decoder.
        decoder: The decoder.
        call: Its arguments.
        states: States after the cached prefix, `(rows, tokens, d)`; None if nothing is skipped.
        split: The prompts.
    """
    width, on = int(split.prompts.max()), call["input_ids"].device
    rest, split = int((split.lengths - split.starts).max()), split.to(on)
    column = torch.arange(width, device=on)
    real = column < split.prompts[:, None]
    # first the prompts, whose keys and values are cached
    first = {
        **call,
        "input_ids": call["input_ids"][split.owner, :width],
        "attention_mask": real.long(),
        decoder.cache: DynamicCache(),
        "use_cache": True,
    }
    with part(steering_layers(model), split.owner, column.expand(len(split.owner), -1)):
        prompts = decoder.run(first, None if states is None else states[split.owner, :width])
    # skipped blocks have not written any
    caches = [
        (layer.keys, layer.values)
        for layer in getattr(prompts, decoder.cache).layers[0 if states is None else decoder.count :]
    ]
    # then what follows them
    output = continue_prompts(model, decoder, call, states, split, caches, width, rest)
    # every token from the pass that computed it
    both = torch.cat([prompts[0][split.prompt_of], output[0]], dim=1)
    place = torch.arange(call["input_ids"].shape[1], device=column.device) - split.starts[:, None]
    place = torch.where(place < 0, place + split.starts[:, None], place + width).clamp_max(both.shape[1] - 1)
    output.last_hidden_state = both.gather(1, place[..., None].expand(-1, -1, both.shape[-1]))
    setattr(output, decoder.cache, None)
    return output


def continue_prompts(
    model: nn.Module,
    decoder: Decoder,
    call: Mapping[str, Any],
    states: Tensor | None,
    split: Split,
    caches: list[tuple[Tensor, Tensor]],
    width: int,
    rest: int,
) -> Any:
    """The decoder's output on what follows the prompts, `(rows, rest, d)`.

    Args:
        model: The model around the decoder.
        decoder: The decoder.
        call: Its arguments for the whole batch.
        states: States after the cached prefix; None if nothing is skipped.
        split: The prompts, on the device.
        caches: Keys and values of the prompts, `(prompts, heads, width, size)`, by layer in the suffix.
        width: Columns of the caches.
        rest: Tokens of the longest row after its prompt.
    """
    ids, starts = call["input_ids"], split.starts
    # the tokens after each prompt, moved to the left
    column = starts[:, None] + torch.arange(rest, device=ids.device)
    real = column < split.lengths[:, None]
    column = column.clamp_max(ids.shape[1] - 1)
    # the keys of a short prompt have a gap after them, up to the length of the longest prompt
    before = torch.arange(width, device=ids.device) < starts[:, None]
    rows = torch.arange(len(ids), device=ids.device)
    call = {
        **call,
        "input_ids": ids.gather(1, column),
        "attention_mask": torch.cat([before, real], dim=1).long(),
        decoder.cache: _cache(0 if states is None else decoder.count, caches, split.prompt_of),
        "use_cache": True,
    }
    # a token keeps its position, whatever the gap
    if decoder.takes("position_ids"):
        call["position_ids"] = column
    if states is not None:
        states = states.gather(1, column[..., None].expand(-1, -1, states.shape[-1]))
    with part(steering_layers(model), rows, column):
        return decoder.run(call, states)


def _cache(skipped: int, caches: list[tuple[Tensor, Tensor]], prompt_of: Tensor) -> DynamicCache:
    """A cache of every row's prompt. Skipped layers only need to have its length."""
    # an expanded zero takes no memory
    length = caches[0][0].shape[-2]
    nothing = caches[0][0].new_zeros(()).expand(len(prompt_of), 1, length, 1)
    of_rows = [(keys[prompt_of], values[prompt_of]) for keys, values in caches]
    return DynamicCache([(nothing, nothing)] * skipped + of_rows)


@contextmanager
def part(layers: Sequence[SteeringVectorLayer], rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Tell steering layers which tokens of the batch a pass contains."""
    with ExitStack() as stack:
        for boundary in {id(layer.boundary): layer.boundary for layer in layers}.values():
            stack.enter_context(boundary.part(rows, columns))
        yield


class PromptCaches:
    """Keys and values of prompts in the suffix, stored by content.

    Args:
        store: Where they are kept.
        model: The model, with or without PEFT.
        decoder: Its stack of blocks.
    """

    def __init__(self, store: TensorStore, model: nn.Module, decoder: Decoder) -> None:
        self.store, self.model, self.decoder = store, model, decoder
        self._namespace: str | None = None
        self._new: dict[str, Tensor] = {}

    def split(self, call: Mapping[str, Any]) -> Split | None:
        """Split off every row's prompt without its last token (which predicts the first label); None if impossible."""
        lengths, end = row_lengths(call), next(iter(steering_layers(self.model))).boundary.prompt_end
        if lengths is None or end is None or len(end) != len(lengths):
            return None
        # a row without an answer ends where its tokens do
        prompts = torch.minimum(on_host(end), lengths) - 1
        index = torch.arange(len(lengths))
        return Split(prompts, index, index, lengths) if int(prompts.min()) > 0 else None

    def run(self, call: Mapping[str, Any], rows: Sequence[Mapping[str, Tensor]], states: Tensor, split: Split) -> Any:
        """The decoder's output, which is valid from the last prompt token on and undefined before it.

        Args:
            call: Arguments of the decoder.
            rows: Its rows, each alone.
            states: States after the cached prefix, `(rows, tokens, d)`.
            split: The prompts.
        """
        width, rest = int(split.prompts.max()), int((split.lengths - split.starts).max())
        caches = [
            self._of(row, i, states[i : i + 1], n)
            for i, (row, n) in enumerate(zip(rows, split.prompts.tolist(), strict=True))
        ]
        # prompts side by side, padded on the right
        layers, _, heads, _, size = caches[0].shape
        shape = (layers, 2, len(rows), heads, width, size)
        kv_L2RHCS = torch.zeros(shape, dtype=caches[0].dtype, device=states.device)
        for i, cache in enumerate(caches):
            kv_L2RHCS[:, :, i, :, : cache.shape[3]].copy_(cache, non_blocking=True)
        split = split.to(states.device)
        output = continue_prompts(
            self.model, self.decoder, call, states, split, [(kv[0], kv[1]) for kv in kv_L2RHCS], width, rest
        )
        # every column from the pass after the prompts; earlier columns are not read
        place = torch.arange(call["input_ids"].shape[1], device=states.device) - split.starts[:, None]
        place = place.clamp(0, output[0].shape[1] - 1)
        output.last_hidden_state = output[0].gather(1, place[..., None].expand(-1, -1, output[0].shape[-1]))
        setattr(output, self.decoder.cache, None)
        return output

    def keep(self) -> None:
        """Store what the runs since the last call computed, once they are verified."""
        for key, cache in self._new.items():
            self.store.put(key, cache)
        self._new.clear()

    @torch.no_grad()
    def _of(self, row: Mapping[str, Tensor], index: int, state: Tensor, length: int) -> Tensor:
        """Keys and values of the first `length` tokens of row `index`, `(layers, 2, heads, length, size)`.

        The row runs with its own prompt end: with that of another row, its prompt could be steered.
        """
        if self._namespace is None:
            # prompts are not steered, so vectors are not part of the key; all other weights are
            base = base_model(self.model)
            vectors = {id(p) for layer in steering_layers(self.model) for p in layer.parameters()}
            frozen = [(name, p) for name, p in base.named_parameters() if id(p) not in vectors]
            settings = ("prompts", self.decoder.count, attention_of(base), config_of(base))
            self._namespace = weights_key([*frozen, *base.named_buffers()], *settings)
        prompt = {name: both(lambda v: v[:, :length], value) for name, value in row.items()}
        key = row_key(self._namespace, prompt)
        # computed in evaluation mode for the row alone, and stored when `keep` is called
        kv_L2HCS = self._new.get(key)
        if kv_L2HCS is None and (kv_L2HCS := self.store.get(key)) is None:
            column = torch.arange(length, device=state.device)[None]
            layers, row_1 = steering_layers(self.model), torch.tensor([index], device=state.device)
            with evaluating(self.model), part(layers, row_1, column):
                call = {**prompt, self.decoder.cache: DynamicCache(), "use_cache": True}
                cache = getattr(self.decoder.run(call, state[:, :length]), self.decoder.cache)
            layers = cache.layers[self.decoder.count :]
            kv_L2HCS = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
            self._new[key] = kv_L2HCS
        return kv_L2HCS


def prompts_are_constant(model: nn.Module, training: bool) -> bool:
    """Whether everything that is adapted or trained in `model` changes only completion tokens."""
    # a vector that steers completions changes no prompt; any other adapter does
    owned = set()
    for module in model.modules():
        if isinstance(module, SteeringVectorLayer):
            if any(config.positions != "completion" for config in module.config.values()):
                return False
            owned |= {id(parameter) for parameter in module.parameters()}
        elif isinstance(module, ADAPTER_LAYERS):
            return False
    trained = any(p.requires_grad and id(p) not in owned for p in model.parameters())
    return bool(owned) and not (training and trained)
