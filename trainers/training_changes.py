"""Changes of the residual stream that exist in training only: hooks that evaluations and references do not see.

A change acts on passes that will have a gradient, of modules in training mode. So a reference, an evaluation, a
generation and a cached prefix are those of the model without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters.outputs import states_in, with_states

Change = Callable[[Tensor], Tensor]
"""From the output of a module, `(rows, tokens, d)`, to what is used in its place."""


class TrainingChange:
    """A forward hook that changes a module's output in training passes.

    Args:
        change: What it does.
    """

    def __init__(self, change: Change) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Change the output; the first of several, as decoder blocks return them."""
        if not module.training or not torch.is_grad_enabled():
            return output
        return with_states(output, self.change(states_in(output)))

    def on(self, module: nn.Module) -> RemovableHandle:
        """Hang the change on a module."""
        return module.register_forward_hook(self)


def changed_in_training(module: nn.Module) -> bool:
    """Whether a change hangs on this very module."""
    # torch has no public way to ask
    return any(isinstance(hook, TrainingChange) for hook in module._forward_hooks.values())
