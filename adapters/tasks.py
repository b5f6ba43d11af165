"""Which class of PEFT's wraps a model whose configuration names no task: it depends on the model.

PEFT takes the class from `task_type` alone, so a configuration that names no task has the type AUTO here, which stands
for a function that looks at the model. Afterwards the configuration has the type that was found.
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
"""How the names of transformers' classes end."""
_WITHOUT_PROMPTS = (*_HEADS.values(), TaskType.FEATURE_EXTRACTION)


def task_of(model: nn.Module) -> TaskType | None:
    """The task of a model; None for one that is not transformers'."""
    for end, task in _HEADS.items():
        if type(model).__name__.endswith(end):
            return task
    return TaskType.CAUSAL_LM if hasattr(model, "config") else None


def resolve_task(config: Any, model: nn.Module) -> None:
    """Put the task of the model where a configuration names none.

    Raises:
        ValueError: the task knows no prompts, and the positions depend on where one ends.
    """
    if config.task_type == AUTO:
        config.task_type = task_of(model)
    if config.task_type in _WITHOUT_PROMPTS and config.positions != "all":
        raise ValueError(
            f"positions={config.positions!r}: {type(model).__name__} ({TaskType(config.task_type).value}) reads its "
            "input without a prompt and a completion. Use positions='all'."
        )


def wrap(model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> PeftModel:
    """What `get_peft_model` and `PeftModel.from_pretrained` make of a configuration that names no task."""
    resolve_task(peft_config, model)
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)(model, peft_config, *args, **kwargs)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING[AUTO] = wrap  # pyright: ignore[reportArgumentType]
