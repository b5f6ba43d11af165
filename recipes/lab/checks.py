"""Checks of an arm before its model is loaded, so that a wrong layer does not cost a download of weights.

    check_start(arm, train)       # the arm's own training arguments, and its adapter on the model's skeleton
    layers = skeleton(table)      # a model without weights, made from its configuration alone

Keys, types and ranges were checked when the arm was read (`lab/arm.py`).
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from trl import DPOConfig, SFTConfig

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.blocks import find_blocks, resolve_layers
from steertune.losses import parts
from steertune.recipes.lab import embedded
from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.data import not_loaded
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients.inductive_biases import InductiveBiases
from steertune.recipes.lab.ingredients.teachers import Teachers
from steertune.recipes.lab.tables import ModelTable
from steertune.trainers.arguments import check_arguments

_INITIAL = {"steering_vector": "init", "lora": "init_lora_weights"}
"""Adapters that change nothing before they are trained, and the key that sets how they start."""


def check_start(arm: Arm, rows: Dataset) -> None:
    """Refuse an arm with invalid training arguments, or with an adapter that does not fit the model.

    Raises:
        ArmError: the message names the value.
    """
    check_loss(arm, rows)
    check_training(arm, DPOConfig if "chosen" in rows.column_names else SFTConfig)
    check_trains(arm)
    check_adapters([arm])


def check_loss(arm: Arm, rows: Dataset) -> None:
    """Refuse a loss or an init that needs something the examples or the adapter lack.

    Raises:
        ArmError: rejected answers are missing, or the adapter has no strength.
    """
    loss, config, columns = arm.loss_object(), arm.peft_config(), rows.column_names
    start = config.init if isinstance(config, SteeringVectorConfig) else "zeros"
    if "completion" in columns and "rejected" not in columns:
        missing = f"data.name={arm.data.name!r} has no rejected answers (columns {columns})."
        if loss is not None and loss.needs.pairs:
            raise ArmError(
                f"loss.name={arm.loss['name']!r} compares chosen with rejected answers, and {missing} Add a column "
                "`rejected`, or train on the answers alone: --loss.name cross_entropy."
            )
        if start not in ("zeros", "random"):
            raise ArmError(
                f"adapter.init={start!r} is computed from chosen and rejected answers, and {missing} Add a column "
                "`rejected`, or set --adapter.init zeros."
            )
    strengths = () if loss is None else loss.needs.strengths
    if strengths and not isinstance(config, SteeringVectorConfig | LoraConfig):
        raise ArmError(
            f"loss.name={arm.loss['name']!r} needs an adapter that has a strength, which adapter.type="
            f"{arm.adapter['type']!r} does not. Use a steering vector or a LoRA, or set --loss.name dpo."
        )
    if "null" in strengths and not (isinstance(config, SteeringVectorConfig) and config.form == "bias"):
        raise ArmError(
            f"loss.name={arm.loss['name']!r} removes the direction of a steering vector of form 'bias' from the "
            "states, but this adapter has none. Set --loss.suppress negative."
        )


def check_training(arm: Arm, kind: type) -> None:
    """Create the arm's training arguments once, as a check.

    Raises:
        ArmError: they cannot be created, or the loss ignores one of them.
    """
    arm.check_trainer(kind)
    # creating DeepSpeed's arguments changes how the next model is loaded
    if PartialState().distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP) or {
        "deepspeed",
        "fsdp",
    } & {*arm.trainer}:
        return
    defaults = {"bf16": False, "report_to": "none", "use_cpu": not torch.cuda.is_available()}
    try:
        with warnings.catch_warnings(action="ignore"):  # they are created again later
            args = arm.training_arguments(kind, "unused", **defaults)
            _check_reports(args.report_to)
            _check_schedule(args)
        if (loss := arm.loss_object()) is not None:
            check_arguments(loss, {"args": args})
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ArmError(f"[trainer]: {error}") from error


def _check_reports(names: list[str]) -> None:
    """Raise a ValueError for a service that training cannot report to."""
    get_reporting_integration_callbacks(names)  # refuses unknown ones
    present = [*get_available_reporting_integrations(), "azure_ml", "flyte"]  # it does not look for the last two
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"report_to={missing[0]!r}: its package is not installed. Install it, or remove report_to.")


def _check_schedule(args: Any) -> None:
    """Let PyTorch or transformers raise an error for an optimiser that is not installed, or a schedule that cannot be
    created."""
    Trainer.get_optimizer_cls_and_kwargs(args)
    get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=1,
        num_training_steps=10,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )


def check_trains(arm: Arm) -> None:
    """Refuse a run that would save an adapter which does nothing.

    Raises:
        ArmError: the learning rate is 0, or no step is trained and the adapter starts as the base model.
    """
    if arm.trainer.get("learning_rate") == 0:
        raise ArmError(
            "trainer.learning_rate=0 trains nothing. Give a rate above 0; for a direction that is not trained, set "
            "trainer.max_steps=0 and adapter.init."
        )
    kind = arm.adapter.get("type", "steering_vector")
    initial = _INITIAL.get(kind)
    if arm.trainer.get("max_steps") == 0 and initial and initial not in arm.adapter:
        raise ArmError(
            f"trainer.max_steps=0 trains nothing, and the adapter starts at zero: it would do nothing. Set "
            f"trainer.max_steps above 0, or set adapter.{initial}."
        )


def check_adapters(arms: list[Arm]) -> None:
    """Put the adapters of arms with the same model, and those of their teachers, on its skeleton.

    Raises:
        ArmError: a layer, module or rank that the model does not have.
    """
    bare = skeleton(arms[0].model)
    checked: list[Any] = []
    for arm in arms:
        if arm.adapter not in checked:
            _check_adapter(arm.peft_config(), bare, "adapter")
            checked.append(arm.adapter)
        for name, teacher in arm.get(Teachers).teachers().items():
            _check_adapter(arm.peft_config(teacher.adapter), bare, f"teachers.{name}.adapter")
        depth = len(find_blocks(bare))
        for where, layers in _layers_of(arm):
            try:
                resolve_layers(layers, depth)
            except ValueError as error:
                raise ArmError(f"[{where}]: {error}") from error


def _layers_of(arm: Arm) -> list[tuple[str, Any]]:
    """The layers that are set in the loss and in the inductive biases, each with the name of its table."""
    loss = arm.loss_object()
    layers = [] if loss is None else [("loss", getattr(part, "layers", None)) for part in parts(loss)]
    layers += [
        (f"inductive_biases.{name}", options.get("layer")) for name, options in arm.get(InductiveBiases).tables.items()
    ]
    return [(where, value) for where, value in layers if value is not None]


def skeleton(table: ModelTable) -> Any:
    """The model on the meta device, made from its configuration alone: no weights are read or downloaded.

    Raises:
        ArmError: the configuration is missing, or transformers cannot read it without running code.
    """
    config = configuration(table)
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a broken configuration can raise many kinds of errors
        raise not_loaded(table, error) from error


def configuration(table: ModelTable) -> Any:
    """The configuration of a model.

    Raises:
        ArmError: it is missing, or transformers cannot read it without running code.
    """
    name: Any = embedded.plain_copy() if table.name == "embedded" else table.name
    try:
        return AutoConfig.from_pretrained(name, revision=table.revision, trust_remote_code=False)
    except Exception as error:  # a folder without a model can raise many kinds of errors
        raise not_loaded(table, error) from error


def _check_adapter(config: PeftConfig | None, bare: Any, where: str) -> None:
    if config is None:
        return
    config.inference_mode = True  # no measurements: the model has no weights
    quiet = logging.getLogger("steertune.adapters")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            model = get_peft_model(copy.deepcopy(bare), config)
    except NotImplementedError:
        return  # a method that computes with the weights during injection
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArmError(f"[{where}]: {error}") from error
    finally:
        quiet.setLevel(level)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    saved = getattr(config, "modules_to_save", None) or []
    if missing := [name for name in saved if name.rpartition(".")[2] not in names]:
        raise ArmError(f"[{where}]: modules_to_save={saved}: the model has no module {missing[0]!r}.")
