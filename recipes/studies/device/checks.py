"""Checks that a device gives the same results as the CPU. A check returns what it measured, and raises if it fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import BitsAndBytesConfig

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.adapters.layer import steering_layers
from steertune.adapters.rows import RowVector
from steertune.recipes.lab.training import silent
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.jobs import Event, Job, Piece
from steertune.recipes.serving.vectors import Vectors
from steertune.recipes.studies.device.world import NotRun, World, steered
from steertune.recipes.studies.timing.rows import random_words
from steertune.recipes.studies.timing.ways import STEP, WAYS, Run
from steertune.trainers import FrozenPrefix, SteeringDPOTrainer, share_weights, train_together

_FORMS: dict[str, dict[str, Any]] = {
    "bias": {},
    "gated": {"form": "gated"},
    "low rank": {"form": "low_rank", "rank": 2},
    "projected": {"form": "project", "init": "random"},
    "capped": {"norm": "capped", "norm_value": 1.0},
    "rescaled": {"norm": "preserve"},
    "last token of the prompt": {"positions": "last_prompt"},
}
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}
"""The error that a logit may have, relative to the largest one."""
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def equality(world: World) -> str:
    """Logits of every form, and the vector's gradient, in 32 and 16 bits, equal those on the CPU."""
    worst = dict.fromkeys(_TOLERANCE, 0.0)
    labels_BT = world.ids()
    for dtype in _TOLERANCE:
        for name, switches in _FORMS.items():
            results = []
            for device in ("cpu", world.device):
                model = steered(world.small(device, dtype), **switches)
                ids_BT = labels_BT.to(device)
                labels = ids_BT.clone()
                labels[:, :6] = -100
                output = model(input_ids=ids_BT, labels=labels)
                output.loss.backward()
                gradients = [p.grad.float().cpu() for p in model.parameters() if p.grad is not None]
                results.append((output.logits.detach().float().cpu(), torch.cat([g.flatten() for g in gradients])))
            for here, there in zip(*results, strict=True):
                off = _off(there, here)
                worst[dtype] = max(worst[dtype], off)
                assert off <= _TOLERANCE[dtype], f"{name} in {dtype}: off by {off:.2g}, allowed {_TOLERANCE[dtype]}"
    return ", ".join(f"{str(dtype).removeprefix('torch.')}: at most {off:.1g} off" for dtype, off in worst.items())


def training(world: World) -> str:
    """Three steps of DPO give the same vector as on the CPU."""
    there, here = (_train(world, device) for device in (world.device, torch.device("cpu")))
    cosine = float(torch.cosine_similarity(there, here, dim=0))
    assert cosine > 0.999, f"the vectors of the device and of the CPU have a cosine of {cosine:.5f}"
    return f"cosine with the CPU's vector {cosine:.6f}"


def prefix(world: World) -> str:
    """With the cached prefix, whose states are in pinned memory, training gives the same vector."""
    cached, plain = (_train(world, world.device, frozen_prefix=one) for one in (FrozenPrefix(), False))
    off = _off(cached, plain)
    assert off < 1e-3, f"the vector with the cached prefix is {off:.2g} off the one without"
    return f"{off:.1g} off the vector without it"


def host_waits(world: World) -> str:
    """How often the host waits for the device in a warm step; ours no more often than TRL's."""
    if world.device.type != "cuda":
        raise NotRun("the host does not wait for a CPU")
    counts = {}
    for name in ("pairs: TRL + LoRA r8", "pairs: ours, and frozen prefix"):
        with tempfile.TemporaryDirectory() as folder:
            run = Run(WAYS[name], world.small(world.device), world.tokenizer, _rows(), 3, folder)
            run(12)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                run(4)
        events = profiler.events() or []
        spans = [event.time_range for event in events if event.name == STEP]
        inside = [event for event in events if any(s.start <= event.time_range.start < s.end for s in spans)]
        counts[name] = sum(event.name in _WAITS for event in inside) / max(1, len(spans))
    theirs, ours = counts.values()
    assert ours <= theirs + 1, f"the host waits {ours:g} times per step, with TRL {theirs:g} times"
    return f"{ours:g} per step, TRL {theirs:g}"


def together(world: World) -> str:
    """Two arms that share their passes give the same vectors as each alone."""
    alone = [_train(world, world.device, seed=seed) for seed in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        base = world.small(world.device)
        trainers = [_trainer(world, share_weights(base), folder, seed=seed) for seed in (0, 1)]
        train_together(trainers)
        both = [_vector(trainer.model) for trainer in trainers]
    off = max(map(_off, both, alone))
    assert off < 1e-3, f"an arm trained beside another one is {off:.2g} off the same arm trained alone"
    return f"at most {off:.1g} off"


def four_bit(world: World) -> str:
    """A vector changes a 4-bit base, and strength 0 is the base."""
    if world.device.type != "cuda":
        raise NotRun("tested on CPUs by the test suite")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        world.small().save_pretrained(folder)
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map={"": world.device.index or 0}
        )
    ids_BT = world.ids().to(world.device)
    with torch.no_grad():
        plain = base(input_ids=ids_BT).logits
        model = steered(base)
        changed = model(input_ids=ids_BT).logits
        with set_strength(model, 0.0):
            off = model(input_ids=ids_BT).logits
    assert torch.equal(off, plain), "strength 0 is not the base"
    assert not torch.allclose(changed, plain, atol=1e-2), "the vector changes nothing"
    return "strength 0 is the base, bit for bit"


def sharded(world: World) -> str:
    """FSDP 2 on one process gives the same gradient."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def gradient(model: Any) -> torch.Tensor:
        ids_BT = world.ids().to(world.device)
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        [vector] = [p.grad for p in model.parameters() if p.grad is not None]
        return (vector.full_tensor() if hasattr(vector, "full_tensor") else vector).float().cpu()

    expected = gradient(steered(world.small(world.device), layers=2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    init_process_group(backend, init_method=address, rank=0, world_size=1)
    try:
        model = steered(world.small(world.device), layers=2)
        mesh = init_device_mesh(world.device.type, (1,))
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        off = _off(gradient(model), expected)
    finally:
        destroy_process_group()
    assert off < 1e-4, f"the sharded gradient is {off:.2g} off"
    return f"gradient {off:.1g} off, on one process"


def generation(world: World) -> str:
    """Greedy answers with a dynamic cache, a static one and none are the same, also in a batch of mixed strengths."""
    model = steered(world.small(world.device), positions="completion")
    ids_BT = world.ids(2).to(world.device)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ways: dict[str, dict[str, Any]] = {
        "dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False},
    }  # fmt: skip
    with no_compilation():
        answers = {name: model.generate(**inputs, **options, **way) for name, way in ways.items()}
    for name, answer in answers.items():
        assert torch.equal(answer, answers["none"]), f"answers with the {name} cache differ from those without a cache"
    with set_strength(model, -2.0):
        alone = model.generate(**inputs, **options)
    mixed = model.generate(**inputs, **options, adapter_names=["default@-2", "__base__"])
    assert torch.equal(mixed[0], alone[0]), "the answer to a row of a mixed batch differs from that to the row alone"
    return "three caches, and mixed strengths in a batch"


def served(world: World) -> str:
    """The server's engine on the device answers as it does on the CPU."""
    texts = []
    for device in ("cpu", world.device):
        heard: list[list[Event]] = [[] for _ in range(6)]
        engine = Engine(Vectors(steered(world.small(device))), world.tokenizer, batch=3)
        for number, events in enumerate(heard):
            vectors = (RowVector("default", float(number - 2)),) if number else ()
            engine.submit(Job(world.ids(6)[number].tolist(), 5, events.append, vectors))
        engine.run()
        texts.append(["".join(event.text for event in events if isinstance(event, Piece)) for events in heard])
    same = sum(one == other for one, other in zip(*texts, strict=True))
    assert same >= 5, f"{6 - same} of 6 greedy answers differ from the CPU's"  # one tie may fall the other way
    return f"{same} of 6 answers as on the CPU"


def compiled(world: World) -> str:
    """`torch.compile` gives the same logits at two strengths."""
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        raise NotRun("no C compiler is installed")
    model = steered(world.small(world.device))
    ids_BT = world.ids().to(world.device)
    fast: Any = torch.compile(model)
    worst = 0.0
    with torch.no_grad():
        for strength in (1.0, -1.5):
            with set_strength(model, strength):
                here, there = fast(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits
            worst = max(worst, _off(here, there))
    assert worst < 1e-3, f"compiled logits are {worst:.2g} off"
    return f"at most {worst:.1g} off"


LAST: dict[str, Callable[[World], str]] = {"torch.compile": compiled}
"""Slow checks, which run after the steps were timed."""
CHECKS: dict[str, Callable[[World], str]] = {
    "steering in 32 and 16 bits": equality,
    "training": training,
    "cached prefix": prefix,
    "waits of the host": host_waits,
    "arms side by side": together,
    "4-bit base": four_bit,
    "sharded weights": sharded,
    "cached generation": generation,
    "the server's engine": served,
}


def _off(values: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((values - expected).abs().max() / expected.abs().max())


def _rows() -> Any:
    from steertune.recipes.studies.timing.rows import Rows

    return Rows.of_one_length("24/12", 96)


def _train(world: World, device: torch.device, seed: int = 0, frozen_prefix: Any = None) -> torch.Tensor:
    """The vector after three steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(world, world.small(device), folder, device, seed, frozen_prefix)
        trainer.train()
        return _vector(trainer.model)


def _trainer(
    world: World, model: Any, folder: str, device: torch.device | None = None, seed: int = 0, frozen_prefix: Any = None
) -> Any:
    from trl import DPOConfig

    device = device or world.device
    args = DPOConfig(
        folder,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    made = SteeringDPOTrainer(
        model=model,
        peft_config=SteeringVectorConfig(layers=3),
        args=args,
        train_dataset=random_words(world.tokenizer, "dpo", 24, 12, 12),
        processing_class=world.tokenizer,
        loss="dpo",
        frozen_prefix=frozen_prefix,
    )
    return silent(made)


def _vector(model: Any) -> torch.Tensor:
    [layer] = steering_layers(model)
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in layer.parameters()])


@contextmanager
def no_compilation() -> Any:
    """Keep `generate` from compiling for a static cache, since compilation has a separate check."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before
