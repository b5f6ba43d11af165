"""Cache the states of a row below the suffix, and its log-probabilities under the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn

from ...adapters.observing import base_model, evaluating
from ...losses import Outputs
from ..batch import Batch
from ..host_copies import both, on_host
from .decoder import Decoder
from .exactness import (
    NoPrefix,
    Notices,
    Unknown,
    check_frozen,
    check_hooks,
    difference,
    draws,
    in_words,
    last_tokens,
)
from .new_rows import NewRows, Row
from .store import TensorStore, attention_of, config_of, row_key, rows_of, weights_key


class CachedStates:
    """The residual stream after the cached prefix, row by row. It is computed in evaluation mode.

    Args:
        store: Where states are kept.
        model: The model, with or without PEFT.
        decoder: Its stack of blocks, which can skip the cached prefix.
        training: Whether parameters that require gradients will be changed.
        random: Whether modules are in training mode, in which some draw random numbers.
        notices: Reports why new rows run one by one.
        stops: Numbers of lower blocks after which states are also stored when a pass computes them.
    """

    def __init__(
        self,
        store: TensorStore,
        model: nn.Module,
        decoder: Decoder,
        training: bool,
        random: bool,
        notices: Notices,
        stops: Collection[int] = (),
    ) -> None:
        self.store, self.model, self.decoder, self.training, self.random = store, model, decoder, training, random
        self.stops = sorted({stop for stop in stops if 0 < stop < decoder.count})
        self._namespace: str | None = None
        self._stop_namespaces: dict[int, str] = {}
        self._ran_until: dict[int, dict[str, nn.Module]] = {}
        self._below: list[nn.Module] = []
        self._new: dict[str, Tensor] = {}
        self._new_rows = NewRows(decoder, self.stops, notices)

    def of(self, rows: Sequence[Row], width: int) -> Tensor:
        """States of a batch, `(R, width, D)`, zero on the padding to the right; `keep` stores new ones.

        Raises:
            NoPrefix: the states below the suffix are not constant.
        """
        if self._namespace is None:
            self._namespace = self._check(rows[0])
        # hooks can be added between passes
        check_hooks(self._below)
        self._new.clear()
        # states computed before
        keys = [row_key(self._namespace, row) for row in rows]
        states = {key: self.store.get(key) for key in keys}
        # equal rows run once
        new = {key: row for key, row in zip(keys, rows, strict=True) if states[key] is None}
        if new:
            with evaluating(base_model(self.model)):
                computed = self._new_rows.states(list(new.values()))
            # also the states that other models will start from
            for (key, row), by_stop in zip(new.items(), computed, strict=True):
                states[key] = self._new[key] = by_stop.pop(self.decoder.count)
                self._new |= {row_key(self._stop_namespace(stop), row): state for stop, state in by_stop.items()}
        return side_by_side(
            [state for key in keys if (state := states[key]) is not None], width, rows[0]["input_ids"].device
        )

    def keep(self) -> None:
        """Store what the last `of` computed, once it is verified."""
        for key, state in self._new.items():
            self.store.put(key, state)
        self._new.clear()

    # -- what the states depend on ------------------------------------------------------------------------------

    def _check(self, row: Row) -> str:
        """Check all that runs below the suffix, and return the namespace of its states."""
        row = last_tokens(row)
        # modules by their names in the plain model: with PEFT around it the key is the same
        base, stack = base_model(self.model), self.decoder.module
        names = {module: name for name, module in base.named_modules()}
        ran = {names[stack]: stack}

        def note(module: nn.Module, _: object) -> None:
            ran[names[module]] = module

        def note_stop(stop: int, *_: object) -> None:
            self._ran_until[stop] = dict(ran)

        # a short pass shows which modules run below the suffix; dropout would draw random numbers
        handles = [module.register_forward_pre_hook(note) for module in names]
        handles += [self.decoder.blocks[n - 1].register_forward_hook(partial(note_stop, n)) for n in self.stops]
        try:
            with evaluating(base):
                state = self.decoder.state({**row, "use_cache": False})
        finally:
            for handle in handles:
                handle.remove()
        # modules that are not constant by type
        check_frozen(ran.items(), self.training, self.random)
        self._below = [module for module in ran.values() if module is not stack]
        # noise that cannot be recognised by a module's name
        if self.random:
            in_training, drawn = draws(base, row, lambda row: self.decoder.state({**row, "use_cache": False}))
            if drawn or difference(state, in_training) is not None:
                raise NoPrefix(
                    "what runs below the trained layers differs in training (noise on embeddings or routers?). Set "
                    "neftune_noise_alpha=None, or router_jitter_noise=0, to leave them out"
                )
        # what the states depend on
        namespace = self._key(ran, self.decoder.count)
        dtype = str(state.dtype).removeprefix("torch.")
        what = f"{type(base).__name__} of width {state.shape[-1]} up to block {self.decoder.count - 1} in {dtype}"
        self.store.belongs_to(namespace, f"{what} with {attention_of(base)} attention")
        return namespace

    def _stop_namespace(self, stop: int) -> str:
        """The namespace of a stop: computed when a row is new, because it reads all weights below."""
        if stop not in self._stop_namespaces:
            self._stop_namespaces[stop] = self._key(self._ran_until[stop], stop)
        return self._stop_namespaces[stop]

    def _key(self, ran: Mapping[str, nn.Module], count: int) -> str:
        """A digest of everything besides the row that the state after `count` blocks depends on."""
        base = base_model(self.model)
        # every tensor of every module that ran below, by its name in the plain model
        names = {module: name for name, module in base.named_modules()}
        # experts that no token of the short pass chose are in the key, too
        ran = {**ran, **{names[module]: module for module in self.decoder.inside(count)}}
        below = {
            f"{name}.{key}".lstrip("."): tensor
            for name, module in ran.items()
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        }
        settings = (type(self.decoder.module).__name__, count, attention_of(base), config_of(base))
        return weights_key(sorted(below.items()), *settings)


def side_by_side(rows: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
    """Stack states of rows, `(tokens, D)` each, on a device, `(R, width, D)`, zero after their ends. Copies from
    pinned memory do not block."""
    # zeros on padding, so that nothing undefined reaches the suffix
    h_RCD = torch.zeros(len(rows), width, rows[0].shape[-1], dtype=rows[0].dtype, device=device)
    for row, place in zip(rows, h_RCD, strict=True):
        place[: len(row)].copy_(row, non_blocking=True)
    return h_RCD


class CachedReference:
    """Token log-probabilities under the reference, `at(0)`, row by row: they do not change while an adapter trains.

    Args:
        store: Where they are kept.
        reference: The model that gives the reference: one with adapters, which are then frozen or off, or a separate
            model.
        trained: Whether parameters that require gradients are not part of the reference.
    """

    def __init__(self, store: TensorStore, reference: nn.Module, trained: bool) -> None:
        self.store, self._failed = store, False
        # the reference is the model without what is trained
        tensors = [(name, p) for name, p in reference.named_parameters() if not (trained and p.requires_grad)]
        base = base_model(reference)
        settings = ("reference", attention_of(base), config_of(base), _frozen_adapters(reference, tensors))
        self._namespace = weights_key([*tensors, *reference.named_buffers()], *settings)

    def outputs(
        self, batch: Batch, compute: Callable[[Batch], Outputs], layers: Sequence[int] = (), site: str = "block"
    ) -> Outputs:
        """The outputs of a batch; those of new rows are computed row by row.

        Args:
            batch: The batch.
            compute: Outputs of one row under the reference, with the hidden states of `layers`.
            layers: The layers whose hidden states are needed.
            site: The site of these states.
        """
        failure = ""
        # training continues without the cache, whatever failed in it
        if not self._failed:
            try:
                return self._outputs(batch, compute, layers, site)
            except Unknown:
                pass
            except Exception as error:
                failure = in_words(error)
        outputs = compute(batch)  # an error of the model itself is raised again here
        if failure:
            self._failed = True
            Notices(logging.WARNING).failed("the cache of the reference", failure)
        return outputs

    def _outputs(self, batch: Batch, compute: Callable[[Batch], Outputs], layers: Sequence[int], site: str) -> Outputs:
        # rows alone, and their labels without those on padding
        rows = rows_of(batch.inputs)
        device = batch.labels.device
        row_labels = [_first(batch.labels, i, row["input_ids"].shape[1]) for i, row in enumerate(rows)]
        # labels on padding belong to no row
        labelled = int((on_host(batch.labels)[:, 1:] != -100).sum())
        if sum(int((on_host(labels)[:, 1:] != -100).sum()) for labels in row_labels) != labelled:
            return compute(batch)
        names = {layer: f"{site}/{layer}" for layer in layers}
        logps: list[Tensor] = []
        hidden: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for row, labels in zip(rows, row_labels, strict=True):
            logps_L, states = self._row({**row, "labels": labels}, names, compute)
            logps.append(logps_L.to(device, non_blocking=True))
            for layer, state in zip(layers, states, strict=True):
                hidden[layer].append(state.to(device, non_blocking=True))
        # side by side again, in the order of the batch
        states = {layer: torch.cat(states) for layer, states in hidden.items()}
        return Outputs(batch.spread(torch.cat(logps)), batch.targets != -100, states)

    def _row(
        self, row: dict[str, Tensor], layers: Mapping[int, str], compute: Callable[[Batch], Outputs]
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of a row's labels, `(labels,)`, and the states of every layer, `(labels, D)`, stored under
        its name."""
        # one key for the log-probabilities, one for the states of each layer
        keys = [row_key(self._namespace, row)]
        keys += [row_key(f"{self._namespace}/{name}", row) for name in layers.values()]
        values = [self.store.get(key) for key in keys]
        if any(value is None for value in values):
            # the row alone, so that its value does not depend on the batch
            inputs = {name: value for name, value in row.items() if name != "labels"}
            outputs = compute(Batch(inputs, row["labels"], pairs=False))
            values = [outputs.token_logps[outputs.mask], *(outputs.hidden[layer] for layer in layers)]
            for key, value in zip(keys, values, strict=True):
                self.store.put(key, value)
        logps, *states = (value for value in values if value is not None)
        return logps, states


def _first(labels: Tensor, row: int, length: int) -> Tensor:
    return both(lambda values: values[row : row + 1, :length], labels)


def _frozen_adapters(model: nn.Module, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, str]:
    """The settings of adapters that belong to the reference: no tensor holds their scale, for example."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    held = {name: any(f".{name}." in f"{key}." for key, _ in tensors) for name in configs}
    return {name: repr(sorted(config.to_dict().items(), key=str)) for name, config in configs.items() if held[name]}
