"""Construct a trainer: check the arguments, attach the adapter, call the parent, and check the result."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import AutoConfig, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ..adapters import SteeringVectorLayer
from ..adapters.observing import base_model, untouched
from ..losses import Loss
from .arguments import check_arguments
from .callbacks.announcement import Announcement
from .callbacks.checkpoints import Checkpoints
from .callbacks.finite import FiniteSteps
from .callbacks.inductive_biases import ApplyBiases
from .callbacks.metrics import Metrics
from .callbacks.satisfied import StopWhenSatisfied
from .callbacks.vector_stats import VectorStats
from .checks import (
    check_chat_template,
    check_packing,
    check_reference,
    check_strengths,
    check_teacher,
    check_view_rows,
    check_views,
    packs,
    warn_of_router_loss,
)
from .context import context_length
from .data import PAIR_FORMATS, TOKENISED_FORMATS, DataError, as_python, data_sets, map_data_sets
from .host_copies import KeepsHost, waits
from .inductive_biases import Bias, BiasError, get_bias
from .initial_vectors import to_fp32
from .parents import ParentsMetrics, parents_loss
from .reference import add_reference, reference_copy, reference_of
from .row_checks import TokenLimits, check_rows, check_tokenised
from .views import View, Views, get_view

InductiveBiases = Mapping[str, Mapping[str, Any]] | Sequence[str | Bias]


def former_biases(kwargs: dict[str, Any], inductive_biases: InductiveBiases) -> InductiveBiases:
    """Take `biases=`, the former name of `inductive_biases=`, out of a constructor's arguments.

    Raises:
        TypeError: both names are given.
    """
    if "biases" not in kwargs:
        return inductive_biases
    if inductive_biases:
        raise TypeError("biases= is the former name of inductive_biases=. Give only inductive_biases=.")
    warnings.warn(
        "biases= is now inductive_biases=; the former name works for one release.",
        FutureWarning,
        stacklevel=3,
    )
    return kwargs.pop("biases")


def make_biases(inductive_biases: InductiveBiases, given: Mapping[str, Any]) -> list[Bias]:
    """Make the inductive biases from names with options, or a list of names and objects.

    Raises:
        BiasError: the model is created later, by `model_init`.
    """
    pairs = inductive_biases.items() if isinstance(inductive_biases, Mapping) else [(b, {}) for b in inductive_biases]
    made = [get_bias(bias, **options) for bias, options in pairs]
    if made and given.get("model_init") is not None:
        raise BiasError("Inductive biases change the model, but model_init makes a new one in train(). Give model=.")
    return made


def check_columns(trainer: Any, columns: tuple[str, ...]) -> None:
    """Refuse pairs or single answers if the trainer, or its loss, takes the other kind.

    Raises:
        DataError: the message names the trainer or the loss to use.
    """
    loss: Loss | None = trainer.loss
    pairs = columns in PAIR_FORMATS
    if trainer.takes_pairs and pairs and columns in TOKENISED_FORMATS:
        raise DataError(
            f"Columns {list(columns)} are already tokenised, but DPOTrainer tokenises rows itself. Leave eval_dataset "
            "out, or give the rows as text."
        )
    if trainer.takes_pairs is not None and pairs != trainer.takes_pairs:
        other = "SteeringDPOTrainer" if pairs else "SteeringSFTTrainer"
        raise DataError(f"{type(trainer).__name__} does not train on columns {list(columns)}; {other} does.")
    if loss is not None and loss.needs.pairs and not pairs:
        raise DataError(
            f"{type(loss).__name__} compares chosen with rejected answers, but the data have {list(columns)}. Give "
            "pairs, or choose loss='cross_entropy'."
        )


def check_evaluation_rows(trainer: Any, data: Any) -> None:
    """Check rows that are given to `evaluate`, unless the user reads them with a collator or function of their own.

    Raises:
        DataError: they cannot be evaluated on.
    """
    if trainer.columns is None:
        return
    text_column = trainer.args.dataset_text_field if isinstance(trainer.args, SFTConfig) else None
    for part in data_sets(data):
        check_columns(trainer, check_rows(part, trainer.processing_class, text_column))


def check_data(trainer: Any, given: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Check the data among the constructor's arguments.

    Returns:
        The format of the training data; None if the user reads them with a collator or function of their own.

    Raises:
        DataError: the data cannot be trained on.
    """
    data, args = given.get("train_dataset"), given.get("args")
    if data is None or given.get("data_collator") is not None or given.get("formatting_func") is not None:
        return None
    text_column = args.dataset_text_field if isinstance(args, SFTConfig) else None
    # a chat template that TRL reads from a file is not loaded yet
    later = isinstance(args, SFTConfig) and args.chat_template_path is not None
    tokenizer = None if later else given.get("processing_class")
    columns = check_rows(data, tokenizer, text_column)
    for part in data_sets(given.get("eval_dataset")):
        if isinstance(part, Dataset) and len(part):
            check_rows(part, tokenizer, text_column)
    check_columns(trainer, columns)
    _check_end(trainer, next(iter(data)), columns, given)
    return columns


def _check_end(trainer: Any, row: Any, columns: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """Refuse plain text if the tokenizer has no EOS token, which TRL puts at the end of every answer."""
    tokenizer, args = given.get("processing_class"), given.get("args")
    text = columns not in TOKENISED_FORMATS and any(isinstance(row[column], str) for column in columns)
    named = getattr(args, "eos_token", None)  # of SFTConfig
    if (
        trainer.takes_pairs is not None
        and text
        and isinstance(tokenizer, PreTrainedTokenizerBase)
        and tokenizer.eos_token is None
        and named is None
    ):
        raise DataError(
            "The tokenizer has no EOS token, but every answer must end with one. Set tokenizer.eos_token to the token "
            "that ends a text (eos_token in the tokenizer_config.json of a model folder)."
        )


def context_of(given: Mapping[str, Any]) -> int | None:
    """The context length of the model and the tokenizer among the constructor's arguments; None if unlimited."""
    model, tokenizer = given.get("model"), given.get("processing_class")
    config = getattr(model, "config", None)
    if isinstance(model, str):  # the parent loads it
        options = getattr(given.get("args"), "model_init_kwargs", None) or {}
        config = AutoConfig.from_pretrained(model, revision=options.get("revision"))
    tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    return context_length(config if hasattr(config, "get_text_config") else None, tokenizer)


DEFAULT: Any = type("Default", (), {"__repr__": lambda self: "SteeringVectorConfig()"})()
"""An omitted `peft_config`: a default `SteeringVectorConfig()`, unless the model already is a `PeftModel`."""


class Construction:
    """The steps around the parent's constructor.

    Args:
        trainer: The trainer that is being constructed.
        parent: Its parent's constructor.
        bound: Arguments of the parent's constructor, which the steps change.
        peft_config: The adapter to attach; None to attach none, for example if the model already has one.
        views: Other versions of every example, by name.
    """

    def __init__(
        self,
        trainer: Any,
        parent: Any,
        bound: inspect.BoundArguments,
        peft_config: PeftConfig | None,
        views: Mapping[str, str | View],
    ) -> None:
        self.trainer, self.parent, self.bound, self.given = trainer, parent, bound, bound.arguments
        self.peft_config, self.view_options = peft_config, views
        self.continued = isinstance(self.given.get("model"), PeftModel)  # training continues with the model's adapter

    def run(self) -> None:
        """Construct the trainer."""
        trainer = self.trainer
        self.check_arguments()
        trainer.model_init_adapter = self.attach_adapter()
        self.call_parent()
        if trainer.loss is None:
            trainer.parents_loss = parents_loss(trainer)
        else:
            self.use_our_loss()
        self.keep_host_copies()
        self.check_tokenised()
        trainer.views = self.make_views()
        args, accelerator = trainer.args, trainer.accelerator
        trainer.parents_metrics = ParentsMetrics(accelerator, args.beta if isinstance(args, DPOConfig) else 1.0)
        trainer.metrics, trainer.checkpoints = Metrics(accelerator), Checkpoints(trainer)
        for callback in (
            Announcement(trainer),
            FiniteSteps(trainer),
            ApplyBiases(trainer, trainer.inductive_biases),
            trainer.metrics,
            VectorStats(trainer),
            StopWhenSatisfied(trainer),
            trainer.checkpoints,
        ):
            trainer.add_callback(callback)

    def check_arguments(self) -> None:
        """Refuse arguments and rows that cannot be trained on, before the parent reads them."""
        given, loss, args = self.given, self.trainer.loss, self.given.get("args")
        if loss is not None:
            check_arguments(loss, given)
        # With rows of tensors, the parents would add up token ids instead of joining them.
        if given.get("data_collator") is None and given.get("formatting_func") is None:
            names = [name for name in ("train_dataset", "eval_dataset") if name in given]
            given |= {name: map_data_sets(as_python, given[name]) for name in names}
        for bias in self.trainer.inductive_biases:
            if given.get("train_dataset") is not None:
                given["train_dataset"] = bias.training_rows(given["train_dataset"])
        self.rows, self.evaluation_rows = given.get("train_dataset"), given.get("eval_dataset")
        check_views(loss, self.view_options, (self.rows, self.evaluation_rows))
        check_view_rows(self.view_options, args)
        check_reference(loss, self.peft_config)
        check_chat_template(args, self.peft_config)
        self.cut_at_context()
        self.trainer.columns = self.trainer._prepare_data(given)

    def cut_at_context(self) -> None:
        """Lower `max_length`, where TRL cuts rows, to what the model reads; by default it is 1024 for every model."""
        given, args = self.given, self.given.get("args")
        self.context = context_of(given)
        # TRL refuses any max_length for rows that it joins without packing
        joined = isinstance(args, SFTConfig) and args.padding_free and not args.packing
        cuts = isinstance(self.trainer, SFTTrainer | DPOTrainer)  # the plain trainer's parent reads no max_length
        if self.context is None or not cuts or not isinstance(args, SFTConfig | DPOConfig) or joined:
            return
        if args.max_length is None or args.max_length > self.context:
            given["args"] = copy.copy(args)  # the user's object is not changed
            given["args"].max_length = self.context

    def attach_adapter(self) -> PeftConfig | None:
        """Attach the adapter to the model, or pass it to a parent that attaches it.

        Returns:
            The adapter's configuration, if models that `model_init` creates later need it.

        Raises:
            ValueError: the model already has an adapter.
        """
        self.vectors = _steering_vectors(self.given.get("model"))
        if self.peft_config is None:
            return None
        config = copy.deepcopy(self.peft_config)  # injection writes the resolved layers into it
        if "peft_config" in inspect.signature(self.parent).parameters:
            self.given["peft_config"] = config
            return None
        if self.given.get("model") is None:
            return config
        if self.continued:
            raise ValueError("The model already has an adapter: leave peft_config out to train it.")
        args = self.given.get("args")
        set_seed(42 if args is None else args.seed)
        self.given["model"] = get_peft_model(self.given["model"], config)
        return None

    def call_parent(self) -> None:
        """Construct the parent. Frozen parameters stay frozen, and vectors keep their values in fp32."""
        model: Any = self.given.get("model")
        loss = self.trainer.loss
        # adding the reference to a model would make all its active adapters trainable
        with untouched(model) if self.continued else nullcontext(), reference_of(self.given, self.parent):
            if self.continued and self.peft_config is None and loss is not None and loss.needs.reference:
                add_reference(model, self.parent)
            self.parent(*self.bound.args, **self.bound.kwargs)
        to_fp32(self.trainer.model)
        # TRL rounds the vectors of a quantised model to bf16
        with torch.no_grad():
            for name, value in self.vectors.items():
                self.trainer.model.get_parameter(name).copy_(value)

    def use_our_loss(self) -> None:
        """Check that the model supports our loss, and copy a reference that training would change."""
        trainer = self.trainer
        check_strengths(trainer.loss, trainer.model)
        warn_of_router_loss(trainer.loss, trainer)
        if trainer.loss.needs.reference and self.peft_config is None and not self.continued:
            trainer.reference = reference_copy(trainer)
        # our loss is already an average over the whole optimiser step
        trainer.loss_is_scaled_for_ga = trainer.model_accepts_loss_kwargs = True

    def check_tokenised(self) -> None:
        """Refuse rows that are unusable after tokenisation, and warn of rows that were truncated."""
        trainer, args = self.trainer, self.trainer.args
        check_packing(trainer.model, args)
        tokenizer = trainer.processing_class
        bos: Any = tokenizer.bos_token_id if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        cuts = isinstance(args, SFTConfig | DPOConfig)
        limits = TokenLimits(
            max_length=args.max_length if cuts else trainer.max_length,
            keeps_end=cuts and args.truncation_mode == "keep_end",
            bos=bos,
            vocabulary=_vocabulary(trainer.model),
            context=self.context,
        )
        check_tokenised(self.rows, trainer.train_dataset, limits, packs(args))
        pairs = zip(data_sets(self.evaluation_rows), data_sets(trainer.eval_dataset), strict=True)
        for given, rows in pairs:
            try:
                check_tokenised(given, rows, limits, packs(args, evaluation=True), evaluation=True)
            except DataError as error:
                raise DataError(f"In the evaluation data: {error}") from error

    def keep_host_copies(self) -> None:
        """Keep host copies of batches if the host would have to wait for the device to read them."""
        trainer = self.trainer
        # With the copies, accelerate could not send the batches of a stream from one process to the others.
        if waits(trainer.args.device) and not isinstance(trainer.train_dataset, IterableDataset):
            trainer.data_collator = KeepsHost(trainer.data_collator)

    def make_views(self) -> Views | None:
        """Make the views of all rows; the views of evaluation rows can contain training rows."""
        if not self.view_options:
            return None
        trainer = self.trainer
        tokenizer = self.given.get("processing_class")
        tokenizer = trainer.processing_class if tokenizer is None else tokenizer
        by_name = {name: get_view(view) for name, view in self.view_options.items()}
        for name, view in by_name.items():
            if view.teacher is not None:
                check_teacher(name, view.teacher, trainer.model)
                view.teacher.to(trainer.args.device)
        views = Views(by_name, tokenizer, self.context)
        for given, rows, training in (
            (self.rows, trainer.train_dataset, None),
            (self.evaluation_rows, trainer.eval_dataset, self.rows),
        ):
            for part, tokenised in zip(data_sets(given), data_sets(rows), strict=True):
                views.add(part, tokenised, training)
        return views


def _steering_vectors(model: Any) -> dict[str, Tensor]:
    """Copies of the steering vectors that a model already has."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, SteeringVectorLayer)
        for key, value in module.named_parameters()
    }


def _vocabulary(model: nn.Module) -> int | None:
    """The size of a model's vocabulary; None if its embeddings do not give it."""
    embeddings: Any = base_model(model).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
