"""Which tokens are steered, in training, in cached generation, with padding on either side and in packed rows.

A forward pass does not say where its prompt ends. The end is read, in this order, from `prompt_length(model, n)`, from
`generate` (its input is the prompt), from `labels` (see `SteeringVectorConfig`), or from a cache (what fills an empty
cache is the prompt, and what follows is not). A forward pass with none of them is an error, because guessing would
silently steer the wrong tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin

from .caches import CacheLengths, cache_in, counts_itself
from .samples import hides_a_first_label, last_of_prompts, prompts_of, samples_of
from .types import Positions

_NO_BOUNDARY = (
    "this forward pass does not say where the prompt ends. Pass labels (-100 on the prompt), use generate, or wrap it "
    "in `with steertune.adapters.prompt_length(model, n):`."
)
_SEVERAL_SAMPLES = (
    "a row holds several packed samples, and prompt_length gives one boundary per row. Pass labels (-100 on the "
    "prompts) without prompt_length, or one sample per row (packing=False, padding_free=False)."
)
_UNCOUNTED_CACHE = (
    "the cache holds recurrent states, and this model did not read their tokens, so prompt_length cannot be counted "
    "from the first token. Fill the cache with this model, or use generate, whose input is the prompt."
)
_HIDDEN_FIRST_LABEL = (
    "the first token of a packed sample has no label and its second has one. Padding-free collators remove the first "
    "label of every sample, so a prompt of one token looks like an empty one. Use padding_free=False and "
    "packing=False, or positions='all'."
)


@dataclass
class _Prompts:
    """The prompts of one forward pass: either one end per row, or a mask over its tokens.

    Attributes:
        end: Number of columns that belong to the prompt of each row, counted with those in the cache, `(rows,)`.
        last: Column of the last real token of the prompt, `(rows,)`.
        mask: True on tokens of a prompt, `(rows, columns)`, if labels give it.
        last_mask: True on the last real token of each prompt, `(rows, columns)`.
    """

    end: Tensor | None = None
    last: Tensor | None = None
    mask: Tensor | None = None
    last_mask: Tensor | None = None

    def select(self, rows: Tensor) -> _Prompts:
        """The same for some of the rows."""
        values = (self.end, self.last, self.mask, self.last_mask)
        return _Prompts(*(None if value is None else value[rows.to(value.device)] for value in values))


class PromptBoundary:
    """Where the prompts of the current forward pass end; one object is shared by all steered layers of a model."""

    def __init__(self) -> None:
        self.declared: int | Tensor | None = None
        """Number of columns that belong to the prompt, counted with those in the cache."""
        self.declared_labels: Tensor | None = None
        """Labels of the forward passes, `(rows, columns)`, if a trainer does not pass them to the model."""
        self._lengths = CacheLengths()
        self._prompts: _Prompts | None = None
        self._why_not = _NO_BOUNDARY
        self._columns = 0
        self._past = 0
        self._part: tuple[Tensor, Tensor] | None = None
        self._selected: Tensor | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def prompt_end(self) -> Tensor | None:
        """Number of columns that belong to the prompt of each row of the current forward pass, `(rows,)`; None if it
        is unknown, or if a row has several prompts."""
        prompts = self._prompts
        if prompts is None or prompts.mask is None:
            return None if prompts is None else prompts.end
        end = prompts.mask.sum(dim=1)  # right only if the prompt begins the row
        column = torch.arange(prompts.mask.shape[1], device=end.device)
        return end + self._past if torch.equal(prompts.mask, column < end[:, None]) else None

    def watch(self, model: nn.Module) -> None:
        """Read the boundary of every forward pass and of every `generate` of `model` from now on."""
        if self._undo:
            return
        self._undo = [model.register_forward_pre_hook(self.before_forward, with_kwargs=True).remove]
        if isinstance(model, GenerationMixin):
            # Only `generate` knows its prompt: chunked prefill, reused caches and candidates look like completions.
            generating: Any = model
            inner, override = generating.generate, model.__dict__.get("generate")
            generating.generate = functools.partial(self._generate, inner)
            self._undo.append(functools.partial(_restore_generate, model, override))

    def unwatch(self) -> None:
        """Undo `watch`."""
        for undo in self._undo:
            undo()
        self._undo = []

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model: read the boundary of this batch."""
        tokens = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), None)
        tokens = args[0] if tokens is None else tokens
        cache = cache_in(kwargs)
        held = self._lengths.of(cache)
        self._columns, self._past = tokens.shape[1], held or 0
        self._prompts, self._why_not = None, _NO_BOUNDARY
        self._count_after(module, cache, kwargs)
        samples = samples_of(tokens, kwargs) if cache is None else None
        labels = self.declared_labels if self.declared_labels is not None else kwargs.get("labels")
        if self.declared is not None:
            self._prompts = self._declared(tokens, kwargs, samples, held)
        elif labels is not None and labels.shape == tokens.shape[:2]:
            self._prompts = self._labelled(tokens, kwargs, labels, samples)
        elif cache is not None:
            # Without anything else, tokens that fill an empty cache are the prompt, and all later ones the completion.
            end = self._past if held != 0 else self._columns
            self._prompts = self._ending(torch.full(tokens.shape[:1], end, device=tokens.device), tokens, kwargs)

    def _count_after(self, model: nn.Module, cache: Any, kwargs: Mapping[str, Any]) -> None:
        """Count the columns of the cache after this forward pass; the model may create the cache itself."""
        if (cache is None and (model.training or kwargs.get("use_cache") is False)) or counts_itself(cache):
            return

        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            made = cache_in(output) if isinstance(output, Mapping) else None
            self._lengths.count(cache if made is None else made, self._past + self._columns)
            handle.remove()

        handle = model.register_forward_hook(count, always_call=True)

    def _declared(
        self, tokens: Tensor, kwargs: Mapping[str, Any], samples: Tensor | None, held: int | None
    ) -> _Prompts | None:
        if held is None:
            self._why_not = _UNCOUNTED_CACHE
            return None
        if samples is not None and not torch.equal(samples, samples[:, :1].expand_as(samples)):
            self._why_not = _SEVERAL_SAMPLES
            return None
        rows = len(tokens)
        end = torch.as_tensor(self.declared, device=tokens.device)
        if end.ndim and len(end) != rows and rows % len(end) == 0:  # `generate` repeats every row for beams
            end = end.repeat_interleave(rows // len(end))
        return self._ending(end if end.shape == (rows,) else end.expand(rows), tokens, kwargs)

    def _labelled(
        self, tokens: Tensor, kwargs: Mapping[str, Any], labels: Tensor, samples: Tensor | None
    ) -> _Prompts | None:
        labels = labels.to(tokens.device)
        if samples is not None and bool(hides_a_first_label(labels, samples)):
            self._why_not = _HIDDEN_FIRST_LABEL
            return None
        mask = prompts_of(labels, samples)
        return _Prompts(mask=mask, last_mask=last_of_prompts(mask, self._real(tokens, kwargs), samples))

    def _ending(self, end: Tensor, tokens: Tensor, kwargs: Mapping[str, Any]) -> _Prompts:
        """Prompts with one end per row. They may be padded on the right, so their last real token is searched for."""
        real = self._real(tokens, kwargs)
        if real is None:
            return _Prompts(end, end - 1)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        return _Prompts(end, torch.where(real & (index < end[:, None]), index, -1).amax(dim=1))

    def _real(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """True on tokens that are not padding, `(rows, columns)`; None without a mask of that shape."""
        mask = kwargs.get("attention_mask")
        # With a compiled cache the mask is 4-D, or a dictionary of masks; prompts are then padded on the left.
        if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2] or self._past:
            return None
        return mask.bool()

    def _generate(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate`: its whole input is the prompt, unless it runs inside `prompt_length`."""
        _refuse_guidance(getattr(inner, "__self__", None), kwargs)
        if self.declared is not None:  # also for a draft by the same model, inside another `generate`
            return inner(*args, **kwargs)
        self.declared = self._prompt_columns(args, kwargs)
        try:
            return inner(*args, **kwargs)
        finally:
            self.declared = None

    def _prompt_columns(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Number of columns of the prompt of a `generate`, including those in a cache that it continues."""
        names = ("inputs_embeds", "input_ids", "inputs")
        prompt = next((kwargs[name] for name in names if kwargs.get(name) is not None), args[0] if args else None)
        if prompt is None:
            return 1  # generation starts from the token that begins a sequence
        if not isinstance(prompt, Tensor):
            raise ValueError(
                f"generate was given a {type(prompt).__name__} of prompts to be packed into one row (continuous "
                "batching), where only positions='all' works. Pass a tensor of left-padded input_ids."
            )
        cache, columns = cache_in(kwargs), prompt.shape[1]
        held = self._lengths.of(cache)
        if held is None:  # recurrent states of unknown length: count from here
            self._lengths.count(cache, 0)
            return columns
        if cache is not None and not _has_columns(cache):
            return held + columns  # with recurrent states only the new tokens are passed
        mask = kwargs.get("attention_mask")
        # transformers gets all tokens, or only the new ones together with a mask over all.
        return columns if mask is None else max(columns, mask.shape[1])

    def mask(self, positions: Positions, hidden: Tensor) -> Tensor | None:
        """True on steered tokens, `(rows of the batch, tokens, 1)`; None means all.

        Raises:
            ValueError: the end of the prompt is unknown, or the states do not correspond to the tokens one to one.
        """
        if positions == "all":
            return None
        prompts = self._prompts
        if prompts is None:
            raise ValueError(f"positions={positions!r}: {self._why_not}")
        if self._part is None and (hidden.ndim != 3 or hidden.shape[1] != self._columns):
            raise ValueError(
                f"positions={positions!r}: the steered module returned states of shape {tuple(hidden.shape)} for rows "
                f"of {self._columns} tokens, so its states do not belong to single tokens. Use positions='all', or "
                "another layer or site."
            )
        if prompts.mask is not None and prompts.last_mask is not None:
            chosen = self._of_mask(positions, prompts.mask, prompts.last_mask, hidden.device)
        else:
            assert prompts.end is not None and prompts.last is not None
            chosen = self._of_end(positions, prompts.end, prompts.last, hidden)
        return chosen[..., None]

    def _of_mask(self, positions: Positions, prompt: Tensor, last: Tensor, device: torch.device) -> Tensor:
        chosen = {"prompt": prompt, "completion": ~prompt, "last_prompt": last}[positions].to(device)
        if self._part is None:
            return chosen
        rows, columns = self._part
        return chosen[rows, (columns - self._past).clamp(0, chosen.shape[1] - 1)]

    def _of_end(self, positions: Positions, end: Tensor, last: Tensor, hidden: Tensor) -> Tensor:
        end, last = end.to(hidden.device)[:, None], last.to(hidden.device)[:, None]
        column = torch.arange(hidden.shape[1], device=hidden.device) + self._past
        if self._part is not None:
            rows, column = self._part
            end, last = end[rows, 0], last[rows, 0]
        if positions == "last_prompt":
            return column == last
        before = column < end
        return before if positions == "prompt" else ~before

    @property
    def rows(self) -> Tensor | None:
        """Row of the batch of each row that the blocks see, `(rows,)`; None for all rows, in their order."""
        if self._part is None:
            return self._selected
        rows = self._part[0][:, 0]
        return rows if self._selected is None else self._selected[rows]

    @contextmanager
    def part(self, rows: Tensor, columns: Tensor) -> Iterator[None]:
        """Declare that the blocks see only a part of the batch inside the context.

        Args:
            rows: Row of the batch of each row they see, `(rows,)`, or of each token, `(rows, tokens)`.
            columns: Column of the batch of each token they see, `(rows, tokens)`.
        """
        before, self._part = self._part, (rows if rows.ndim == 2 else rows[:, None], columns)
        try:
            yield
        finally:
            self._part = before

    def snapshot(self) -> Callable[[], AbstractContextManager[None]]:
        """The current state as a context manager, for gradient checkpointing: it runs blocks again in the backward
        pass, after other forward passes."""
        state = dict(vars(self))

        @contextmanager
        def restored() -> Iterator[None]:
            before = dict(vars(self))
            vars(self).update(state)
            try:
                yield
            finally:
                vars(self).update(before)

        return restored

    @contextmanager
    def select(self, rows: Tensor) -> Iterator[None]:
        """Restrict the batch to these rows, `(rows,)`, inside the context; `part` then selects from them."""
        before = self._selected, self._prompts
        self._selected = rows
        self._prompts = None if self._prompts is None else self._prompts.select(rows)
        try:
            yield
        finally:
            self._selected, self._prompts = before


def _refuse_guidance(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse classifier-free guidance: it runs a second prompt of another length, whose end is unknown."""
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    scales = [kwargs.get("guidance_scale"), *(getattr(config, "guidance_scale", None) for config in configs)]
    scale = next((value for value in scales if value is not None), 1)
    if scale != 1 or kwargs.get("negative_prompt_ids") is not None:
        raise ValueError(
            f"guidance_scale={scale} runs a second prompt of another length, in which only positions='all' works. "
            "Use guidance_scale=1 without negative_prompt_ids, or positions='all'."
        )


def _has_columns(cache: Any) -> bool:
    """Whether `generate` removes the columns of a cache from its input (it asks `past_key_values` for its length)."""
    try:
        return cache.get_seq_length() > 0
    except (AttributeError, ValueError):
        return False


def _restore_generate(model: Any, override: Any) -> None:
    if override is None:
        del model.generate
    else:
        model.generate = override
