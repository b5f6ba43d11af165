"""A monitor of the tiny served model, of a direction that nothing was fitted on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from steertune.adapters import monitors
from steertune.adapters.monitors import pooling
from steertune.adapters.observing import base_model


def monitor_of(model: Any, tokenizer: Any, layer: int = 0, threshold: float = 0.0) -> monitors.Monitor:
    """It reads the output of a block, by default below every vector."""
    states = torch.randn(40, 32, generator=torch.Generator().manual_seed(3 + layer))
    split = (states[:8] + 1, states[8:])
    reader = monitors.make_monitor("mean_difference", pooling.get("mean"), base_model(model), tokenizer, layer, split)
    return replace(reader, threshold=monitors.Threshold(threshold, 0.1, 40))
