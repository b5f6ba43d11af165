"""In a step nobody waits to see what tensors on the device hold, but for the guard at its end.

There is no device here. Tensors of batches and models are marked as if they were on one, and so is all that is
computed from them; what has to be waited for there is noted when the library's own code does it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_data import demonstrations, pairs, trained
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback

import steertune.losses
import steertune.trainers
from steertune.adapters import SteeringVectorConfig
from steertune.adapters.types import Positions
from steertune.trainers import FrozenPrefix, construction, mixin

WAITED_FOR = "item tolist numpy cpu __bool__ __int__ __float__ __index__ nonzero argwhere unique masked_select equal"
OURS = [str(Path(str(package.__file__)).resolve().parent.parent) for package in (steertune.losses, steertune.trainers)]


def marked(value) -> bool:
    if isinstance(value, Tensor):
        return hasattr(value, "marked")
    if isinstance(value, dict):
        value = [*value.values()]
    return isinstance(value, list | tuple) and any(map(marked, value))


def mark(value):
    if isinstance(value, Tensor):
        vars(value)["marked"] = True
    elif isinstance(value, list | tuple):
        for one in value:
            mark(one)
    return value


class Watch(TorchFunctionMode):
    """Notes who waits for marked tensors while `noting`."""

    def __init__(self) -> None:
        super().__init__()
        self.noting, self.found = False, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not (marked(args) or marked(kwargs)):
            return func(*args, **kwargs)
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        by_mask = any(
            isinstance(one, Tensor) and one.dtype == torch.bool and marked(one)
            for one in (index if isinstance(index, tuple) else (index,))
        )
        if self.noting and (by_mask or name in WAITED_FOR.split()) and (who := self.caller()):
            self.found.append(f"{name} in {who}")
        found = func(*args, **kwargs)
        return found if name in ("tolist", "numpy", "cpu") else mark(found)

    @staticmethod
    def caller() -> str | None:
        """The function of ours that called, unless somebody else did."""
        frame = sys._getframe(2)
        while frame is not None and "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        file = "" if frame is None else str(Path(frame.f_code.co_filename).resolve())
        if frame is None or not file.startswith(tuple(OURS)) or "site-packages" in file or file.endswith("finite.py"):
            return None
        return f"{Path(file).name}:{frame.f_lineno}"


class Steps(TrainerCallback):
    """Notes from the third step on: by then the memo is filled."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, args, state, control, **kwargs):
        self.watch.noting = state.global_step >= 2

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.watch.noting = False


def waits(monkeypatch, folder, kind: str, positions: Positions, kept: bool) -> list[str]:
    monkeypatch.setattr(construction, "waits", lambda device: kept)
    watch = Watch()
    data, loss = (pairs(8), "dpo") if kind == "dpo" else (demonstrations(8), "cross_entropy")

    def as_on_a_device(trainer) -> None:
        collator = trainer.data_collator

        def send(examples):
            batch = collator(examples)
            return {k: mark(v.clone()) if isinstance(v, Tensor) else v for k, v in batch.items()}

        trainer.data_collator = send
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
            mark(tensor)

    make = mixin.SteeringMixin.train

    def train(self, *args, **kwargs):
        as_on_a_device(self)
        self.add_callback(Steps(watch))
        with watch:
            return make(self, *args, **kwargs)

    monkeypatch.setattr(mixin.SteeringMixin, "train", train)
    trained(
        kind,
        folder,
        data=data,
        loss=loss,
        peft_config=SteeringVectorConfig(layers=2, positions=positions),
        frozen_prefix=FrozenPrefix(),
        max_steps=4,
        per_device_train_batch_size=4,
        logging_strategy="no",
    )
    return watch.found


@pytest.mark.parametrize("positions", ["all", "completion"])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_nobody_waits_in_a_step(kind, positions, tmp_path, monkeypatch):
    assert waits(monkeypatch, tmp_path, kind, positions, kept=True) == []


def test_without_the_collators_tensors_it_would_wait(tmp_path, monkeypatch):
    found = waits(monkeypatch, tmp_path, "dpo", "all", kept=False)
    assert any("cpu in host_copies.py" in one for one in found)
