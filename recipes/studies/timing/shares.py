"""Where the seconds of a training step go: matrix products, attention, other operations, and what is between them."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from steertune.recipes.studies.timing.ways import STEP, STEPS

KINDS = {
    "matrix products": r"mm$|linear|mkldnn|gemm|matmul",
    "attention": r"attention",
    "loss": r"softmax|nll_loss|cross_entropy|logsigmoid",
    "copies": r"copy_|cat$|clone|contiguous|fill_|zero_|_to_copy|index|gather|scatter|embedding",
}
"""Kind -> names of its operations, the first that fits; what fits none is "other operations"."""
OTHER, BETWEEN = "other operations", "between operations"
"""What is between operations is Python, and on a GPU the waiting for it."""


def kind_of(operation: str) -> str:
    """The kind of one of torch's operations."""
    return next((kind for kind, names in KINDS.items() if re.search(names, operation)), OTHER)


def shares(run: Callable[[int], object]) -> dict[str, float]:
    """Share of a step's seconds by kind of work, with what the profiler itself takes; they add up to 1.

    Args:
        run: Trains so many steps, each in a `record_function(STEP)`, as a `Run` does.
    """
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        run(STEPS)
    events = seen.events() or []
    steps = [event.time_range for event in events if event.name == STEP]
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in events:
        begun = event.time_range.start
        if event.name.startswith(("aten::", "mkldnn")) and any(s.start <= begun < s.end for s in steps):
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            found[kind_of(event.name)] += own / sum(s.end - s.start for s in steps)
    return {**found, BETWEEN: max(0.0, 1 - sum(found.values()))}
