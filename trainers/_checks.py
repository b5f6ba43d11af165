"""What a trainer refuses before anything is trained: arguments that contradict each other, or change nothing."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn

from ..adapters import steering_layers
from ..adapters.blocks import find_blocks, resolve_layers
from ..losses import Loss, parts
from ._at import scaled
from ._data import DataError
from .prefix.decoder import base_of
from .views import View, ViewError

logger = logging.getLogger(__name__)


def check_own(peft_config: Any, views: Any, biases: Any) -> None:
    """Raise a TypeError for an argument of our own that is of another type."""
    wrong = {
        f"peft_config={peft_config!r:.100}: a PeftConfig such as SteeringVectorConfig(), or None": (
            isinstance(peft_config, PeftConfig | None)
        ),
        f"views={views!r:.100}: a table of names and views, or None": isinstance(views, Mapping | None),
        f"biases={biases!r:.100}: a table of names and options, or a list": (
            isinstance(biases, Mapping | Sequence) and not isinstance(biases, str)
        ),
    }
    for what, right in wrong.items():
        if not right:
            raise TypeError(f"{what} is expected.")


def check_layers(loss: Loss | None, model: nn.Module) -> None:
    """Raise a ValueError when a loss looks at hidden states below all that is trained, which nothing changes."""
    base: Any = base_of(model)
    looking = [part for part in parts(loss) if hasattr(part, "layers")] if loss is not None and loss.states else []
    if not looking or any(p.requires_grad for p in base.get_input_embeddings().parameters()):
        return
    blocks = find_blocks(base)
    trained = [i for i, (_, block) in enumerate(blocks) if any(p.requires_grad for p in block.parameters())]
    lowest = min(trained, default=0)
    for part in looking:
        found = resolve_layers(vars(part)["layers"], len(blocks))
        if max(found) < lowest:
            raise ValueError(
                f"{type(part).__name__} looks at the states of layers {found}, and the lowest layer that is trained "
                f"is {lowest}: it would change nothing. Name a layer from there on (layers=, or cap_layers=)."
            )


def check_reference(loss: Loss | None, config: PeftConfig | None) -> None:
    """Raise a ValueError when an adapter changes the base model itself, which then is no reference any more."""
    bias = getattr(config, "bias", "none")
    if loss is not None and loss.reference and isinstance(bias, str) and bias != "none":
        raise ValueError(
            f"{type(config).__name__}(bias={bias!r}) trains biases of the base model, which stay when the adapter is "
            f"switched off: the reference of {type(loss).__name__} would move along. Set bias='none'."
        )


def check_strengths(loss: Loss, model: nn.Module) -> None:
    """Raise a ValueError for a strength that the loss may ask for and the adapter does not have."""
    for strength in loss.strengths:
        with scaled(model, strength):
            pass


def check_views(loss: Loss | None, views: Mapping[str, str | View] | None, data: Iterable[Any]) -> None:
    """Raise a ViewError when the loss asks for views that nobody gave, or does not ask for those that are there, or
    when data have no rows to make them of."""
    needed = () if loss is None else loss.views
    if missing := [name for name in needed if name not in (views or {})]:
        raise ViewError(f"{type(loss).__name__} compares with the views {list(needed)}; {missing} are not in views=.")
    if unused := [name for name in views or () if name not in needed]:
        raise ViewError(
            f"views {unused} are seen by nobody: {'the loss' if loss is None else type(loss).__name__} asks for "
            f"{list(needed)}. Leave them out, or choose the loss that compares with them."
        )
    for part in (part for given in data for part in each(given)):
        if views and not isinstance(part, Dataset):
            raise ViewError(
                f"Views are made of all rows before training, and these are a {type(part).__name__}: give a "
                "datasets.Dataset (load it without streaming, or Dataset.from_list([*stream]))."
            )


def each(data: Any) -> list[Any]:
    """The data sets among an argument: none, one, or several by name."""
    return [part for part in (data.values() if isinstance(data, dict) else [data]) if part is not None]


def check_partners(loss: Loss | None, args: Any, training: Any, evaluation: Any) -> None:
    """Raise a ValueError when `contrast='unpaired'` would come to a batch of one pair, in the middle of training.

    Several processes fill their last batches up.
    """
    if loss is None or all(getattr(part, "contrast", None) != "unpaired" for part in parts(loss)):
        return
    asked = [("train", rows, args.train_batch_size) for rows in each(training)]
    asked += [("eval", rows, args.eval_batch_size) for rows in each(evaluation) if args.eval_strategy != "no"]
    for name, rows, size in asked:
        pairs = len(rows) if hasattr(rows, "__len__") else 0
        left = pairs % size == 1 and not args.dataloader_drop_last and args.world_size == 1
        epoch = math.ceil(math.ceil(pairs / size) / args.gradient_accumulation_steps)  # the last of its steps has it
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
        if size == 1 or (left and (name == "eval" or steps >= epoch)):
            raise ValueError(
                f"contrast='unpaired' takes the rejected answer of another pair of the batch, and {pairs} pairs in "
                f"batches of {size} come to one without another. Set another per_device_{name}_batch_size (2 or more) "
                "or dataloader_drop_last=True, or leave out a pair."
            )


def check_teacher(name: str, teacher: nn.Module, model: nn.Module) -> None:
    """Raise a ViewError for a teacher that cannot be compared with the model, or that is this model itself."""
    theirs, ours = (base_of(each) for each in (teacher, model))
    if theirs is ours:
        raise ViewError(f"View {name!r}: its teacher is the trained model itself. Give share_weights(model), adapted.")
    bases: list[Any] = [theirs, ours]
    sizes = [each.get_input_embeddings().weight.shape for each in bases]
    if sizes[0] != sizes[1]:
        raise ViewError(f"View {name!r}: its teacher's (tokens, width) are {[*sizes[0]]}, the model's {[*sizes[1]]}.")


def packs(args: Any, evaluation: bool = False) -> bool:
    """Whether TRL puts several examples into one row, as SFTConfig says."""
    packing = getattr(args, "packing", False)
    own = getattr(args, "eval_packing", None) if evaluation else None
    return packing if own is None else own


def check_packing(model: nn.Module, args: Any) -> None:
    """Raise a DataError when rows that hold several prompts meet vectors that depend on where one ends."""
    joined = {
        "packing": packs(args),
        "eval_packing": packs(args, evaluation=True),
        # DPOConfig has the argument, and DPOTrainer pads all the same
        "padding_free": hasattr(args, "packing") and args.padding_free,
    }
    for config in (config for layer in steering_layers(model) for config in layer.config.values()):
        for name in (name for name, several in joined.items() if several and config.positions != "all"):
            raise DataError(
                f"positions={config.positions!r} needs one prompt in a row, and {name}=True puts several there. Set "
                f"{name}=False, or positions='all'."
            )


def check_view_rows(views: Any, args: Any) -> None:
    """Raise a ViewError when the tokenised rows are not, one by one, those that views are made of."""
    for name in ("packing", "padding_free", "shuffle_dataset"):
        if views and hasattr(args, "packing") and getattr(args, name):
            raise ViewError(f"Views are found row by row, which {name}=True mixes up. Set {name}=False.")


def check_chat_template(args: Any, config: PeftConfig | None) -> None:
    """Raise a ValueError when TRL would take over the tokens of another tokenizer, and the adapter cannot train them.

    From a tokenizer, unlike a file, TRL takes its tokens too, and fills the embeddings up with further ones.
    """
    path = getattr(args, "chat_template_path", None)
    is_file = path is not None and os.path.isfile(path) and path.endswith((".jinja", ".j2"))
    if path is not None and not is_file and config is not None and not hasattr(config, "trainable_token_indices"):
        raise ValueError(
            f"chat_template_path={path!r} is a tokenizer, whose tokens TRL adds and trains, and "
            f"{type(config).__name__} cannot train embeddings. Give the path of a template file (.jinja), or set "
            "tokenizer.chat_template."
        )


def check_best(args: Any, model: nn.Module) -> None:
    """Raise a ValueError when the best checkpoint would not be loaded back: the Trainer looks for `default` only."""
    name = str(model.active_adapter) if isinstance(model, PeftModel) else "default"
    if args.load_best_model_at_end and name != "default":
        raise ValueError(
            f"load_best_model_at_end=True loads the adapter 'default', and {name!r} is trained. Set it to False and "
            "load the best checkpoint yourself (trainer.state.best_model_checkpoint), or name the adapter 'default'."
        )


def warn_router(loss: Loss, trainer: Any) -> None:
    """Say that TRL's auxiliary loss of a mixture of experts is not part of ours."""
    if getattr(trainer, "aux_loss_enabled", False):
        logger.warning(
            "With its own loss, TRL would add %g times the router's auxiliary loss of this mixture of experts; %s is "
            "trained without. Set router_aux_loss_coef=0.0 if that is what you want, or leave loss out.",
            *(trainer.router_aux_loss_coef, loss),
        )
