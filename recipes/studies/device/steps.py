"""Training steps on the device: seconds, memory, and the share of the matrix rate that they reach."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from steertune.recipes.lab.memory import peak_memory_gb, reset_peak_memory
from steertune.recipes.studies.device.world import World
from steertune.recipes.studies.timing.floor import products
from steertune.recipes.studies.timing.rows import Rows
from steertune.recipes.studies.timing.ways import AGAINST, WAYS, Run, now

_WAYS = (
    "SFT: TRL + LoRA r8",
    "SFT: one import changed",
    "SFT: ours, and frozen prefix",
    "pairs: TRL + LoRA r8",
    "pairs: one import changed",
    "pairs: ours, and frozen prefix",
)
_STEPS = 8


@dataclass
class Timing:
    """What one way to train costs.

    Attributes:
        name: The way.
        kind: "SFT" or "pairs".
        seconds: Median of a warm step.
        flops: FLOPs of the matrix products that a step needs at least.
        memory_gb: Peak memory, with the model.
    """

    name: str
    kind: str
    seconds: float
    flops: float
    memory_gb: float

    @property
    def is_baseline(self) -> bool:
        """Whether others are compared with it."""
        return self.name in AGAINST.values()


def time_steps(world: World) -> Iterator[Timing]:
    """Time every way separately, on the same rows."""
    rows = Rows.of_one_length("48/24", 192) if world.tiny else Rows.of_one_length("512/256", 4096)
    model = world.timed()
    layer = 2 * model.config.num_hidden_layers // 3
    for name in _WAYS:
        way = WAYS[name]
        with tempfile.TemporaryDirectory() as folder:
            gc.collect()
            reset_peak_memory()
            # every way trains a copy of the model
            held = torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
            run = Run(way, model, world.tokenizer, rows, layer, folder)
            run(rows.epoch)  # kernels are chosen, and the cache is filled
            seconds = median(run(rows.epoch if world.tiny else _STEPS))
            memory = peak_memory_gb() - held
            del run
        needed = products(model, way, rows.tokens(world.tokenizer, way.kind), layer)
        flops = sum(4.0 * tokens * weight.numel() for tokens, weight in needed)  # forward, and back to the states
        yield Timing(name, name.partition(":")[0], seconds, flops, memory)


@torch.no_grad()
def matrix_rate(world: World) -> float:
    """TFLOP/s of a large matrix product in 16 bits on random numbers."""
    size = 256 if world.tiny else 8192
    left, right = (torch.randn(size, size, device=world.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(8):
        start = now()
        torch.matmul(left, right)
        seconds.append(now() - start)
    return 2 * size**3 / max(median(seconds[3:]), 1e-9) / 1e12
