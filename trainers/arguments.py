"""What each field of the training arguments does with one of our losses, and which values make no sense.

With `loss=None` a field means what it means to the parent. With a loss of ours, a field that only the parent's own
loss reads would silently have no effect, so it is refused. The tables below classify every field of
`TrainingArguments`, `SFTConfig` and `DPOConfig`; a test compares them with the installed versions, and
names a new field when it fails.

| class | with a loss of ours |
|---|---|
| `used` | means what it means to the parent |
| `irrelevant` | means what it means to the parent, and the loss is the same with it and without |
| `refused` | belongs to the parent's own loss: refused, unless its value changes nothing |
| `matched` | belongs to the parent's own loss: refused, unless our loss does the same |
| `reference` | concerns the reference: refused, unless our loss has one |
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args

from ..losses import Loss, parts

Use = Literal["used", "irrelevant", "refused", "matched", "reference"]


def _table(**fields: str) -> dict[str, Use]:
    """Field -> its class, from one string of names per class."""
    return {name: use for use in get_args(Use) for name in fields.get(use, "").split()}


FIELDS: dict[str, dict[str, Use]] = {
    "TrainingArguments": _table(
        used="""
            per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
            warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
            optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
            activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
            torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config neftune_noise_alpha
            auto_find_batch_size ignore_data_skip full_determinism seed data_seed use_cpu accelerator_config
            parallelism_config dataloader_drop_last remove_unused_columns label_names train_sampling_strategy
            length_column_name group_by_length fsdp fsdp_config deepspeed
        """,
        irrelevant="""
            output_dir bf16_full_eval fp16_full_eval use_cache torch_empty_cache_steps logging_strategy logging_steps
            logging_first_step log_on_each_node logging_nan_inf_filter logging_dir include_num_input_tokens_seen
            include_tokens_per_second log_level log_level_replica disable_tqdm report_to run_name project
            trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
            per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
            eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model
            save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token
            hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
            metric_for_best_model greater_is_better restore_callback_states_from_checkpoint dataloader_num_workers
            dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
            dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb
            ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics do_train do_eval
            do_predict resume_from_checkpoint local_rank
        """,
        refused="label_smoothing_factor average_tokens_across_devices",
    ),
    "SFTConfig": _table(
        used="""
            model_init_kwargs trust_remote_code chat_template_path dataset_text_field dataset_kwargs eos_token
            max_length truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of
            completion_only_loss assistant_only_loss activation_offloading pad_token
        """,
        irrelevant="dataset_num_proc eval_packing",
        refused="router_aux_loss_coef",
        matched="loss_type",
    ),
    "DPOConfig": _table(
        used="""
            model_init_kwargs trust_remote_code disable_dropout max_length truncation_mode pad_to_multiple_of
            activation_offloading pad_token
        """,
        irrelevant="dataset_num_proc padding_free",
        refused="""
            router_aux_loss_coef loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing
            use_weighting discopop_tau sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
        """,
        matched="beta loss_type",
        reference="precompute_ref_log_probs precompute_ref_batch_size",
    ),
}
"""Configuration -> its fields and their classes, in all supported versions.

The fields of `TrainingArguments` belong to the other two as well."""

# values other than the default that change nothing either
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "loss_weights": ([1.0],),
    "ld_alpha": (1.0,),
    "router_aux_loss_coef": (0.0,),
    "pad_to_multiple_of": (None,),  # what "auto" becomes
}
# class of our loss -> the type of TRL's own loss that equals it
_LOSS_TYPES = {"DPO": "sigmoid", "IPO": "ipo", "CrossEntropy": "nll"}


def _from(low: float, high: float) -> Callable[[float], bool]:
    return lambda value: low <= value <= high


# field -> a test for the numbers that make sense, and their description
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (
        lambda value: 0 < value < math.inf,
        "a finite number above 0 (a negative one trains in the wrong direction)",
    ),
    "label_smoothing": (
        lambda value: 0 <= value < 0.5,
        "from 0 to below 0.5 (it is the share of pairs whose answers are swapped)",
    ),
    "label_smoothing_factor": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "loss_weights": (lambda value: 0 <= value < math.inf, "finite numbers of 0 or more, not all of them 0"),
    "ld_alpha": (_from(0, 1), "from 0 to 1"),
    "f_alpha_divergence_coef": (lambda value: abs(value) <= sys.float_info.max, "a finite number"),
    "discopop_tau": (lambda value: 0 < value < math.inf, "a finite number above 0"),
    "ref_model_mixup_alpha": (_from(0, 1), "from 0 to 1"),
    "ref_model_sync_steps": (lambda value: 1 <= value < math.inf, "1 or more"),
    "router_aux_loss_coef": (lambda value: 0 <= value < math.inf, "a finite number of 0 or more"),
    "neftune_noise_alpha": (lambda value: 0 <= value < math.inf, "a finite number of 0 or more"),
    "max_grad_norm": (lambda value: (value == value and value < 2**63) or value == math.inf, "a number"),
    "max_length": (lambda value: 1 <= value < math.inf, "1 or more, or None (rows are not cut)"),
    "max_steps": (lambda value: value == -1 or 0 <= value < 2**31, "a whole number from 0, or -1 (num_train_epochs)"),
    "num_train_epochs": (lambda value: 0 < value < math.inf, "a finite number above 0"),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps", "warmup_ratio", "eval_delay"),
        (_from(0, sys.float_info.max), "a finite number of 0 or more"),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (lambda value: 0 <= value < 1, "from 0 to below 1")),
    **dict.fromkeys(
        ("logging_steps", "eval_steps", "save_steps"),
        (lambda value: 0 < value < math.inf, "a finite number above 0"),
    ),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "precompute_ref_batch_size",
            "dataset_num_proc",
            "dataloader_prefetch_factor",
            "torch_empty_cache_steps",
            "pad_to_multiple_of",
            "ddp_timeout",
        ),
        (_from(1, 2**31 - 1), "a whole number from 1"),
    ),
    **dict.fromkeys(
        ("dataloader_num_workers", "save_total_limit"), (_from(0, 2**31 - 1), "a whole number of 0 or more")
    ),
    **dict.fromkeys(("seed", "data_seed"), (_from(0, 2**32 - 1), "a whole number from 0 to 4294967295")),
}


def use_of(args: Any, name: str) -> Use:
    """The class of a field of these arguments; `used` for a field that is not in the tables."""
    for cls in type(args).__mro__:
        if name in FIELDS.get(cls.__name__, {}):
            return FIELDS[cls.__name__][name]
    return "used"


def unused_by(loss: Loss, args: Any) -> list[str]:
    """The arguments that are set but not used by this loss, because they belong to the parent's own loss.

    If the list is empty, `loss` does all that the arguments ask for. The parent's own loss then equals `loss`, if its
    type does (and if the parent adds no auxiliary loss of a mixture of experts, which no argument shows).

    Args:
        loss: A loss of ours.
        args: `TrainingArguments`, or a configuration of TRL; None for the defaults.
    """
    return [] if args is None else [name for name in changed(args) if not _does(loss, args, name)]


def changed(args: Any) -> list[str]:
    """The arguments whose value is neither the default nor another value that changes nothing."""
    names = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        neutral = [default, *_NEUTRAL.get(field.name, ())]
        # DPOConfig turns its loss type into a list
        if value not in neutral and value not in [[item] for item in neutral]:
            names.append(field.name)
    return names


def _does(loss: Loss, args: Any, name: str) -> bool:
    """Whether a loss does what an argument asks for, or the argument does not concern the loss."""
    use, value = use_of(args, name), getattr(args, name)
    if use == "reference":
        return loss.needs.reference
    if name == "average_tokens_across_devices":  # ours is always an average over all processes
        return bool(value) or args.world_size == 1
    if use == "matched":
        core = parts(loss)[-1]  # the innermost loss
        if name == "loss_type":
            return [_LOSS_TYPES.get(type(core).__name__)] == (value if isinstance(value, list) else [value])
        return value == getattr(core, name, None)
    return use != "refused"


def check_arguments(loss: Loss, given: Mapping[str, Any]) -> None:
    """Refuse arguments that belong to the parent's own loss when the loss is one of ours.

    Args:
        loss: Our loss.
        given: The arguments of the trainer's constructor.

    Raises:
        ValueError: the message names the argument.
    """
    args = given.get("args")
    for name in unused_by(loss, args):
        advice = {
            "matched": f"Give a loss object (get_loss(name, {name}=...)), or leave loss out.",
            "reference": "Leave it out, or choose a loss with a reference, such as 'dpo'.",
        }.get(use_of(args, name), "Leave it out, or leave loss out to train with the parent's loss.")
        owner = "the parent's" if name in FIELDS["TrainingArguments"] else "TRL's"
        argument = f"{type(args).__name__}.{name}={getattr(args, name)!r}"
        raise ValueError(f"{argument} belongs to {owner} own loss; {loss} does not use it. {advice}")
    if given.get("compute_loss_func") is not None:
        raise ValueError(
            f"compute_loss_func={given['compute_loss_func']!r} would not be called: the loss is {loss}. Leave one of "
            "them out, or write the function as a Loss (docs/pages/extend.md)."
        )
    if given.get("ref_model") is not None and not loss.needs.reference:
        raise ValueError(f"ref_model is given, but {loss} does not use a reference. Leave ref_model out.")


def check_ranges(args: Any, but: Collection[str] = ()) -> None:
    """Refuse values that make no sense for any loss; TRL accepts some of them, and trains in the wrong direction.

    Args:
        args: The training arguments.
        but: Fields that are not checked, because they mean something else in this configuration.

    Raises:
        ValueError: the message names the argument, its value and the allowed values.
    """
    if args is not None:
        names = [field.name for field in dataclasses.fields(args) if field.name not in but]
        check_values({name: getattr(args, name) for name in names}, type(args).__name__)


def check_values(values: Mapping[str, Any], owner: str) -> None:
    """Like `check_ranges`, for values that are not in an arguments object yet.

    Args:
        values: Field -> value.
        owner: Their owner's name in the message.

    Raises:
        ValueError: the message names the argument, its value and the allowed values.
    """
    for name, value in values.items():
        if name in _RANGES and not _makes_sense(name, value):
            raise ValueError(f"{owner}.{name}={value!r:.80} makes no sense. It must be {_RANGES[name][1]}.")


def _makes_sense(name: str, value: Any) -> bool:
    if value is None or value == "auto":  # DeepSpeed and padding choose then
        return name != "beta"
    values = value if isinstance(value, list | tuple) else [value]
    numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in values)
    return numbers and all(map(_RANGES[name][0], values)) and (name != "loss_weights" or any(values))


def check_plain(loss: Loss | None, args: Any) -> None:
    """Refuse fields of TRL's configurations in `SteeringTrainer`, whose parent reads none of them.

    Raises:
        ValueError: the message names the argument and the trainer that uses it.
    """
    for name in changed(args) if args is not None else ():
        readers = [config for config in ("SFTConfig", "DPOConfig") if name in FIELDS[config]]
        matched = loss is not None and use_of(args, name) == "matched" and _does(loss, args, name)
        if readers and not matched:
            trainers = " or ".join(f"Steering{config.removesuffix('Config')}Trainer" for config in readers)
            raise ValueError(
                f"{type(args).__name__}.{name}={getattr(args, name)!r} has no effect in SteeringTrainer, whose "
                f"arguments are TrainingArguments. Leave it out, or use {trainers}."
            )
