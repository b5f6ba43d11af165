"""Changes to the residual stream that apply only in training: hooks that do not affect evaluations and references.

A change acts on passes with gradients, of modules in training mode. So a reference, an evaluation, a generation and a
cached prefix are those of the model without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters.outputs import states_in, with_states

Change = Callable[[Tensor], Tensor]
"""Maps the output of a module, `(rows, tokens, d)`, to its replacement."""


class TrainingChange:
    """A forward hook that changes a module's output in training passes.

    Args:
        change: Maps the output of a module to its replacement.
    """

    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Change the output, or the first one if a decoder block returns several."""
        if not module.training or not torch.is_grad_enabled():
            return output
        return with_states(output, self.change(states_in(output)))

    def on(self, module: nn.Module) -> RemovableHandle:
        """Attach the change to a module."""
        return module.register_forward_hook(self)


def changed_in_training(module: nn.Module) -> bool:
    """Whether a change is attached to this module itself."""
    # torch has no public API for this
    return any(isinstance(hook, TrainingChange) for hook in module._forward_hooks.values())
