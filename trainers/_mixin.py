"""What the three trainers add to their parents."""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, set_seed

from ..adapters import SteeringVectorConfig, SteeringVectorLayer, steering_layers
from ..adapters.blocks import text_config
from ..adapters.card import Card
from ..adapters.observing import untouched
from ..losses import Loss, Staged, get_loss, parts
from ._announce import Announcement, say_what_is_trained
from ._at import ModelAt, prompt_of, scaled
from ._batch import Batch
from ._card import write_trainer_card
from ._checks import (
    check_best,
    check_chat_template,
    check_layers,
    check_own,
    check_packing,
    check_partners,
    check_reference,
    check_strengths,
    check_teacher,
    check_view_rows,
    check_views,
    each,
    packs,
    warn_router,
)
from ._data import PAIR_FORMATS, DataError, as_python, check_rows, check_tokens, warn_cut
from ._guard import FiniteSteps, check_finite
from ._host import KeepsHost, unpacked, waits
from ._metrics import Metrics, evaluation_loss, means
from ._parents import ParentsMetrics, parents_loss, parents_mean
from ._rates import (
    agree_on_units,
    check_optimizer,
    check_rate,
    group_vectors,
    take_units_of,
    trained_vectors,
    vector_rate,
)
from ._reference import add_reference, reference_copy, reference_of
from ._resume import (
    CheckpointError,
    Checksums,
    RestoredAdapter,
    check_adapter_in,
    check_checkpoint,
    check_processes,
    check_state,
    last_checkpoint,
)
from ._satisfied import Satisfied
from ._saved import check_saved
from ._sharded import whole_weights
from ._start import fill_missing_vectors
from ._vitals import VectorVitals
from .arguments import check_arguments, check_ranges
from .biases import Bias, BiasError, get_bias
from .biases._base import Biased
from .prefix import FrozenPrefix
from .prefix.decoder import base_of
from .prefix.frozen import CachedPrefix
from .spikes import LossSpikes
from .views import View, Views, get_view

DEFAULT: Any = type("Default", (), {"__repr__": lambda self: "SteeringVectorConfig()"})()
"""`peft_config` left out: a default `SteeringVectorConfig()`, unless the model already is a `PeftModel`."""


class SteeringMixin(Trainer):
    """A Trainer that trains steering vectors (or any PEFT adapter) with any loss of `steertune.losses`.

    Everything goes through documented methods of `Trainer`; with `peft_config=None` and no loss it is its parent.

    Args:
        peft_config: The adapter to train. Left out: `SteeringVectorConfig()`, or nothing if the model already is a
            `PeftModel`. None: no adapter (full finetuning).
        loss: A loss by name, a `Loss` object, or None for the parent's own loss.
        vector_learning_rate: Learning rate of steering vectors, in units of the residual stream (see
            `adapters/units.py`; 1e-4 to 1e-3 are usual, as for LoRA). None: `learning_rate`, if it is not left at
            its class's default, else 1e-3.
        frozen_prefix: Compute what lies below the trained layers once per example (see `FrozenPrefix`). None: where it
            is exact, with 2 GB of RAM. True: the same, with a warning where it is not. A `FrozenPrefix` is shared
            with whoever else uses it. False: never.
        views: Other versions of every example, by the name a loss asks for them.
        biases: Inductive biases of the training (`trainers/biases/`): name -> options, or objects.
    """

    model: Any  # the parent's type allows None, which it is not after construction
    takes_pairs: bool | None = None
    """Whether the parent's data are preference pairs; None: it does not say."""
    card: Card = Card()
    """What the model card says of behaviour, problem, data and measurements. Set it before the adapter is saved or
    pushed; places left open say so."""
    trust_checkpoint: bool = False
    """Whether `train` may resume from a checkpoint whose pickles name code (DeepSpeed's, FSDP's; see trust.md)."""
    max_length: int | None = None
    """Where rows are cut, if not at the `max_length` of the arguments."""

    def __init__(
        self,
        *args: Any,
        peft_config: PeftConfig | None = DEFAULT,
        loss: str | Loss | None = None,
        vector_learning_rate: float | None = None,
        frozen_prefix: FrozenPrefix | bool | None = None,
        views: Mapping[str, str | View] | None = None,
        biases: Mapping[str, Mapping[str, Any]] | Sequence[str | Bias] = (),
        **kwargs: Any,
    ) -> None:
        check_own(None if peft_config is DEFAULT else peft_config, views, biases)
        check_rate(vector_learning_rate)
        self.vector_learning_rate = vector_learning_rate
        self.vectors_have_groups = False  # in the optimizer
        self._parents_loss: Loss | None = None  # of ours, where it is the parent's own
        self.loss = None if loss is None else get_loss(loss)
        parent = super().__init__
        bound = inspect.signature(parent).bind_partial(*args, **kwargs)
        given = bound.arguments
        check_ranges(given.get("args"))
        continued = isinstance(given.get("model"), PeftModel)
        self._plain = peft_config is None and loss is None and not continued
        if peft_config is DEFAULT:
            peft_config = None if continued else SteeringVectorConfig()
        self._micro_step = 0
        self.step_batches: list[dict[str, Any]] = []  # of the optimiser step at work
        self.step_loss: Tensor | float = 0.0  # of that step so far, over all processes
        self.pay_once = CachedPrefix(frozen_prefix)
        self.seat: Any = None  # this trainer's place among those of `train_together`
        self.views: Views | None = None
        self._adapter: PeftConfig | None = None  # of the models that model_init makes
        self._constructed = False
        self._reference: nn.Module | None = None  # of full finetuning, where the parent keeps none
        given_biases = biases.items() if isinstance(biases, Mapping) else [(bias, {}) for bias in biases]
        self._biases = [get_bias(bias, **options) for bias, options in given_biases]
        self._unstarted = [*self._biases]
        self._plain &= not self._biases
        if self._biases and given.get("model_init") is not None:
            raise BiasError("Biases hang on the model, and model_init makes a new one in train(): give the model.")
        if self._plain:
            parent(*bound.args, **bound.kwargs)
        else:
            self._construct(parent, bound, peft_config, views or {})

    def _construct(
        self,
        parent: Any,
        bound: inspect.BoundArguments,
        peft_config: PeftConfig | None,
        views: Mapping[str, str | View],
    ) -> None:
        """Check what is given, construct the parent around the adapter, and check what came of it.

        Args:
            parent: The parent's constructor.
            bound: Its arguments.
            peft_config: The adapter to put on the model; None: none, or one that the model has already.
            views: See the class.
        """
        given = bound.arguments
        continued = isinstance(given.get("model"), PeftModel)
        if self.loss is not None:
            check_arguments(self.loss, given)
        if given.get("data_collator") is None and given.get("formatting_func") is None:
            given |= {name: as_python(given[name]) for name in ("train_dataset", "eval_dataset") if name in given}
        raw, raw_evaluation = given.get("train_dataset"), given.get("eval_dataset")
        check_views(self.loss, views, (raw, raw_evaluation))
        check_view_rows(views, given.get("args"))
        check_reference(self.loss, peft_config)
        check_chat_template(given.get("args"), peft_config)
        self._prepare_data(given)
        adapter_values = _adapter_values(given.get("model"))
        if peft_config is not None:
            # a copy: injection writes the resolved layers into the config
            self._attach(given, copy.deepcopy(peft_config), "peft_config" in inspect.signature(parent).parameters)
        # what the user froze stays frozen: adding the reference to a model makes all its active adapters trainable
        with untouched(given["model"]) if continued else nullcontext(), reference_of(given, parent):
            if continued and peft_config is None and self.loss is not None and self.loss.reference:
                add_reference(given["model"], parent)
            parent(*bound.args, **bound.kwargs)
        self._constructed = True
        _restore(self.model, adapter_values)
        if self.loss is not None:
            self._meet(self.loss, changes_base=peft_config is None and not continued)
        else:
            self._parents_loss = parents_loss(self)
        # accelerate cannot hand the batches of one process to others with what is kept beside them
        if waits(self.args.device) and not isinstance(self.train_dataset, IterableDataset):
            self.data_collator = KeepsHost(self.data_collator)
        self._check_tokenised(raw, raw_evaluation)
        if views:
            self.views = _make_views(self, views, given.get("processing_class"))
            self._view(self.views, raw, raw_evaluation)
        self._watch()

    def _meet(self, loss: Loss, changes_base: bool) -> None:
        """Check that the model has what our loss asks for, and keep what training would take away."""
        check_strengths(loss, self.model)
        warn_router(loss, self)
        if loss.reference and changes_base:
            self._reference = reference_copy(self)
        # our loss is already an average over the whole optimiser step
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True

    def _check_tokenised(self, raw: Any, raw_evaluation: Any) -> None:
        """Refuse rows that came out of tokenisation unfit, and say what was cut."""
        check_packing(self.model, self.args)
        keeps_end = getattr(self.args, "truncation_mode", None) == "keep_end"  # it cuts prompts, never all labels
        longest = getattr(self.args, "max_length", self.max_length)
        how: Any = (None if keeps_end else longest, self.processing_class, _vocabulary(self.model))
        check_tokens(raw, self.train_dataset, *how, packed=packs(self.args))
        for before, after in zip(each(raw_evaluation), each(self.eval_dataset), strict=True):
            try:
                check_tokens(before, after, *how, packed=packs(self.args, evaluation=True))
            except DataError as error:
                raise DataError(f"In the evaluation data: {error}") from error
        warn_cut(self.train_dataset, longest, keeps_end)

    def _view(self, views: Views, raw: Any, raw_evaluation: Any) -> None:
        """Make the views of the rows as they were given; those of evaluation rows may show training rows."""
        for given, prepared, training in ((raw, self.train_dataset, None), (raw_evaluation, self.eval_dataset, raw)):
            for rows, tokenised in zip(each(given), each(prepared), strict=True):
                views.add(rows, tokenised, training)

    def _watch(self) -> None:
        """Add what is measured and checked during training."""
        self._vitals = VectorVitals()
        self._parents_metrics = ParentsMetrics(self.accelerator, getattr(self._parents_loss, "beta", 1.0))
        self.add_callback(Announcement(self))
        self.resumed: str | None = None  # checkpoint that training goes on from
        self._seen = Metrics(self.accelerator)
        self.add_callback(FiniteSteps(self))
        self.add_callback(Biased(self, self._biases))
        self._satisfied = Satisfied(self)
        self.add_callback(self._satisfied)
        self.add_callback(RestoredAdapter(self))
        self.add_callback(Checksums())

    def _prepare_data(self, given: dict[str, Any]) -> tuple[str, ...] | None:
        """Check the training data among the constructor's arguments; return their format (None: the user's own)."""
        data = given.get("train_dataset")
        own = given.get("data_collator") is not None or given.get("formatting_func") is not None
        if data is None or own:
            return None
        extra = getattr(given.get("args"), "dataset_text_field", None)
        # a template that TRL reads from a file is not there yet
        later = getattr(given.get("args"), "chat_template_path", None) is not None
        tokenizer = None if later else given.get("processing_class")
        wanted = check_rows(data, tokenizer, text_column=extra)
        held_out = given.get("eval_dataset")
        for part in each(held_out):
            if isinstance(part, Dataset) and len(part):
                check_rows(part, tokenizer, text_column=extra)
        pairs = wanted in PAIR_FORMATS
        if self.takes_pairs is not None and pairs != self.takes_pairs:
            other = "SteeringDPOTrainer" if pairs else "SteeringSFTTrainer"
            raise DataError(f"{type(self).__name__} does not train on columns {list(wanted)}; {other} does.")
        if self.loss is not None and self.loss.pairs and not pairs:
            raise DataError(
                f"{type(self.loss).__name__} compares chosen with rejected answers; the data have {list(wanted)}. "
                "Give pairs, or choose loss='cross_entropy'."
            )
        return wanted

    def _attach(self, given: dict[str, Any], config: PeftConfig, parent_attaches: bool) -> None:
        if parent_attaches:
            given["peft_config"] = config
            return
        if given.get("model") is None:
            self._adapter = config  # for every model that model_init makes
            return
        if isinstance(given["model"], PeftModel):
            raise ValueError("The model already has an adapter: leave peft_config out to train it.")
        set_seed(given["args"].seed if given.get("args") is not None else 42)
        given["model"] = get_peft_model(given["model"], config)

    # -- training -----------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, after computing an initial direction that needs data."""
        if not self._plain:
            check_partners(self.loss, self.args, self.train_dataset, self.eval_dataset)
            check_best(self.args, self.model)
            asked = kwargs.pop("resume_from_checkpoint", args[0] if args else None)
            self.resumed, args = self._checkpoint(asked), args[1:]
            kwargs["resume_from_checkpoint"] = self.resumed
            if self.model_init is None:  # else the parent makes the model first
                self._begin()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LossSpikes):
                    callback.trainer = self
        elif self.is_world_process_zero() and self.model is not None:
            say_what_is_trained(self.model)
        with ExitStack() as stack:
            for bias in self._biases:
                stack.enter_context(bias.during(self))
            if not self._plain and self.model_init is None:
                self._settle()
            return super().train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As the parent's, with the adapter. In `train` (every trial of a search), it starts as a given model does."""
        model: Any = super().call_model_init(trial)
        if self._adapter is not None:
            model = get_peft_model(model, copy.deepcopy(self._adapter))
        if not self._plain and self._constructed:
            self.model = model
            if self._reference is not None:
                self._reference = reference_copy(self)
            self._begin()
            self._settle()
        return model

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the parent's. The objective left out is the evaluation loss: the parent's would be the sum of all else
        that is measured, margins and accuracies, which are better when they are higher."""
        if compute_objective is None and not self._plain and self.compute_metrics is None:
            compute_objective = evaluation_loss
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    def _begin(self) -> None:
        """Start the vectors, and note what training is measured against."""
        self.initialise_vectors()
        self._seen.restart()
        if self.args.logging_strategy != "no":
            with self._before_deepspeed():
                self._vitals.start(self)

    def _settle(self) -> None:
        """Find what stays constant in the model from now on."""
        check_layers(self.loss, self.model)
        self.pay_once.start(self, training=True, whole_rows=any(bias.whole_rows for bias in self._biases))

    def _checkpoint(self, asked: str | os.PathLike[str] | bool | None) -> str | None:
        """What training goes on from; True: the newest whole checkpoint.

        Raises:
            CheckpointError: it is not whole or not of this training, or there is none.
        """
        if asked is None or asked is False or asked == "":
            return None
        found = last_checkpoint(str(self.args.output_dir)) if asked is True else os.fspath(asked)
        if found is None:
            raise CheckpointError(f"{self.args.output_dir} has no whole checkpoint. Leave resume_from_checkpoint out.")
        check_checkpoint(found)
        check_processes(found, self.accelerator.num_processes, self.is_deepspeed_enabled)
        check_state(found, self)
        check_adapter_in(found, self.model)
        take_units_of(found, self.model)
        return found

    def initialise_vectors(self) -> None:
        """Compute initial vectors that need data, and let biases start, as `train` does first: activation addition
        without training."""
        _to_fp32(self.model)
        with self._before_deepspeed():
            agree_on_units(self)
            fill_missing_vectors(self)
        while self._unstarted:  # one that is refused is refused again by the next call
            self._unstarted[0].start(self)
            self._unstarted.pop(0)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, with the learning rate of vectors."""
        given = self.optimizer is not None
        if not self._plain and (vectors := trained_vectors(self.model)):
            check_optimizer(self.args, vectors, given, self.vector_learning_rate)
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self._plain and not given and trained_vectors(self.model):
            group_vectors(optimizer, self.model, vector_rate(self.args, self.vector_learning_rate).value)
            self.vectors_have_groups = True
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent's; stops on a loss that is not finite, before the optimiser uses it."""
        with nullcontext() if self._plain else self._seen.step():
            loss = super().training_step(*args, **kwargs)
        if self.seat is not None:
            self.seat.backward()
        if not self._plain:
            what = "" if self.loss is None else f" {type(parts(self.loss)[-1]).__name__}"
            everywhere: Any = self.accelerator.gather(loss.detach())
            check_finite(self, f"The loss{what}", everywhere)  # all processes stop, or none
            self.step_loss = self.step_loss + everywhere.mean()
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As the parent's, counting what our loss is averaged over: pairs, rows or tokens of the whole step."""
        self.restart_draws()
        if not self._plain and self.state.global_step >= self.state.max_steps:
            return [], None  # resumed at its end, where the parent would take one step more
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples and self.state.global_step == 0 and not self._plain:
            raise DataError("The stream gives no row to train on: it is empty, or all its rows were dropped as unfit.")
        self.step_batches, self.step_loss = [unpacked(inputs) for inputs in samples], 0.0
        loss = self.loss_at_work
        if self.loss is not None and loss is not None and samples:  # for its own loss, the parent knows
            counts = sum(self._read(inputs).count(loss.unit) for inputs in self.step_batches)
            counts = torch.as_tensor(counts, device=device)
            items = self.accelerator.gather(counts).sum()  # pyright: ignore[reportAttributeAccessIssue]
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The parent's loss, or ours: its values summed, over the number of pairs, rows or tokens of the step."""
        loss, inputs = self.loss_at_work, unpacked(inputs)
        if loss is None or (self.loss is None and (return_outputs or not _readable(inputs, loss))):
            # outputs that somebody reads are the parent's on padding too, where states that are left out are zero
            passes = self.pay_once.whole() if return_outputs else self.pay_once.on()
            with untouched(self.model), self._boundary(inputs), passes:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = self._read(inputs)
        unwrapped: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        for strength in loss.strengths[-1:]:  # refuse at the first step what only some of its draws would meet
            with scaled(unwrapped, strength):
                pass
        together = self.seat.logps if self.seat is not None and torch.is_grad_enabled() else None
        own_reference, memo = self._reference or getattr(self, "ref_model", None), self.pay_once.reference
        parents_log = None if self.loss is not None else self._parents_log()
        look = None if parents_log is None else self._parents_metrics.look
        at = ModelAt(model, unwrapped, batch, own_reference, memo, together, self.views, look)
        # blocks that are left out, or run in parts, show no states
        with self.pay_once.whole() if loss.states else self.pay_once.on(labels_only=True):
            values = loss(at, self._generator())
        if self.loss is None:
            if parents_log is not None:
                self._parents_metrics.note(parents_log, at, batch, self.model.training)
            return parents_mean(values, loss, batch, num_items_in_batch, self)
        if num_items_in_batch is None:
            num_items_in_batch, processes = batch.count(loss.unit), 1
        else:  # counted over all processes, whose gradients are then averaged
            processes = self.accelerator.num_processes
        # rows that were cut before their first label are none: 0, as the parent's
        total = values.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1) * processes
        self._seen.note(loss, values, at, batch)
        if loss.stops and self.model.training:
            self._satisfied.note(values.detach())
        if return_outputs:
            whole = Batch.read(inputs)  # the parent's outputs: of all rows, also where the loss reads chosen ones only
            with torch.no_grad(), prompt_of(unwrapped, whole), self.pay_once.whole():
                return total, model(**whole.inputs)
        return total

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As the parent's; with our loss the batch need not have `labels`."""
        inputs = unpacked(inputs)
        if self.loss is None or (not prediction_loss_only and (self.takes_pairs or "labels" in inputs)):
            with self._boundary(inputs):
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            # pairs in a Trainer, which knows none: what DPOTrainer gives of them
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss.detach(), outputs.logits, inputs["input_ids"]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the parent's, with our metrics; every evaluation draws the same random numbers."""
        loop = partial(
            super().evaluation_loop, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._plain:
            return loop()
        if not self.is_in_train:
            self.pay_once.start(self, training=False)
        if (parents_log := self._parents_log()) is not None and not self.model.training:
            parents_log.clear()  # what `predict` noted is read by no log
        # an evaluation between two micro-steps changes no draw of theirs
        before, self._micro_step = self._micro_step, 0
        try:
            with self._seen.evaluation() as values:
                output: Any = loop()
        finally:
            self._micro_step = before
        output.metrics.update(means(values, metric_key_prefix))
        return output

    def _parents_log(self) -> dict[str, list[float]] | None:
        """What the parent has noted since it last logged, in training or in evaluation as the model's mode is; None
        where it notes nothing beside the loss."""
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent's; in training with the margins at strength 1 and the state of the vectors."""
        if "loss" in logs and not self._plain:
            logs |= self._seen.logged() | self._vitals.read(self.model)
        super().log(logs, start_time)

    # -- helpers ------------------------------------------------------------------------------------------------

    def _before_deepspeed(self) -> AbstractContextManager[None]:
        """Forward passes before the parent's `train`: under ZeRO-3 nobody else gathers weights yet."""
        return whole_weights(self.model) if self.deepspeed is None else nullcontext()

    def _boundary(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Where the prompts end, for the parent's forward passes: not all of them have labels, which would say it."""
        known = not self._plain and {"labels", "completion_mask"} & set(inputs)
        return prompt_of(self.model, Batch.read(inputs)) if known else nullcontext()

    @property
    def loss_at_work(self) -> Loss | None:
        """The loss, or the one of ours that equals the parent's own; of a staged one that of this step, and after
        training the last."""
        if not isinstance(self.loss, Staged):
            return self._parents_loss if self.loss is None else self.loss
        return self.loss.stage(self.state.global_step, self.state.max_steps) if self.is_in_train else self.loss.then

    def _read(self, inputs: dict[str, Any]) -> Batch:
        loss = self.loss_at_work
        assert loss is not None
        batch = Batch.read(inputs)
        if loss.pairs and not batch.pairs:
            raise DataError(f"{type(loss).__name__} compares chosen with rejected answers; the batch has no pairs.")
        return batch if loss.pairs or not batch.pairs else batch.chosen

    def _generator(self) -> torch.Generator:
        """Random numbers of this micro-batch: the same on every process, after a resume, and in every evaluation."""
        step = self.state.global_step if self.model.training else "eval"
        key = f"{self.args.seed}/{step}/{self._micro_step}".encode()
        self._micro_step += 1
        return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's, with a model card; what was written must hold every vector in full size.

        Raises:
            IncompleteAdapterError: weights are missing from the file, or are there in part.
        """
        super().save_model(output_dir, _internal_call)
        if not self._plain and self.args.should_save:
            saved: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            folder = Path(output_dir or str(self.args.output_dir))
            check_saved(saved, folder)
            if not _internal_call:
                write_trainer_card(self, folder)

    def get_num_trainable_parameters(self) -> int:
        """As the parent's, without what the biases hold during training."""
        with ExitStack() as stack:
            for bias in self._biases:
                stack.enter_context(bias.during(self))
            return super().get_num_trainable_parameters()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the parent's, which `push_to_hub` calls, with its metadata and the text of `card`."""
        super().create_model_card(*args, **kwargs)
        if not self._plain and self.is_world_process_zero():
            write_trainer_card(self, str(self.args.output_dir), anyway=True)

    def restart_draws(self, micro_step: int = 0) -> None:
        """Let the next micro-batch draw the random numbers that number `micro_step` of the optimiser step draws."""
        self._micro_step = micro_step

    def save_last_good(self) -> str:
        """Save the model as it was before the bad step; return the folder."""
        folder = os.path.join(str(self.args.output_dir), "last-good")
        self.save_model(folder)
        return folder


def _adapter_values(model: Any) -> dict[str, Tensor]:
    """Values of the steering vectors the model came with (TRL rounds them to bf16 on a quantised base)."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, SteeringVectorLayer)
        for key, value in module.named_parameters()
    }


@torch.no_grad()
def _restore(model: nn.Module, values: dict[str, Tensor]) -> None:
    _to_fp32(model)
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def _readable(inputs: Mapping[str, Any], loss: Loss) -> bool:
    """Whether a batch says what a loss needs: a collator of the user's may not."""
    return "completion_mask" in inputs if loss.pairs else "labels" in inputs and "completion_mask" not in inputs


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model knows; None: it does not say."""
    embeddings = base_of(model).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return getattr(embeddings, "num_embeddings", None)


def _make_views(trainer: Any, views: Mapping[str, str | View], tokenizer: Any) -> Views:
    context = getattr(text_config(base_of(trainer.model)), "max_position_embeddings", None)
    tokenizer = tokenizer if tokenizer is not None else trainer.processing_class
    made = {name: get_view(view) for name, view in views.items()}
    for name, view in made.items():
        if view.teacher is not None:
            check_teacher(name, view.teacher, trainer.model)
            view.teacher.to(trainer.args.device)
    return Views(made, tokenizer, context)


def _to_fp32(model: nn.Module) -> None:
    """Steering vectors are fp32 whatever the base: a bf16 vector stops moving when its step is below 1/256 of it."""
    for layer in steering_layers(model):
        for parameter in layer.parameters():
            parameter.data = parameter.data.float()
