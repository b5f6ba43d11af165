"""Train several arms side by side: one forward and one backward pass for all of them, on the same frozen weights."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import GradientState
from peft import PeftModel
from torch import Tensor, nn
from transformers import set_seed
from transformers.trainer_utils import TrainOutput

from ..adapters import SteeringVectorConfig, SteeringVectorLayer, steering_layers
from ..losses import Outputs, Staged, Strength
from .batch import Batch
from .callbacks.finite import NonFiniteError
from .mixin import SteeringMixin
from .model_at import token_logps
from .prefix.exactness import dropout

_COMMON = ("form", "rank", "positions", "tied")  # options that all arms must share, besides the layers


def share_weights(model: nn.Module) -> Any:
    """A copy of a model whose parameters and buffers are new objects on the same storage: it costs no memory.

    It is meant for adapters; a change of the weights themselves affects both models.
    """
    with torch.no_grad():
        parameters = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, {**parameters, **{id(b): b for b in model.buffers()}})


def train_together(trainers: Sequence[SteeringMixin]) -> list[TrainOutput | NonFiniteError]:
    """Train several steering vectors at once, each with the result of its trainer's `train()` alone, up to rounding.

    Every trainer keeps its own data, order, optimiser, schedule, clipping and callbacks. Only the passes through the
    model are shared: the batches of all arms are joined, and each row is steered by its arm's vector. Random numbers
    start from each trainer's `args.seed`. A trainer with fewer steps ends earlier. Memory grows with the number of
    arms as it does with the rows of a batch.

    Args:
        trainers: Trainers with a loss of `steertune.losses`, each on its own `PeftModel` with one steering
            vector, at the same layers and site of the same base model. They may share its weights (`share_weights`).

    Returns:
        What each `train()` returned, or the error of an arm that diverged; the others continue without it.

    Raises:
        ValueError: the trainers cannot train together; the message says why.
    """
    for i, trainer in enumerate(trainers):
        if why := _why_not(trainer, trainers[0]):
            raise ValueError(f"Trainer {i} cannot train together with trainer 0: {why}.")
    training = _JointTraining(trainers)
    threads = [threading.Thread(target=training.run, args=(arm,), daemon=True) for arm in range(len(trainers))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # such as Ctrl-C: the arms end at their next pass
        training.error = error
        for thread in threads:
            thread.join()
    if training.error is not None:
        raise training.error
    return [training.results[arm] for arm in range(len(trainers))]


def _why_not(trainer: SteeringMixin, first: SteeringMixin) -> str | None:
    """The reason why a trainer cannot train together with the first; None if it can."""
    model, other = trainer.model, first.model
    if trainer.loss is None:
        return "it has no loss of steertune.losses"
    if not isinstance(model, PeftModel) or [type(c) for c in model.peft_config.values()] != [SteeringVectorConfig]:
        return "its model has no steering vector, or also has other adapters"
    if trainer.args.gradient_checkpointing or trainer.args.torch_compile or trainer.args.world_size > 1:
        return "gradient checkpointing, torch_compile and several processes are not supported"
    if trainer.accelerator.mixed_precision != first.accelerator.mixed_precision:
        return "it uses another precision"
    if trainer.args.neftune_noise_alpha is not None or any(dropout(module) for module in model.modules()):
        return "NEFTune or dropout draws random numbers in its passes, and one pass serves all arms"
    if trainer.loss.needs.views or trainer.loss.needs.states:
        return "its loss compares views or hidden states, which need separate passes"
    if any(bias.own_passes for bias in trainer.inductive_biases):
        return "an inductive bias changes its passes"
    if isinstance(trainer.loss, Staged):
        return "its loss changes during training"
    if trainer.loss.needs.pairs != (first.loss is not None and first.loss.needs.pairs):
        return "one loss compares pairs and the other does not"
    if trainer is not first and (model is other or model.get_base_model() is other.get_base_model()):
        return "it has the same model; give each its own copy, share_weights(model)"
    if [key for key, _ in _steered(model)] != [key for key, _ in _steered(other)]:
        return f"it steers {[key for key, _ in _steered(model)]}, not {[key for key, _ in _steered(other)]}"
    [config], [first_config] = model.peft_config.values(), other.peft_config.values()
    if different := [name for name in _COMMON if getattr(config, name) != getattr(first_config, name)]:
        return f"its vector has another {different[0]}"
    # frozen weights are the same tensors, or equal ones
    weights = dict(_frozen(other))
    for name, weight in _frozen(model):
        alike = name in weights and weight.shape == weights[name].shape and weight.dtype == weights[name].dtype
        if not alike or not (weight.data_ptr() == weights[name].data_ptr() or torch.equal(weight, weights[name])):
            return f"it has another base model: {name} differs"
    return None


def _steered(model: nn.Module) -> list[tuple[str, SteeringVectorLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SteeringVectorLayer)]


def _frozen(model: nn.Module) -> list[tuple[str, Tensor]]:
    vectors = {id(p) for layer in steering_layers(model) for p in layer.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in vectors]


class _ArmPass:
    """What one arm's trainer calls instead of its own model (see `JointPass`)."""

    def __init__(self, training: _JointTraining, arm: int) -> None:
        self._training, self._arm = training, arm

    def logps(self, batch: Batch, strength: Strength) -> Outputs:
        """The arm's outputs on its batch, from the pass that all arms share; they are a leaf of the arm's graph."""
        return self._training.request(self._arm, "forward", (batch, strength))

    def backward(self) -> None:
        """Submit the gradients of `logps`; afterwards the arm's vectors have their gradients."""
        self._training.request(self._arm, "backward", None)


class _JointTraining:
    """The arms, each in its own thread; one thread runs at a time.

    An arm that requests a pass waits until all arms have requested one. Meanwhile the others run. Then the random
    state of the process is restored, so that the arm draws the same numbers as alone.
    """

    def __init__(self, trainers: Sequence[SteeringMixin]) -> None:
        self.trainers = trainers
        self.model = _joint_model([trainer.model for trainer in trainers])
        self.results: dict[int, Any] = {}
        self.error: BaseException | None = None
        self._turn = threading.Condition()
        self._running = set(range(len(trainers)))
        self._requests: dict[int, tuple[str, Any]] = {}  # arm -> which pass it waits for, and its batch and strength
        self._answers: dict[int, Any] = {}  # arm -> the result of that pass
        self._passes: list[tuple[Tensor, list[Any]]] = []  # joint outputs; rows and leaf of each arm
        self._shortcut = trainers[0].pay_once.elsewhere(self.model)
        loss = trainers[0].loss
        if self._shortcut is not None:  # rows of different arms may begin alike, but each arm has its own vector
            self._shortcut.keep_rows_apart(share_prompts=loss is not None and loss.needs.pairs)

    def run(self, arm: int) -> None:
        """Train one arm, in its thread."""
        trainer = self.trainers[arm]
        with self._turn:
            set_seed(trainer.args.seed)
            trainer.joint_pass = _ArmPass(self, arm)
            try:
                if self.error is None:
                    self.results[arm] = trainer.train()
            except NonFiniteError as error:
                self.results[arm] = error
            except BaseException as error:
                self.error = self.error or error
            finally:
                trainer.joint_pass = None
                self._running.discard(arm)
                self._run_pass()

    def request(self, arm: int, what: str, item: Any) -> Any:
        """Request a pass for an arm, and wait until all arms have requested one and it has run."""
        self._requests[arm] = (what, item)
        self._run_pass()
        if arm not in self._answers and self.error is None:
            state = _process_state()
            self._turn.wait_for(lambda: arm in self._answers or self.error is not None)
            _set_process_state(state)
        if self.error is not None:
            raise RuntimeError("Another arm failed.") from self.error
        return self._answers.pop(arm)

    def _run_pass(self) -> None:
        """Run a pass once every arm waits for one. Arms that still need a forward pass come first."""
        if self._requests.keys() != self._running or not self._running:
            return
        forward = {arm: item for arm, (what, item) in self._requests.items() if what == "forward"}
        try:
            if forward:
                self._answers |= self._forward(forward)
            else:
                self._backward()
                self._answers |= dict.fromkeys(self._requests)
        except BaseException as error:
            self.error = self.error or error
        for arm in forward or list(self._requests):
            del self._requests[arm]
        self._turn.notify_all()

    def _forward(self, requests: dict[int, tuple[Batch, Strength]]) -> dict[int, Outputs]:
        """Run the batches of arms in one pass; each arm gets a detached leaf, whose gradient comes back later."""
        batch, rows_of = _joined({arm: item[0] for arm, item in requests.items()})
        for layer in steering_layers(self.model):
            layer.strength = {_name(arm): strength for arm, (_, strength) in requests.items()}
        names = [""] * len(batch.labels)  # the adapter of each row
        for arm, rows in rows_of.items():
            for row in rows:
                names[row] = _name(arm)
        shortcut = nullcontext() if self._shortcut is None else self._shortcut.on(labels_only=True)
        with self.trainers[0].accelerator.autocast(), _row_by_row(self.model, names), shortcut:
            outputs = token_logps(self.model, self.model, batch)
        answers, leaves = {}, []
        for arm, rows in rows_of.items():
            leaf = outputs.token_logps[rows].detach().requires_grad_()  # (rows of the arm, columns)
            leaves.append((rows, leaf))
            answers[arm] = Outputs(leaf, outputs.mask[rows])
        self._passes.append((outputs.token_logps, leaves))
        return answers

    def _backward(self) -> None:
        """Send the gradients of all leaves back through the joint passes."""
        gradients = []
        for joint, leaves in self._passes:
            gradient = torch.zeros_like(joint)
            for rows, leaf in leaves:
                if leaf.grad is not None:
                    gradient[rows] = leaf.grad
            gradients.append(gradient)
        torch.autograd.backward([joint for joint, _ in self._passes], gradients)
        self._passes.clear()


def _joint_model(models: Sequence[Any]) -> Any:
    """A model on the weights of the first, whose steering layers hold the vectors of all models, by `_name`."""
    first = models[0]
    model = copy.deepcopy(first, {id(tensor): tensor for tensor in [*first.parameters(), *first.buffers()]}).train()
    for module in model.modules():
        vars(module).pop("forward", None)  # TRL's SFT puts one there that calls the model it was made for
    layers = [layer for _, layer in _steered(model)]
    for layer in layers:
        for vectors in (layer.steering_vector_v, layer.steering_vector_w, layer.steering_vector_b):
            vectors.clear()
        layer.config, layer.tied_to = {}, {}
    for arm, arm_model in enumerate(models):
        [adapter] = arm_model.peft_config
        arm_layers = [layer for _, layer in _steered(arm_model)]
        for layer, arm_layer in zip(layers, arm_layers, strict=True):
            layer.config[_name(arm)] = arm_layer.config[adapter]
            if adapter in arm_layer.tied_to:
                layer.tied_to[_name(arm)] = layers[arm_layers.index(arm_layer.tied_to[adapter])]
                continue
            for kind in arm_layer.config[adapter].parameter_names:
                name = f"steering_vector_{kind}"
                getattr(layer, name)[_name(arm)] = getattr(arm_layer, name)[adapter]
    return model


def _name(arm: int) -> str:
    return f"arm{arm}"


@contextmanager
def _row_by_row(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Context in which adapter `names[i]` steers row `i` of the batch, also in passes on a part of the batch."""

    def choose(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rows = layer.boundary.rows
        adapters = list(names) if rows is None else [names[row] for row in rows.tolist()]
        return args, {**kwargs, "adapter_names": adapters}

    handles = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in steering_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joined(batches: Mapping[int, Batch]) -> tuple[Batch, dict[int, list[int]]]:
    """Join batches, padded on the right; for pairs, all chosen answers come first.

    Returns:
        The batch, and each arm's rows in it.

    Raises:
        ValueError: a model input does not have one value per token.
    """
    pairs = next(iter(batches.values())).pairs
    width = max(batch.labels.shape[1] for batch in batches.values())
    # chosen answers of every arm, then rejected ones
    parts: list[tuple[int, slice]] = []
    for half in range(2 if pairs else 1):
        for arm, batch in batches.items():
            size = len(batch.labels) // (2 if pairs else 1)
            parts.append((arm, slice(half * size, (half + 1) * size)))
    rows: dict[int, list[int]] = {arm: [] for arm in batches}
    count = 0
    for arm, part in parts:
        size = part.stop - part.start
        rows[arm] += range(count, count + size)
        count += size

    def joined(tensors: Mapping[int, Tensor], fill: int) -> Tensor:
        wide = {arm: F.pad(tensor, (0, width - tensor.shape[1]), value=fill) for arm, tensor in tensors.items()}
        return torch.cat([wide[arm][part] for arm, part in parts])

    inputs: dict[str, Any] = {}
    for name, value in next(iter(batches.values())).inputs.items():
        values = {arm: batch.inputs.get(name) for arm, batch in batches.items()}
        if isinstance(value, Tensor):
            if any(not isinstance(v, Tensor) or v.shape != batches[arm].labels.shape for arm, v in values.items()):
                raise ValueError(
                    f"The input {name!r} does not have one value per token: these arms must train one by one."
                )
            inputs[name] = joined({arm: v for arm, v in values.items() if isinstance(v, Tensor)}, 0)
        else:
            inputs[name] = value
    return Batch(inputs, joined({arm: batch.labels for arm, batch in batches.items()}, -100), pairs), rows


def _process_state() -> tuple[Any, ...]:
    """The state of the process that a trainer changes: random numbers, and accelerate's gradient accumulation."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    accumulation = {k: [*v] if isinstance(v, list) else v for k, v in vars(GradientState()).items()}
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, accumulation


def _set_process_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda, accumulation = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    vars(GradientState()).update(accumulation)
