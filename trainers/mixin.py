"""The mixin that the three trainers add to their parents."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ..adapters import SteeringVectorConfig
from ..losses import Loss, get_loss
from .arguments import check_ranges
from .callbacks.announcement import say_what_is_trained
from .checks import check_best, check_layers, check_partners, check_types
from .construction import DEFAULT, Construction, check_data, former_biases, make_biases
from .evaluation_mixin import EvaluationMixin
from .inductive_biases import Bias
from .initial_vectors import fill_missing_vectors, to_fp32
from .parallel import whole_weights
from .prefix import FrozenPrefix
from .prefix.frozen import CachedPrefix
from .rates import agree_on_units, check_rate
from .reference import reference_copy
from .views import View


class SteeringMixin(EvaluationMixin):
    """A Trainer that trains steering vectors (or any PEFT adapter) with any loss of `steertune.losses`.

    Everything goes through documented methods of `Trainer`; with `peft_config=None` and no loss it is its parent.

    Args:
        peft_config: The adapter to train. Left out: `SteeringVectorConfig()`, or nothing if the model already is a
            `PeftModel`. None: no adapter (full finetuning).
        loss: A loss by name, a `Loss` object, or None for the parent's own loss.
        vector_learning_rate: Learning rate of steering vectors, in units of the residual stream (see
            `adapters/units.py`; 1e-4 to 1e-3 are usual, as for LoRA). None: `learning_rate`, or 1e-3 if that is left
            at its class's default.
        frozen_prefix: Compute the layers below the trained ones only once per example (see `FrozenPrefix`). None: if
            that is exact, with 2 GB of RAM. True: the same, with a warning if it is not exact. A `FrozenPrefix` is
            shared with everything else that uses it. False: never.
        views: Other versions of every example, by the name that a loss calls `at` with.
        inductive_biases: Inductive biases of the training (`trainers/inductive_biases/`): name -> options, or objects.
    """

    def __init__(
        self,
        *args: Any,
        peft_config: PeftConfig | None = DEFAULT,
        loss: str | Loss | None = None,
        vector_learning_rate: float | None = None,
        frozen_prefix: FrozenPrefix | bool | None = None,
        views: Mapping[str, str | View] | None = None,
        inductive_biases: Mapping[str, Mapping[str, Any]] | Sequence[str | Bias] = (),
        **kwargs: Any,
    ) -> None:
        # bad arguments fail here, before the parent touches the model
        inductive_biases = former_biases(kwargs, inductive_biases)
        check_types(None if peft_config is DEFAULT else peft_config, views, inductive_biases)
        check_rate(vector_learning_rate)
        parent = super().__init__
        bound = inspect.signature(parent).bind_partial(*args, **kwargs)
        check_ranges(bound.arguments.get("args"))
        # The adapter is that of the model, the one that was given, or a default vector.
        continued = isinstance(bound.arguments.get("model"), PeftModel)
        if peft_config is DEFAULT:
            peft_config = None if continued else SteeringVectorConfig()
        # Set the attributes that the methods below read.
        self.loss = None if loss is None else get_loss(loss)
        self.vector_learning_rate = vector_learning_rate
        self.pay_once = CachedPrefix(frozen_prefix)
        self.inductive_biases = make_biases(inductive_biases, bound.arguments)
        self._unstarted_biases = [*self.inductive_biases]
        self.model_init_adapter: PeftConfig | None = None  # for the models that model_init makes during training
        self.micro_step, self.step_batches = 0, []
        # The parent's constructor calls our methods. If no option of ours is used, they do what the parent does.
        self._constructed = False
        self._plain = peft_config is None and loss is None and not continued and not self.inductive_biases
        if self._plain:
            parent(*bound.args, **bound.kwargs)
        else:
            Construction(self, parent, bound, peft_config, views or {}).run()
        self._constructed = True

    def _prepare_data(self, given: dict[str, Any]) -> tuple[str, ...] | None:
        """Check the data among the constructor's arguments; return their format (see `check_data`)."""
        return check_data(self, given)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train like the parent, after computing initial vectors that need data."""
        if self._plain:
            if self.is_world_process_zero() and self.model is not None:
                say_what_is_trained(self.model)
            return super().train(*args, **kwargs)
        check_partners(self.loss, self.args, self.train_dataset, self.eval_dataset)
        check_best(self.args, self.model)
        checkpoint = kwargs.pop("resume_from_checkpoint", args[0] if args else None)
        kwargs["resume_from_checkpoint"] = self.checkpoints.resume_from(checkpoint)
        # with model_init, the parent makes the model first and `call_model_init` does both
        if self.model_init is None:
            self._start_vectors()
        # Biases can change what is trained, so the cached prefix is determined afterwards.
        with self._biases_at_work():
            if self.model_init is None:
                self._start_prefix()
            result = super().train(*args[1:], **kwargs)
        for bias in self.inductive_biases:
            bias.finish(self)
        return result

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model like the parent, with the adapter; in `train` (every trial of a search), start its vectors."""
        model: Any = super().call_model_init(trial)
        if self.model_init_adapter is not None:
            model = get_peft_model(model, copy.deepcopy(self.model_init_adapter))
        if not self._plain and self._constructed:
            self.model = model
            if self.reference is not None:
                self.reference = reference_copy(self)
            self._start_vectors()
            self._start_prefix()
        return model

    def _start_vectors(self) -> None:
        """Compute the initial vectors, and call the callbacks before training."""
        self.initialise_vectors()
        with whole_weights(self.model) if self.deepspeed is None else nullcontext():
            for callback in self.steering_callbacks():
                callback.before_train(self)

    def _start_prefix(self) -> None:
        """Determine the part of the model that stays constant from now on, for the cached prefix."""
        check_layers(self.loss, self.model)
        whole_rows = any(bias.whole_rows for bias in self.inductive_biases)
        self.pay_once.start(self, training=True, whole_rows=whole_rows)

    def _biases_at_work(self) -> ExitStack:
        """Context in which the inductive biases are attached to the model."""
        with ExitStack() as stack:
            for bias in self.inductive_biases:
                stack.enter_context(bias.during(self))
            return stack.pop_all()

    def initialise_vectors(self) -> None:
        """Compute initial vectors that need data, and start inductive biases, as `train` does first.

        The result is activation addition without training.
        """
        to_fp32(self.model)
        # before the parent's `train`, nothing gathers the weights that ZeRO-3 shards
        with whole_weights(self.model) if self.deepspeed is None else nullcontext():
            agree_on_units(self)
            fill_missing_vectors(self)
        # If a bias raises an error, the next call starts again with that bias.
        while self._unstarted_biases:
            self._unstarted_biases[0].start(self)
            self._unstarted_biases.pop(0)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch like the parent, and show its loss to the callbacks."""
        if self._plain:
            return super().training_step(*args, **kwargs)
        with self.metrics.step():
            loss = super().training_step(*args, **kwargs)
        # With several trainers that share a forward pass, this is their joint backward pass.
        if self.joint_pass is not None:
            self.joint_pass.backward()
        # Callbacks see the losses of all processes, so that they decide the same on each.
        losses: Any = self.accelerator.gather(loss.detach())
        for callback in self.steering_callbacks():
            callback.on_micro_step(losses)
        return loss

    def get_num_trainable_parameters(self) -> int:
        """Count like the parent, without parameters that inductive biases freeze during training."""
        with self._biases_at_work():
            return super().get_num_trainable_parameters()
