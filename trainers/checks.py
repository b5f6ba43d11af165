"""Refuse arguments before training that contradict each other, or that would have no effect."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from trl import DPOTrainer, SFTConfig, SFTTrainer

from ..adapters import steering_layers
from ..adapters.blocks import find_blocks, resolve_layers
from ..adapters.observing import base_model
from ..losses import Loss, parts
from .data import DataError, data_sets
from .model_at import scaled
from .types import SteeringRun
from .views import View, ViewError

logger = logging.getLogger(__name__)
_INSTRUCTION = "'instruction', text=..."


def check_types(peft_config: Any, views: Any, inductive_biases: Any) -> None:
    """Raise a TypeError for an argument of ours that has the wrong type."""
    requirements = {
        f"peft_config={peft_config!r:.100} must be a PeftConfig such as SteeringVectorConfig(), or None.": (
            isinstance(peft_config, PeftConfig | None)
        ),
        f"views={views!r:.100} must be a mapping from names to views, or None.": isinstance(views, Mapping | None),
        f"inductive_biases={inductive_biases!r:.100} must be a mapping from names to options, or a list.": (
            isinstance(inductive_biases, Mapping | Sequence) and not isinstance(inductive_biases, str)
        ),
    }
    for message, holds in requirements.items():
        if not holds:
            raise TypeError(message)


def check_layers(loss: Loss | None, model: nn.Module) -> None:
    """Raise a ValueError if a loss reads only hidden states below all trained parameters."""
    base: Any = base_model(model)
    if loss is None or not loss.needs.states:
        return
    looking = [part for part in parts(loss) if hasattr(part, "layers")]
    if not looking or any(p.requires_grad for p in base.get_input_embeddings().parameters()):
        return
    blocks = find_blocks(base)
    trained = [i for i, (_, block) in enumerate(blocks) if any(p.requires_grad for p in block.parameters())]
    lowest = min(trained, default=0)
    for part in looking:
        layers = resolve_layers(vars(part)["layers"], len(blocks))
        if max(layers) < lowest:
            raise ValueError(
                f"{type(part).__name__} reads the states of layers {layers}, but the lowest layer that is trained is "
                f"{lowest}, so it would have no effect. Use a layer from there on (layers=, or cap_layers=)."
            )


def check_reference(loss: Loss | None, config: PeftConfig | None) -> None:
    """Raise a ValueError if an adapter changes the base model itself, which then cannot be the reference."""
    bias = config.to_dict().get("bias", "none") if config is not None else "none"  # not every adapter has the option
    if loss is not None and loss.needs.reference and isinstance(bias, str) and bias != "none":
        raise ValueError(
            f"{type(config).__name__}(bias={bias!r}) trains biases of the base model, which remain when the adapter "
            f"is disabled, so the reference of {type(loss).__name__} would change too. Set bias='none'."
        )


def check_strengths(loss: Loss, model: nn.Module) -> None:
    """Raise a ValueError if the loss uses a strength that the adapter does not support."""
    for strength in loss.needs.strengths:
        with scaled(model, strength):
            pass


def check_views(loss: Loss | None, views: Mapping[str, str | View], data: Iterable[Any]) -> None:
    """Raise a ViewError if a view is missing, unused, or would be made from a stream of rows."""
    needed = () if loss is None else loss.needs.views
    if missing := [name for name in needed if name not in views]:
        kind = {"neutral": "'neutral', rows=..."}
        hints = [f"{name!r}: get_view({kind.get(name, _INSTRUCTION)})" for name in missing]
        raise ViewError(
            f"{type(loss).__name__} compares with the views {list(needed)}; {missing} are not in views=. Give them, "
            f"for example views={{{', '.join(hints)}}}."
        )
    if unused := [name for name in views if name not in needed]:
        raise ViewError(
            f"views {unused} are given, but {'the loss' if loss is None else type(loss).__name__} uses only "
            f"{list(needed)}. Leave them out, or choose the loss that compares with them."
        )
    for part in (part for argument in data for part in data_sets(argument)):
        if views and not isinstance(part, Dataset):
            raise ViewError(
                f"Views are made of all rows before training, but these are a {type(part).__name__}. Give a "
                "datasets.Dataset (load it without streaming, or Dataset.from_list([*stream]))."
            )


def check_view_rows(views: Mapping[str, str | View], args: Any) -> None:
    """Raise a ViewError if SFT mixes up the rows that views are made of one by one."""
    for name in ("packing", "padding_free", "shuffle_dataset"):
        if views and isinstance(args, SFTConfig) and getattr(args, name):
            raise ViewError(f"Views are looked up row by row, but {name}=True mixes rows. Set {name}=False.")


def check_partners(loss: Loss | None, args: Any, training: Any, evaluation: Any) -> None:
    """Raise a ValueError if `contrast='unpaired'` would meet a batch of one pair in the middle of training.

    Several processes fill up their last batches.
    """
    if loss is None or all(getattr(part, "contrast", None) != "unpaired" for part in parts(loss)):
        return
    sets = [("train", rows, args.train_batch_size) for rows in data_sets(training)]
    sets += [("eval", rows, args.eval_batch_size) for rows in data_sets(evaluation) if args.eval_strategy != "no"]
    for name, rows, size in sets:
        pairs = len(rows) if isinstance(rows, Sized) else 0  # a stream has no length
        one_left = pairs % size == 1 and not args.dataloader_drop_last and args.world_size == 1
        epoch = math.ceil(math.ceil(pairs / size) / args.gradient_accumulation_steps)  # its last step has that batch
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
        if size == 1 or (one_left and (name == "eval" or steps >= epoch)):
            raise ValueError(
                f"contrast='unpaired' takes the rejected answer of another pair of the batch, but {pairs} pairs in "
                f"batches of {size} leave one without another. Set another per_device_{name}_batch_size (2 or more) "
                "or dataloader_drop_last=True, or leave out a pair."
            )


def check_teacher(name: str, teacher: nn.Module, model: nn.Module) -> None:
    """Raise a ViewError for a teacher that is the trained model itself, or cannot be compared with it."""
    bases: list[Any] = [base_model(teacher), base_model(model)]
    if bases[0] is bases[1]:
        raise ViewError(f"View {name!r}: its teacher is the trained model itself. Give share_weights(model), adapted.")
    theirs, ours = ([*base.get_input_embeddings().weight.shape] for base in bases)
    if theirs != ours:
        raise ViewError(f"View {name!r}: its teacher's (tokens, width) are {theirs}, but the model's are {ours}.")


def packs(args: Any, evaluation: bool = False) -> bool:
    """Whether SFTConfig tells TRL to put several examples into one row."""
    if not isinstance(args, SFTConfig):
        return False
    return args.packing if not evaluation or args.eval_packing is None else args.eval_packing


def check_packing(model: nn.Module, args: Any) -> None:
    """Raise a DataError if rows would hold several prompts and a vector depends on where one ends."""
    several = {
        "packing": packs(args),
        "eval_packing": packs(args, evaluation=True),
        # DPOConfig has the argument too, but DPOTrainer pads all the same
        "padding_free": isinstance(args, SFTConfig) and args.padding_free,
    }
    for config in (config for layer in steering_layers(model) for config in layer.config.values()):
        for name in (name for name, joined in several.items() if joined and config.positions != "all"):
            raise DataError(
                f"positions={config.positions!r} needs one prompt in a row, but {name}=True puts several in. Set "
                f"{name}=False, or positions='all'."
            )


def check_chat_template(args: Any, config: PeftConfig | None) -> None:
    """Raise a ValueError if TRL would add another tokenizer's tokens, and the adapter cannot train them.

    From a tokenizer, unlike from a file, TRL also takes the tokens, and adds embeddings for them.
    """
    path = args.chat_template_path if isinstance(args, SFTConfig) else None
    is_file = path is not None and os.path.isfile(path) and path.endswith((".jinja", ".j2"))
    if path is not None and not is_file and config is not None and not hasattr(config, "trainable_token_indices"):
        raise ValueError(
            f"chat_template_path={path!r} is a tokenizer, whose tokens TRL adds and trains, but "
            f"{type(config).__name__} cannot train embeddings. Give the path of a template file (.jinja), or set "
            "tokenizer.chat_template."
        )


def check_best(args: Any, model: nn.Module) -> None:
    """Raise a ValueError if the best checkpoint could not be loaded back: the Trainer looks for `default` only."""
    name = str(model.active_adapter) if isinstance(model, PeftModel) else "default"
    if args.load_best_model_at_end and name != "default":
        raise ValueError(
            f"load_best_model_at_end=True loads the adapter 'default', but {name!r} is trained. Set it to False and "
            "load the best checkpoint yourself (trainer.state.best_model_checkpoint), or name the adapter 'default'."
        )


def warn_of_router_loss(loss: Loss, trainer: SteeringRun) -> None:
    """Warn that TRL's auxiliary loss of a mixture of experts is not part of our loss."""
    if isinstance(trainer, DPOTrainer | SFTTrainer) and trainer.aux_loss_enabled:
        logger.warning(
            "With its own loss, TRL would add %g times the router's auxiliary loss of this mixture of experts; %s is "
            "trained without it. Set router_aux_loss_coef=0.0 if that is what you want, or leave loss out.",
            *(trainer.router_aux_loss_coef, loss),
        )
