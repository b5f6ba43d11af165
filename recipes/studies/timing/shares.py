"""Where the seconds of a training step go: matrix products, attention, other operations, and the time between them."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from steertune.recipes.studies.timing.ways import STEP

KINDS = {
    "matrix products": r"mm$|linear|mkldnn|gemm|matmul",
    "attention": r"attention",
    "loss": r"softmax|nll_loss|cross_entropy|logsigmoid",
    "copies": r"copy_|cat$|clone|contiguous|fill_|zero_|_to_copy|index|gather|scatter|embedding",
}
"""Kind of work -> regular expression of its operations; the first that matches is used."""
OTHER, BETWEEN = "other operations", "between operations"
"""Between operations, Python runs; on a GPU this includes waiting for the device."""


def kind_of(operation: str) -> str:
    """The kind of work of one of torch's operations."""
    return next((kind for kind, names in KINDS.items() if re.search(names, operation)), OTHER)


def shares(run: Callable[[int], object], steps: int = 2) -> dict[str, float]:
    """Share of a step's seconds by kind of work, including the profiler's own; the shares add up to 1.

    Args:
        run: Trains the given number of steps, each inside a `record_function(STEP)`, like a `Run`.
        steps: How many steps are profiled.
    """
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        run(steps)
    events = profiler.events() or []
    spans = [event.time_range for event in events if event.name == STEP]
    total = sum(span.end - span.start for span in spans)

    # add up the operations that start inside a step
    share_of = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in events:
        start = event.time_range.start
        if event.name.startswith(("aten::", "mkldnn")) and any(span.start <= start < span.end for span in spans):
            seconds = event.self_device_time_total if cuda else event.self_cpu_time_total
            share_of[kind_of(event.name)] += seconds / total
    return {**share_of, BETWEEN: max(0.0, 1 - sum(share_of.values()))}
