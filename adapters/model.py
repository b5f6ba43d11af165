"""The PEFT tuner: attaches steering layers to the blocks of a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationConfig

from .basis import basis_of, rows_of
from .blocks import find_blocks, has_config, index_of, resolve_layers, site_name, width_of
from .config import SteeringVectorConfig
from .fingerprint import check_fingerprint, fingerprint
from .layer import BASE_ROW, NO_MERGE, SteeringVectorLayer, check_adapter_name, steering_layers
from .loading import check_what_transformers_loads
from .observing import adapters_off
from .positions import PromptBoundary
from .registration import NAME, register
from .saved import undeclared
from .stream import stream_sizes
from .tasks import resolve_task
from .types import finite_strength

CHILD = "steer"  # name of the steering layer in the module it steers


class SteeringVectorModel(BaseTuner):
    """A model with steering vectors; made by `peft.get_peft_model(model, SteeringVectorConfig(...))`."""

    prefix = f"{NAME}_"
    tuner_layer_cls = SteeringVectorLayer
    target_module_mapping = {}
    _warned_of_nothing = False

    def _prepare_adapter_config(self, peft_config: SteeringVectorConfig, model_config: dict[str, Any]):
        resolve_task(peft_config, self.model)
        if peft_config.base_fingerprint is not None:  # a model without a configuration is never a match
            check_fingerprint(peft_config.base_fingerprint, self.model)
        if peft_config.target_modules is None:
            blocks = find_blocks(self.model)
            layers = peft_config.layers = resolve_layers(peft_config.layers, len(blocks))
            names = [site_name(name, block, peft_config.site) for name, block in (blocks[i] for i in layers)]
            peft_config.target_modules = "|".join(re.escape(name) for name in names)
        if not has_config(self.model):
            peft_config.base_fingerprint = None  # the model has nothing to identify it by
        elif not (peft_config.base_fingerprint or {}).get("weights"):  # a loaded fingerprint may be the more exact one
            peft_config.base_fingerprint = fingerprint(self.model)
        if peft_config.stream_sizes is None and not peft_config.inference_mode:
            peft_config.stream_sizes = self._stream_sizes(peft_config.target_modules) or None
        return peft_config

    def _stream_sizes(self, target_modules: str, sharded: bool = False) -> dict[str, float]:
        """The size of the base model's residual stream at every steered module, by layer index."""
        steered = (name for name, _ in self.model.named_modules() if re.fullmatch(target_modules, name))
        with adapters_off(self.model):
            sizes = stream_sizes(self.model, {index_of(name): name for name in steered}, sharded)
        return {str(layer): size for layer, size in sizes.items()}

    def set_stream_sizes(self, adapter_name: str, sizes: dict[str, float] | None = None) -> None:
        """Set the sizes of the residual stream, the units of learning rates (see `adapters/units.py`).

        Args:
            adapter_name: The adapter.
            sizes: Layer index, as a string -> size. None measures them: then sharded weights must be gathered while
                the model runs, and all processes must call this.
        """
        config: Any = self.peft_config[adapter_name]
        config.stream_sizes = sizes if sizes is not None else self._stream_sizes(config.target_modules, True) or None
        for layer in steering_layers(self.model, adapter_name):
            layer.set_units(adapter_name)

    @staticmethod
    def _check_target_module_exists(peft_config: SteeringVectorConfig, key: str) -> bool:
        return re.fullmatch(peft_config.target_modules or "", key) is not None

    def _create_and_replace(
        self,
        peft_config: SteeringVectorConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layers = steering_layers(self.model)
        layer = _steering_layer_of(target)
        if layer is None:
            boundary = next((other.boundary for other in layers), None) or PromptBoundary()
            layer = SteeringVectorLayer(width_of(self.model, current_key, target), index_of(current_key), boundary)
            target.add_module(CHILD, layer)
            # Before all other hooks: a hidden-state capture of transformers that is already there must see the result.
            layer.handle = target.register_forward_hook(layer.hook, prepend=True)
        if peft_config.positions != "all":
            layer.boundary.watch(self.model)
        owners = [other for other in layers if other is not layer and adapter_name in other.config]
        owner = owners[0] if peft_config.tied and owners else None
        # vectors of a loaded adapter come from its file
        span = peft_config.form == "span" and peft_config.basis != [] and owner is None
        rows = rows_of(basis_of(peft_config.basis), layer.layer_index, layer.in_features) if span else None
        peft_config.rank = peft_config.rank if rows is None else len(rows)
        layer.add(adapter_name, peft_config, _device(target), owner, rows)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Like PEFT. A given `state_dict` names the steering layers, but PEFT looks for the modules they belong to.

        Raises:
            ValueError: the adapter's name cannot be the name of a module.
        """
        check_adapter_name(adapter_name)
        state_dict = kwargs.get("state_dict")
        config: Any = self.peft_config[adapter_name]
        if config.tied:  # the file holds one vector; the configuration names the layers
            kwargs["state_dict"] = None
        elif state_dict is not None:
            kwargs["state_dict"] = {key.replace(f".{CHILD}.{self.prefix}", f".{self.prefix}"): 0 for key in state_dict}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # With `target_modules` given by hand, the layers are known only now.
        layers = {
            name.removesuffix(f".{CHILD}"): module.layer_index
            for name, module in self.model.named_modules()
            if isinstance(module, SteeringVectorLayer) and adapter_name in module.config
        }
        config.layers = [*layers.values()]
        config.target_modules = "|".join(map(re.escape, layers))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """Like PEFT, and also refuse keys that are neither vectors nor in `modules_to_save`, which PEFT would load.

        Raises:
            ValueError: there is such a key, which would overwrite the base model.
        """
        vector_keys = {key for key in state_dict if ".modules_to_save." not in key}
        if names := undeclared(vector_keys, config):
            raise ValueError(
                f"{names[0]!r} is not a steering vector, and modules_to_save={config.modules_to_save} does not name "
                "it. It would overwrite the base model: remove it from the adapter's weights."
            )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def train(self, mode: bool = True) -> SteeringVectorModel:
        """Set the mode like the parent, and warn once if no parameter is trainable.

        `PeftModel.from_pretrained` freezes an adapter by default, and no trainer checks for this.
        """
        if mode and not self._warned_of_nothing and not any(p.requires_grad for p in self.parameters()):
            self._warned_of_nothing = True
            warnings.warn(
                "No parameter of this model is trainable, so training it would change nothing. Load the adapter with "
                "PeftModel.from_pretrained(..., is_trainable=True).",
                stacklevel=2,
            )
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model and not its `forward`, as PEFT 0.20 does: a hook on the model finds where the prompt ends."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT wraps `PeftModel.forward` and `.generate` in this. It gives each row its adapter (`adapter_names=`)."""
        names = kwargs.get("adapter_names")
        handles = [] if names is None else self._name_rows(names, _copies(kwargs))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _name_rows(self, names: list[str], copies: int) -> list[Any]:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call eval() first.")
        adapters = {name for layer in steering_layers(self.model) for name in layer.config} | {BASE_ROW}
        entries = [_named_strength(name, adapters) for name in names]
        if unknown := sorted({name for name, _ in entries} - adapters):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {sorted(adapters)}."
            )
        rows = [row for row in entries for _ in range(copies)]
        to_others = {"adapter_names": [name for name, _ in rows]}
        to_ours = {**to_others, "strengths": [strength for _, strength in rows]}
        return [
            module.register_forward_pre_hook(partial(_give, given), with_kwargs=True)
            for kind, given in ((SteeringVectorLayer, to_ours), (AuxiliaryTrainingWrapper, to_others))
            for module in self.model.modules()
            if isinstance(module, kind)
        ]

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises a NotImplementedError that gives the reason."""
        raise NotImplementedError(NO_MERGE)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Always raises a NotImplementedError that gives the reason."""
        raise NotImplementedError(NO_MERGE)

    def unload(self) -> nn.Module:
        """Remove every steering layer and return the base model."""
        for module in list(self.model.modules()):
            if (layer := _steering_layer_of(module)) is not None:
                layer.handle.remove()
                layer.boundary.unwatch()
                delattr(module, CHILD)
        return super().unload()


def _named_strength(entry: str, adapters: Collection[str]) -> tuple[str, float]:
    """Read an entry of `adapter_names`: an adapter, or an adapter and the strength of its row (`"careful@-1.5"`).

    Args:
        entry: The entry.
        adapters: The names of all adapters; an entry that is one of them is used as it is.

    Raises:
        ValueError: the strength is not a finite number.
    """
    name, at, number = entry.rpartition("@")
    if not at or entry in adapters or name not in adapters:
        return entry, 1.0
    if (strength := finite_strength(number)) is None:
        raise ValueError(f"adapter_names: {entry!r}: {number!r} is not a finite strength. Write {name}@1.5.")
    return name, strength


def _give(given: dict[str, Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, kwargs | given


def _copies(kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats every row: for beams or for several samples."""
    config = kwargs.get("generation_config") or GenerationConfig()
    beams = kwargs.get("num_beams") or config.num_beams or 1
    return max(beams, kwargs.get("num_return_sequences") or config.num_return_sequences or 1)


def _steering_layer_of(module: nn.Module) -> SteeringVectorLayer | None:
    """The steering layer that is attached to a module."""
    child = dict(module.named_children()).get(CHILD)
    return child if isinstance(child, SteeringVectorLayer) else None


def _device(target: nn.Module) -> torch.device:
    device = next((p.device for p in target.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


register(SteeringVectorConfig, SteeringVectorModel)
check_what_transformers_loads()
