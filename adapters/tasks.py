"""Choose PEFT's class for a model if the adapter's configuration does not name a task.

PEFT chooses the class by `task_type` alone. A configuration without a task therefore has the type AUTO, which is
mapped to a function that looks at the model and sets the type.
"""

from __future__ import annotations

from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, TaskType
from torch import nn

from .registration import AUTO

_HEADS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}
"""The endings of class names in transformers."""
_WITHOUT_PROMPTS = (*_HEADS.values(), TaskType.FEATURE_EXTRACTION)


def task_of(model: nn.Module) -> TaskType | None:
    """The task of a model; None if it is not a transformers model."""
    for end, task in _HEADS.items():
        if type(model).__name__.endswith(end):
            return task
    return TaskType.CAUSAL_LM if hasattr(model, "config") else None


def resolve_task(config: Any, model: nn.Module) -> None:
    """Set the task of a configuration that does not name one.

    Raises:
        ValueError: the task has no prompts, but `positions` depends on where a prompt ends.
    """
    if config.task_type == AUTO:
        config.task_type = task_of(model)
    if config.task_type in _WITHOUT_PROMPTS and config.positions != "all":
        raise ValueError(
            f"positions={config.positions!r}: {type(model).__name__} ({TaskType(config.task_type).value}) reads its "
            "input without a prompt and a completion. Use positions='all'."
        )


def wrap(model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> PeftModel:
    """Wrap a model for `get_peft_model` and `PeftModel.from_pretrained` if its configuration does not name a task."""
    resolve_task(peft_config, model)
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)(model, peft_config, *args, **kwargs)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING[AUTO] = wrap  # pyright: ignore[reportArgumentType]
