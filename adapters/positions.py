"""Which tokens are steered, in training, in cached generation, with padding on either side and in packed rows.

A forward pass does not say where its prompt ends. It is read, in this order, from `prompt_length(model, n)`, from
`generate` (its input is the prompt), from `labels` (see `SteeringVectorConfig`), or from a cache (what is already in
it was the prompt, or follows it). A forward that tells nothing is refused: guessing would steer the wrong tokens
without a word.
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
from .config import Positions
from .samples import hides_a_first_label, last_of_prompts, prompts_of, samples_of

_NO_BOUNDARY = (
    "this forward pass does not say where the prompt ends. Pass labels (-100 on the prompt), use generate, or wrap it "
    "in `with steertune.adapters.prompt_length(model, n):`."
)
_SEVERAL_SAMPLES = (
    "a row holds several packed samples, and prompt_length gives one boundary per row. Pass labels (-100 on the "
    "prompts) without prompt_length, or one sample per row (packing=False, padding_free=False)."
)
_UNCOUNTED_CACHE = (
    "the cache holds recurrent states of tokens that this model was not seen to read, so prompt_length cannot be "
    "counted from the first token. Fill the cache with this model, or use generate, whose input is the prompt."
)
_HIDDEN_FIRST_LABEL = (
    "the first token of a packed sample has no label and its second has one. Padding-free collators remove the first "
    "label of every sample, so a prompt of one token cannot be told from none. Use padding_free=False and "
    "packing=False, or positions='all'."
)


@dataclass
class _Prompts:
    """The prompts of one forward pass: either one end per row, or a mask over its tokens.

    Attributes:
        end: Columns that belong to the prompt of each row, counted from the first token ever, `(rows,)`.
        last: Column of its last real token, `(rows,)`.
        mask: Tokens that belong to a prompt, `(rows, columns)`, where labels say it.
        last_mask: Those that are the last of theirs, `(rows, columns)`.
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
        """Columns that belong to the prompt, counted from the first token ever (cached ones too)."""
        self.declared_labels: Tensor | None = None
        """Labels of the forward passes, `(rows, columns)`, that a trainer keeps from the model."""
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
        """Columns that belong to the prompt of each row of the current forward pass, `(rows,)`; None if it does not
        say, or if a row has several prompts."""
        prompts = self._prompts
        if prompts is None or prompts.mask is None:
            return None if prompts is None else prompts.end
        end = prompts.mask.sum(dim=1)  # of a prompt that is the row's beginning
        column = torch.arange(prompts.mask.shape[1], device=end.device)
        return end + self._past if torch.equal(prompts.mask, column < end[:, None]) else None

    def watch(self, model: nn.Module) -> None:
        """Read the boundary of every forward pass and of every `generate` of `model` from now on."""
        if self._undo:
            return
        self._undo = [model.register_forward_pre_hook(self.before_forward, with_kwargs=True).remove]
        if isinstance(model, GenerationMixin):
            # `generate` alone knows its prompt: prefill in chunks, reused caches and candidates look like completions
            generating: Any = model
            inner, own = generating.generate, model.__dict__.get("generate")
            generating.generate = functools.partial(self._generate, inner)
            self._undo.append(functools.partial(_restore_generate, model, own))

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
            # nothing else being said: tokens that find the cache empty are the prompt, all later ones the completion
            end = self._past if held != 0 else self._columns
            self._prompts = self._ending(torch.full(tokens.shape[:1], end, device=tokens.device), tokens, kwargs)

    def _count_after(self, model: nn.Module, cache: Any, kwargs: Mapping[str, Any]) -> None:
        """After this forward pass, count the columns of its cache, which may be one that the model makes itself."""
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
        """Prompts of one end per row. Their last real token is looked for: prompts may be padded on the right."""
        real = self._real(tokens, kwargs)
        if real is None:
            return _Prompts(end, end - 1)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        return _Prompts(end, torch.where(real & (index < end[:, None]), index, -1).amax(dim=1))

    def _real(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Tokens that are not padding, `(rows, columns)`; None where no mask says so."""
        mask = kwargs.get("attention_mask")
        # a compiled cache brings a prepared 4-D mask, or a dictionary of them; prompts are padded on the left then
        if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2] or self._past:
            return None
        return mask.bool()

    def _generate(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate`: everything it is given is the prompt, unless `prompt_length` says otherwise around it."""
        _refuse_guidance(getattr(inner, "__self__", None), kwargs)
        if self.declared is not None:  # also a draft of the model itself, inside another `generate`
            return inner(*args, **kwargs)
        self.declared = self._given(args, kwargs)
        try:
            return inner(*args, **kwargs)
        finally:
            self.declared = None

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Columns of the prompt of a `generate`, those in a cache that it continues included."""
        names = ("inputs_embeds", "input_ids", "inputs")
        prompt = next((kwargs[name] for name in names if kwargs.get(name) is not None), args[0] if args else None)
        if prompt is None:
            return 1  # it starts from the token that begins a sequence
        if not isinstance(prompt, Tensor):
            raise ValueError(
                f"generate was given a {type(prompt).__name__} of prompts to be packed into one row (continuous "
                "batching), where positions other than 'all' cannot be told. Pass a tensor of left-padded input_ids."
            )
        cache, columns = cache_in(kwargs), prompt.shape[1]
        held = self._lengths.of(cache)
        if held is None:  # where its recurrent states come from is the prompt; columns are counted from here
            self._lengths.count(cache, 0)
            return columns
        if cache is not None and not _has_columns(cache):
            return held + columns  # recurrent states: only new tokens are given
        mask = kwargs.get("attention_mask")
        # transformers: all tokens are given, or the new ones, and then the mask covers all
        return columns if mask is None else max(columns, mask.shape[1])

    def mask(self, positions: Positions, hidden: Tensor) -> Tensor | None:
        """Boolean `(rows of the batch, tokens, 1)` of steered tokens; None means all.

        Raises:
            ValueError: the forward pass did not say where its prompt ends, or the states are not those of its tokens.
        """
        if positions == "all":
            return None
        prompts = self._prompts
        if prompts is None:
            raise ValueError(f"positions={positions!r}: {self._why_not}")
        if self._part is None and (hidden.ndim != 3 or hidden.shape[1] != self._columns):
            raise ValueError(
                f"positions={positions!r}: the steered module returned states of shape {tuple(hidden.shape)} for rows "
                f"of {self._columns} tokens, so its states cannot be told apart by token. Use positions='all', or "
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
        """Row of the batch of each row that the blocks see, `(rows,)`; None: all rows, in their order."""
        if self._part is None:
            return self._selected
        rows = self._part[0][:, 0]
        return rows if self._selected is None else self._selected[rows]

    @contextmanager
    def part(self, rows: Tensor, columns: Tensor) -> Iterator[None]:
        """Inside, the blocks see a part of the batch only.

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
        """What is steered now, as a context for later: gradient checkpointing runs blocks again in the backward pass,
        when other forward passes have been made."""
        then = dict(vars(self))

        @contextmanager
        def as_it_was() -> Iterator[None]:
            before = dict(vars(self))
            vars(self).update(then)
            try:
                yield
            finally:
                vars(self).update(before)

        return as_it_was

    @contextmanager
    def select(self, rows: Tensor) -> Iterator[None]:
        """Inside, only these rows are the batch, `(rows,)`; parts are parts of them."""
        before = self._selected, self._prompts
        self._selected = rows
        self._prompts = None if self._prompts is None else self._prompts.select(rows)
        try:
            yield
        finally:
            self._selected, self._prompts = before


def _refuse_guidance(model: Any, kwargs: Mapping[str, Any]) -> None:
    """Classifier-free guidance runs a second prompt of another length inside `generate`, whose end nobody says."""
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    scales = [kwargs.get("guidance_scale"), *(getattr(config, "guidance_scale", None) for config in configs)]
    scale = next((value for value in scales if value is not None), 1)
    if scale != 1 or kwargs.get("negative_prompt_ids") is not None:
        raise ValueError(
            f"guidance_scale={scale} runs a second prompt of another length, and positions other than 'all' cannot be "
            "told in it. Use guidance_scale=1 without negative_prompt_ids, or positions='all'."
        )


def _has_columns(cache: Any) -> bool:
    """Whether `generate` takes the columns of a cache off its input (it asks `past_key_values` for its length)."""
    try:
        return cache.get_seq_length() > 0
    except (AttributeError, ValueError):
        return False


def _restore_generate(model: Any, own: Any) -> None:
    if own is None:
        del model.generate
    else:
        model.generate = own


@contextmanager
def prompt_length(model: nn.Module, length: int | Tensor) -> Iterator[None]:
    """Say where the prompt ends in every forward pass inside the block.

    Args:
        model: A model with steering vectors.
        length: Number of leading columns that belong to the prompt, padding on the left included: one number, or a
            tensor `(rows,)`.
    """
    with _declare(model, "declared", length):
        yield


@contextmanager
def prompts_by_labels(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Let these labels say where the prompts end in every forward pass inside the block, as if the model got them.

    Args:
        model: A model with steering vectors.
        labels: -100 on the prompts, `(rows, columns)`.
    """
    with _declare(model, "declared_labels", labels):
        yield


@contextmanager
def _declare(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    from .layer import steering_layers

    boundaries = {id(layer.boundary): layer.boundary for layer in steering_layers(model)}
    before = {key: getattr(boundary, name) for key, boundary in boundaries.items()}
    for boundary in boundaries.values():
        setattr(boundary, name, value)
    try:
        yield
    finally:
        for key, boundary in boundaries.items():
            setattr(boundary, name, before[key])
