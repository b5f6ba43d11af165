"""Train several arms side by side: one forward and one backward pass for all of them, over the same frozen weights."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from ._at import token_logps
from ._batch import Batch
from ._guard import NonFiniteError
from ._mixin import SteeringMixin
from .prefix.exactness import dropout

_SAME = ("form", "rank", "positions", "tied")  # what arms must have in common beside the layers; see `_steered`


def share_weights(model: nn.Module) -> Any:
    """A copy of a model whose parameters and buffers are new objects on the same storage: it costs no memory.

    For adapters beside the weights; what changes the weights themselves changes them in both.
    """
    with torch.no_grad():
        known = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, {**known, **{id(b): b for b in model.buffers()}})


def train_together(trainers: Sequence[SteeringMixin]) -> list[TrainOutput | NonFiniteError]:
    """Train several steering vectors at once, as each trainer's `train()` would alone, within float rounding.

    Every trainer keeps its own data, order, optimiser, schedule, clipping and callbacks. Only the passes through the
    model are one: the batches of all arms are put together, and each row is steered by its arm's vector. Random
    numbers start from each trainer's `args.seed`. A trainer with fewer steps ends earlier. Memory grows with the arms
    as it does with the rows of a batch.

    Args:
        trainers: Trainers with a loss of `steertune.losses`, each on a `PeftModel` of its own with one steering
            vector, at the same layers and site of the same base model. They may share its weights (`share_weights`).

    Returns:
        What each `train()` returned, or the error of an arm that diverged; the others go on without it.

    Raises:
        ValueError: trainers that cannot be put together; the message says why.
    """
    for i, trainer in enumerate(trainers):
        if why := _apart(trainer, trainers[0]):
            raise ValueError(f"Trainer {i} cannot train together with trainer 0: {why}.")
    team = _Team(trainers)
    threads = [threading.Thread(target=team.run, args=(arm,), daemon=True) for arm in range(len(trainers))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # such as Ctrl-C: the arms end where they meet next
        team.error = error
        for thread in threads:
            thread.join()
    if team.error is not None:
        raise team.error
    return [team.results[arm] for arm in range(len(trainers))]


def _apart(trainer: SteeringMixin, first: SteeringMixin) -> str | None:
    """Why a trainer cannot be put together with the first."""
    model, other = trainer.model, first.model
    if trainer.loss is None:
        return "it has no loss of steertune.losses"
    if not isinstance(model, PeftModel) or [type(c) for c in model.peft_config.values()] != [SteeringVectorConfig]:
        return "its model has no steering vector, or other adapters beside it"
    if trainer.args.gradient_checkpointing or trainer.args.torch_compile or trainer.args.world_size > 1:
        return "gradient checkpointing, compiled graphs and several processes run their models in their own way"
    if trainer.accelerator.mixed_precision != first.accelerator.mixed_precision:
        return "it computes in another precision"
    if trainer.args.neftune_noise_alpha is not None or any(dropout(module) for module in model.modules()):
        return "NEFTune or dropout draws random numbers in its passes, of which there is one for all arms"
    if trainer.loss.views or trainer.loss.states:
        return "its loss compares views or hidden states, each in a pass of its own"
    if isinstance(trainer.loss, Staged):
        return "its loss changes during the training"
    if trainer.loss.pairs != (first.loss is not None and first.loss.pairs):
        return "one loss compares pairs and the other does not"
    if trainer is not first and (model is other or model.get_base_model() is other.get_base_model()):
        return "it has the same model; give it one of its own, share_weights(model)"
    if [key for key, _ in _steered(model)] != [key for key, _ in _steered(other)]:
        return f"it steers {[key for key, _ in _steered(model)]}, not {[key for key, _ in _steered(other)]}"
    [own], [their] = model.peft_config.values(), other.peft_config.values()
    if different := [name for name in _SAME if getattr(own, name) != getattr(their, name)]:
        return f"its vector has another {different[0]}"
    theirs = dict(_frozen(other))
    for name, weight in _frozen(model):
        same = name in theirs and weight.shape == theirs[name].shape and weight.dtype == theirs[name].dtype
        if not same or not (weight.data_ptr() == theirs[name].data_ptr() or torch.equal(weight, theirs[name])):
            return f"its base model is another: {name} differs"
    return None


def _steered(model: nn.Module) -> list[tuple[str, SteeringVectorLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SteeringVectorLayer)]


def _frozen(model: nn.Module) -> list[tuple[str, Tensor]]:
    own = {id(p) for layer in steering_layers(model) for p in layer.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in own]


class _Seat:
    """One arm's place in a team: what its trainer calls instead of its own model."""

    def __init__(self, team: _Team, arm: int) -> None:
        self._team, self._arm = team, arm

    def logps(self, batch: Batch, strength: Strength) -> Outputs:
        """The arm's outputs on its batch, of the pass that all arms share; a leaf of its graph."""
        return self._team.meet(self._arm, "forward", (batch, strength))

    def backward(self) -> None:
        """Hand in the gradients of `logps`; afterwards the arm's vectors have theirs."""
        self._team.meet(self._arm, "backward", None)


class _Team:
    """The arms, each in a thread of its own. One runs at a time: whoever waits for the others hands on, and finds its
    process as it left it, so an arm sees what it would see alone."""

    def __init__(self, trainers: Sequence[SteeringMixin]) -> None:
        self.trainers = trainers
        self.host = _host([trainer.model for trainer in trainers])
        self.results: dict[int, Any] = {}
        self.error: BaseException | None = None
        self._turn = threading.Condition()
        self._running = set(range(len(trainers)))
        self._asked: dict[int, tuple[str, Any]] = {}
        self._given: dict[int, Any] = {}
        self._passes: list[tuple[Tensor, list[Tensor]]] = []  # joint outputs, and the arms' leaves
        self._shortcut = trainers[0].pay_once.elsewhere(self.host)
        loss = trainers[0].loss
        if self._shortcut is not None:  # rows of different arms may begin alike: each has its own vector
            self._shortcut.keep_rows_apart(share_prompts=loss is not None and loss.pairs)

    def run(self, arm: int) -> None:
        """The body of an arm's thread."""
        trainer = self.trainers[arm]
        with self._turn:
            set_seed(trainer.args.seed)
            trainer.seat = _Seat(self, arm)
            try:
                if self.error is None:
                    self.results[arm] = trainer.train()
            except NonFiniteError as error:
                self.results[arm] = error
            except BaseException as error:
                self.error = self.error or error
            finally:
                trainer.seat = None
                self._running.discard(arm)
                self._work()

    def meet(self, arm: int, what: str, item: Any) -> Any:
        """Wait until all arms ask for something, and for the pass that gives it."""
        self._asked[arm] = (what, item)
        self._work()
        if arm not in self._given and self.error is None:
            state = _process_state()
            self._turn.wait_for(lambda: arm in self._given or self.error is not None)
            _set_process_state(state)
        if self.error is not None:
            raise RuntimeError("Another arm failed.") from self.error
        return self._given.pop(arm)

    def _work(self) -> None:
        """Run the pass that everybody waits for, if everybody does. An arm that is a pass behind comes first."""
        if self._asked.keys() != self._running or not self._running:
            return
        behind = {arm: item for arm, (what, item) in self._asked.items() if what == "forward"}
        try:
            if behind:
                self._given |= self._forward(behind)
            else:
                self._backward()
                self._given |= dict.fromkeys(self._asked)
        except BaseException as error:
            self.error = self.error or error
        for arm in behind or list(self._asked):
            del self._asked[arm]
        self._turn.notify_all()

    def _forward(self, asked: dict[int, tuple[Batch, Strength]]) -> dict[int, Outputs]:
        batch, rows = _joined({arm: item[0] for arm, item in asked.items()})
        for layer in steering_layers(self.host):
            layer.strength = {_name(arm): strength for arm, (_, strength) in asked.items()}
        names = [""] * len(batch.labels)
        for arm, own in rows.items():
            for row in own:
                names[row] = _name(arm)
        with self.trainers[0].accelerator.autocast(), _row_by_row(self.host, names), self._on():
            outputs = token_logps(self.host, self.host, batch)
        found, leaves = {}, []
        for arm, own in rows.items():
            leaf = outputs.token_logps[own].detach().requires_grad_()
            leaves.append((own, leaf))
            found[arm] = Outputs(leaf, outputs.mask[own])
        self._passes.append((outputs.token_logps, leaves))
        return found

    def _on(self) -> AbstractContextManager[None]:
        return nullcontext() if self._shortcut is None else self._shortcut.on(labels_only=True)

    def _backward(self) -> None:
        gradients = []
        for joint, leaves in self._passes:
            gradient = torch.zeros_like(joint)
            for rows, leaf in leaves:
                if leaf.grad is not None:
                    gradient[rows] = leaf.grad
            gradients.append(gradient)
        torch.autograd.backward([joint for joint, _ in self._passes], gradients)
        self._passes.clear()


def _host(models: Sequence[Any]) -> Any:
    """A model on the weights of the first, in whose steering layers the vectors of all models are, by `_name`."""
    first = models[0]
    host = copy.deepcopy(first, {id(tensor): tensor for tensor in [*first.parameters(), *first.buffers()]}).train()
    for module in host.modules():
        vars(module).pop("forward", None)  # TRL's SFT puts one there, that calls the model it was made for
    layers = [layer for _, layer in _steered(host)]
    for layer in layers:
        for vectors in (layer.steering_vector_v, layer.steering_vector_w, layer.steering_vector_b):
            vectors.clear()
        layer.config, layer.tied_to = {}, {}
    for arm, model in enumerate(models):
        [own] = model.peft_config
        theirs = [layer for _, layer in _steered(model)]
        for layer, their in zip(layers, theirs, strict=True):
            layer.config[_name(arm)] = their.config[own]
            if own in their.tied_to:
                layer.tied_to[_name(arm)] = layers[theirs.index(their.tied_to[own])]
                continue
            for kind in their.config[own].parameter_names:
                name = f"steering_vector_{kind}"
                getattr(layer, name)[_name(arm)] = getattr(their, name)[own]
    return host


def _name(arm: int) -> str:
    return f"arm{arm}"


@contextmanager
def _row_by_row(host: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Row `i` of the batch is steered by adapter `names[i]`, also in passes that see a part of the batch."""

    def choose(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rows = layer.boundary.rows
        seen = list(names) if rows is None else [names[row] for row in rows.tolist()]
        return args, {**kwargs, "adapter_names": seen}

    handles = [layer.register_forward_pre_hook(choose, with_kwargs=True) for layer in steering_layers(host)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joined(batches: Mapping[int, Batch]) -> tuple[Batch, dict[int, list[int]]]:
    """One batch of all, padded on the right, and each arm's rows in it. Of pairs, all chosen answers come first.

    Raises:
        ValueError: a model input that is not one value a token.
    """
    pairs = next(iter(batches.values())).pairs
    width = max(batch.labels.shape[1] for batch in batches.values())
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
                raise ValueError(f"The input {name!r} is not one value a token: these arms must train one by one.")
            inputs[name] = joined({arm: v for arm, v in values.items() if isinstance(v, Tensor)}, 0)
        else:
            inputs[name] = value
    return Batch(inputs, joined({arm: batch.labels for arm, batch in batches.items()}, -100), pairs), rows


def _process_state() -> tuple[Any, ...]:
    """What a trainer finds in its process and changes: random numbers, and where accelerate is in accumulating."""
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
