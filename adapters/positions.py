"""Which tokens are steered, in training, in cached generation and with padding on either side.

A forward pass does not say where its prompt ends. It is read, in this order, from `prompt_length(model, n)`, from
`PeftModel.generate` (its input is the prompt), from `labels` (the completion starts at the first one that is not
-100), or from a cache (what is already in it was the prompt, or follows it). A forward that tells nothing is refused:
guessing would steer the wrong tokens without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .config import Positions

CACHE_NAMES = ("cache", "past_key_values")
"""What the cache of keys and values is called: from transformers 5.24, and before."""


class PromptBoundary:
    """Where the prompt of the current forward pass ends; one object is shared by all steered layers of a model."""

    def __init__(self) -> None:
        self.declared: int | Tensor | None = None
        """Columns that belong to the prompt, counted from the first token ever (cached ones too)."""
        self._prompt_end: Tensor | None = None
        self._last_prompt: Tensor | None = None
        self._past = 0
        self._part: tuple[Tensor, Tensor] | None = None
        self._selected: Tensor | None = None
        self._handle: RemovableHandle | None = None

    @property
    def prompt_end(self) -> Tensor | None:
        """Columns that belong to the prompt of each row of the current forward pass; None if it does not say."""
        return self._prompt_end

    def watch(self, model: nn.Module) -> None:
        """Read the boundary of every forward pass of `model` from now on."""
        if self._handle is None:
            self._handle = model.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def unwatch(self) -> None:
        """Undo `watch`."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model: read the boundary of this batch."""
        tokens = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), None)
        if tokens is None:
            tokens = args[0]
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        self._past = int(cache.get_seq_length()) if cache is not None else 0
        end = self._find_end(tokens, kwargs, cache is not None)
        self._prompt_end = end
        self._last_prompt = None if end is None else self._last_real(end, tokens, kwargs.get("attention_mask"))

    def _find_end(self, tokens: Tensor, kwargs: Mapping[str, Any], cached: bool) -> Tensor | None:
        rows, columns = tokens.shape[:2]
        if self.declared is not None:
            declared = torch.as_tensor(self.declared, device=tokens.device)
            return declared if declared.shape == (rows,) else declared.expand(rows)
        labels = kwargs.get("labels")
        if labels is not None:
            labelled = labels != -100
            first = labelled.int().argmax(dim=1)
            return torch.where(labelled.any(dim=1), first, columns) + self._past
        if cached:
            return torch.full((rows,), self._past or columns, device=tokens.device)
        return None

    def _last_real(self, end: Tensor, tokens: Tensor, attention_mask: Any) -> Tensor:
        """Column of the last prompt token that is not padding (right-padded prompts end before column `end`)."""
        columns = tokens.shape[1]
        # a compiled cache brings a prepared 4-D mask, or a dictionary of them; prompts are padded on the left then
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != tokens.shape[:2] or self._past:
            return end - 1
        index = torch.arange(columns, device=tokens.device)
        real = attention_mask.bool() & (index < end[:, None])
        return torch.where(real, index, -1).amax(dim=1)

    def mask(self, positions: Positions, hidden: Tensor) -> Tensor | None:
        """Boolean `(rows of the batch, tokens, 1)` of steered tokens; None means all.

        Raises:
            ValueError: the forward pass did not say where its prompt ends.
        """
        if positions == "all":
            return None
        if self._prompt_end is None or self._last_prompt is None:
            raise ValueError(
                f"positions={positions!r}: this forward pass does not say where the prompt ends. Pass labels (-100 on "
                "the prompt), use generate, or wrap it in `with steertune.adapters.prompt_length(model, n):`."
            )
        end, last = self._prompt_end.to(hidden.device), self._last_prompt.to(hidden.device)
        column = torch.arange(hidden.shape[1], device=hidden.device) + self._past
        if self._part is not None:
            rows, column = self._part
            end, last = end[rows], last[rows]
        if positions == "last_prompt":
            chosen = column == last[:, None]
        else:
            before = column < end[:, None]
            chosen = before if positions == "prompt" else ~before
        return chosen[..., None]

    @property
    def rows(self) -> Tensor | None:
        """Row of the batch of each row that the blocks see, `(rows,)`; None: all rows, in their order."""
        if self._part is None or self._selected is None:
            return self._selected if self._part is None else self._part[0]
        return self._selected[self._part[0]]

    @contextmanager
    def part(self, rows: Tensor, columns: Tensor) -> Iterator[None]:
        """Inside, the blocks see a part of the batch only.

        Args:
            rows: Row of the batch of each row they see, `(rows,)`.
            columns: Column of the batch of each token they see, `(rows, tokens)`.
        """
        before, self._part = self._part, (rows, columns)
        try:
            yield
        finally:
            self._part = before

    @contextmanager
    def select(self, rows: Tensor) -> Iterator[None]:
        """Inside, only these rows are the batch, `(rows,)`; parts are parts of them."""
        before = self._selected, self._prompt_end, self._last_prompt
        self._selected = rows
        if self._prompt_end is not None and self._last_prompt is not None:
            self._prompt_end, self._last_prompt = self._prompt_end[rows], self._last_prompt[rows]
        try:
            yield
        finally:
            self._selected, self._prompt_end, self._last_prompt = before

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Afterwards, the boundary is that of the forward pass before: a backward pass that computes blocks again
        (gradient checkpointing) reads it."""
        before = self._prompt_end, self._last_prompt, self._past
        try:
            yield
        finally:
            self._prompt_end, self._last_prompt, self._past = before


@contextmanager
def prompt_length(model: nn.Module, length: int | Tensor) -> Iterator[None]:
    """Say where the prompt ends in every forward pass inside the block.

    Args:
        model: A model with steering vectors.
        length: Number of leading columns that belong to the prompt, padding on the left included: one number, or a
            tensor `(rows,)`.
    """
    from .layer import steering_layers

    boundaries = {id(layer.boundary): layer.boundary for layer in steering_layers(model)}
    before = {key: boundary.declared for key, boundary in boundaries.items()}
    for boundary in boundaries.values():
        boundary.declared = length
    try:
        yield
    finally:
        for key, boundary in boundaries.items():
            boundary.declared = before[key]
