"""Run a model in another mode or without adapters, and restore it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

ADAPTER_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, with its adapter layers; any other model is returned unchanged."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore afterwards which adapters are active, which parameters require gradients, and the mode of every module.

    PEFT makes every active adapter trainable when it enables adapters again (`disable_adapter`, `enable_adapters`,
    `add_adapter`), even one that was frozen, and TRL's `use_adapter` leaves only one of several adapters active.

    Args:
        model: Any model, with or without adapters.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    layers = [(m, m.disable_adapters, [*m.active_adapters]) for m in model.modules() if isinstance(m, ADAPTER_LAYERS)]
    wholes = [(m, m.active_adapter) for m in model.modules() if isinstance(m, PeftModel | BaseTuner)]
    try:
        yield
    finally:
        for layer, disabled, active in layers:
            if layer.active_adapters != active:
                layer.set_adapter(active)
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
        for whole, active in wholes:
            whole.active_adapter = active
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Disable every adapter of a model, whether PEFT or transformers' `add_adapter` added it.

    Args:
        model: Any model, with or without adapters.
    """
    with untouched(model):
        for module in model.modules():
            if isinstance(module, ADAPTER_LAYERS) and not module.disable_adapters:
                module.enable_adapters(False)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; each module gets its mode back afterwards."""
    with _mode(model, training=False):
        yield


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode; each module gets its mode back afterwards."""
    with _mode(model, training=True):
        yield


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    changed = [module for module in model.modules() if module.training is not training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training
