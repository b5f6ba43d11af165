"""Score answers while a model generates them, from the states that `generate` computes anyway.

    with LiveScores([monitor], model, width) as live:
        out = model.generate(**inputs)               # inputs["input_ids"] is (rows, width), padded on the left
    scores = live.scores(row=0, tokens=12)[0]        # (tokens,)

The state of a token is computed when the token is read, a step after it is chosen. So the last token of an answer that
is cut off has no score. In an answer that ends by itself, every token before the end has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..observing import base_model
from ..outputs import states_in
from .monitor import Monitor
from .threshold import MonitorError


def check_live(monitors: Sequence[Monitor]) -> None:
    """Refuse monitors that cannot read an answer while it is generated.

    Raises:
        MonitorError: a monitor reads other tokens than those of answers.
    """
    if others := sorted({monitor.tokens for monitor in monitors} - {"answer"}):
        raise MonitorError(
            f"A monitor of the tokens {others[0]!r} has no score while a model answers. Use one of tokens='answer'."
        )


class LiveScores:
    """Token scores of everything that is generated inside the context, for one call of `generate` with a cache.

    Args:
        monitors: They must read the tokens of answers.
        model: The model that generates, with its adapters.
        width: Columns of the prompt, including padding.

    Raises:
        MonitorError: a monitor reads other tokens than those of answers.
    """

    def __init__(self, monitors: Sequence[Monitor], model: nn.Module, width: int) -> None:
        check_live(monitors)
        self.monitors, self.width = monitors, width
        self._modules = [base_model(model).get_submodule(monitor.module) for monitor in monitors]
        self._read = [0] * len(monitors)  # columns that the model has read so far
        self._steps: list[list[Tensor]] = [[] for _ in monitors]
        self._handles: list[Any] = []

    def __enter__(self) -> LiveScores:
        for place, module in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(self._hook_of(place)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def scores(self, row: int, tokens: int) -> list[Tensor]:
        """The scores `(tokens,)` of the first tokens of a row's answer, one tensor per monitor; fewer if the answer
        was cut off before they were read.

        Args:
            row: Row of the batch.
            tokens: How many tokens the answer has, without the one that ends it.
        """
        return [torch.cat(steps, dim=1)[row, :tokens] if steps else torch.empty(0) for steps in self._steps]

    def _hook_of(self, place: int) -> Any:
        monitor = self.monitors[place]

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            h_BTD = states_in(output)
            start, self._read[place] = self._read[place], self._read[place] + h_BTD.shape[1]
            skipped = max(0, self.width - start)  # prompts are read in one part or in several
            if skipped < h_BTD.shape[1]:
                self._steps[place].append(monitor.token_scores(h_BTD[:, skipped:]))

        return hook
