"""pytest plug-in that puts our trainers in place of TRL's in TRL's own tests of its trainers.

`upstream_suites.py --trl FOLDER` runs the tests for every subject: as they are ("control"); with `DPOTrainer` and
`SFTTrainer` in the test modules standing for ours, and the same `peft_config` ("ours"); and with a steering vector in
place of LoRA and of full finetuning ("vector"). `RewardTrainer` stays TRL's own; there "vector" puts a steering vector
in place of LoRA. Nothing of upstream is edited. Models, tokenizers and data that the tests ask of the hub are tiny
ones made here: random weights, a byte-pair tokenizer of 1200 tokens, and 19 made-up rows in every format.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from upstream_plugin import pytest_runtest_logreport  # noqa: F401  (one line a test, as for PEFT's tests)

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import SteeringDPOTrainer, SteeringSFTTrainer

WHO = "STEERTUNE_UPSTREAM_WHO"
"""Environment variable: one of SUBJECTS."""
SUBJECTS = {"dpo_trainer": ("control", "ours", "vector"), "sft_trainer": ("control", "ours", "vector"),
            "reward_trainer": ("control", "vector")}  # fmt: skip
"""File of TRL's tests -> for whom it is run."""
FROZEN = re.compile(r"AssertionError: Parameter (?!.*steering_vector)(?!.*original_module)\S+ has not changed")
"""What a test says that asks for a change of the base's weights."""
CLASSES = ("TestDPOTrainer", "TestSFTTrainer", "TestRewardTrainer")
LEFT_OUT = re.compile("(?i)vlm|vision|vllm|liger|remote_code|quantization|padding_free$")

# -- models and tokenizers ------------------------------------------------------------------------------------------

_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
_SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 2048, "initializer_range": 0.1,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_QWEN2 = "tiny-Qwen2ForCausalLM-2.5"
# name -> model type, changes of its sizes, chat template of TRL's (None: the tokenizer has none)
MODELS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    _QWEN2: ("qwen2", {}, "qwen2_5"),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", {}, "qwen2_5"),
    "tiny-Qwen3ForCausalLM": ("qwen3", {"head_dim": 8}, "qwen3"),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {"head_dim": 8, **_EXPERTS}, "qwen3"),
    "tiny-LlamaForCausalLM-3.2": ("llama", {}, "llama3_2"),
    "tiny-GPTNeoXForCausalLM": ("gpt_neox", {}, None),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "gptoss"),
    "tiny-Cohere2ForCausalLM": ("cohere2", {}, "cohere2"),
    "tiny-Olmo3ForCausalLM": ("olmo3", {}, "qwen2_5"),
}


def make_trl_cache(folder: Path) -> None:
    """Tiny random checkpoints and their tokenizers, laid out as the hub's cache."""
    for name, (kind, changes, template) in MODELS.items():
        snapshot = _snapshot(folder, f"trl-internal-testing/{name}")
        tokenizer = _tokenizer((_TEMPLATES / f"{template}.jinja").read_text() if template else None)
        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "eos")}
        sizes = {**_SIZES, **changes, **ids, "vocab_size": len(tokenizer), "bos_token_id": None}
        classifies = "SequenceClassification" in name
        auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **sizes, **({"num_labels": 1} if classifies else {}))
        auto.from_config(config).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
    lends_template = _snapshot(folder, "Qwen/Qwen3-4B")
    AutoConfig.for_model("qwen3").save_pretrained(lends_template)
    _tokenizer((_TEMPLATES / "qwen3.jinja").read_text()).save_pretrained(lends_template)


def _snapshot(folder: Path, name: str) -> Path:
    snapshot = folder / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    return snapshot


def _tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Byte pairs, learned on the made-up rows."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, initial_alphabet=alphabet)  # pyright: ignore
    texts = [prompt + answer for prompt, answer, _ in ROWS]
    pairs.train_from_iterator([*texts, *(made.read_text() for made in _TEMPLATES.glob("qwen*.jinja"))], learner)
    made = PreTrainedTokenizerFast(tokenizer_object=pairs, pad_token=special[0], eos_token=special[2])
    made.chat_template = template
    return made


# -- data -----------------------------------------------------------------------------------------------------------

_THINGS = (
    "rain snow wind fire sand iron gold salt milk bread honey wool silk stone wood glass smoke steam chalk".split()
)
# prompt, right answer, wrong answer
ROWS = [(f"Is {a} {b}?", f" {a} is not {b}.", f" {a} equals {b}.") for a, b in zip(
    _THINGS, reversed(_THINGS), strict=True)]  # fmt: skip
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        "return": {"type": "string"},
    },
}


def _turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _columns(row: tuple[str, str, str], chat: bool, thinks: bool = False) -> dict[str, Any]:
    """Prompt, chosen and rejected answer of a row, as text or as messages."""
    prompt, chosen, rejected = row
    if not chat:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    more = {"thinking": "Let me see."} if thinks else {}
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": [_turn("user", prompt)]} | {k: [_turn("assistant", v, **more)] for k, v in answers.items()}


def _in_format(parts: dict[str, Any], kind: str, chat: bool) -> dict[str, Any]:
    """These columns in one of TRL's formats of data."""
    prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    made: dict[str, dict[str, Any]] = {
        "language_modeling": {"messages" if chat else "text": prompt + chosen},
        "prompt_only": {"prompt": prompt},
        "prompt_completion": {"prompt": prompt, "completion": chosen},
        "preference": parts,
        "implicit_prompt_preference": {"chosen": prompt + chosen, "rejected": prompt + rejected},
        "unpaired_preference": {"prompt": prompt, "completion": chosen, "label": len(str(chosen)) % 2 == 0},
    }
    return made[kind]


def _tools(parts: dict[str, Any], kind: str) -> dict[str, Any]:
    """A row in which the assistant calls a tool before it answers."""
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "rain"}}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": "look_up", "content": "wet"}]
    return {**_in_format({**parts, "prompt": parts["prompt"] + turns}, kind, chat=True), "tools": json.dumps([_TOOL])}


def load_dataset(path: str, name: str = "", split: str | None = None, streaming: bool = False) -> Any:
    """Stands in for `datasets.load_dataset`: 17 training rows and 2 test rows in the format `name` of a data set."""
    short = path.rpartition("/")[2]
    if short not in ("zen", "harmony", "toolcall"):
        pytest.skip(f"there is no stand-in for {path}")
    chat = short != "zen" or name.startswith("conversational")
    kind = re.sub("^(standard|conversational)_", "", name)
    parts = [_columns(row, chat, thinks=short == "harmony") for row in ROWS]
    rows = [_tools(part, kind) if short == "toolcall" else _in_format(part, kind, chat) for part in parts]
    whole = DatasetDict({"train": Dataset.from_list(rows[:17]), "test": Dataset.from_list(rows[17:])})
    if split is None:
        return whole
    part, _, count = split.partition("[:")
    chosen = whole[part].select(range(int(count.rstrip("]")))) if count else whole[part]
    return chosen.to_iterable_dataset() if streaming else chosen


# -- hooks ----------------------------------------------------------------------------------------------------------


class _Full:
    """Ours, where a test that gives no `peft_config` means full finetuning."""

    def __init__(self, *args: Any, peft_config: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, peft_config=peft_config, **kwargs)  # pyright: ignore


class _Vector:
    """Ours with a steering vector; training must change all of it and nothing else."""

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        result = super().train(*args, **kwargs)  # pyright: ignore
        for name, value in self.model.named_parameters():
            assert torch.equal(value, before[name]) != value.requires_grad, f"{name} is not what was to be trained"
        return result


def _vector(*_: Any, **__: Any) -> SteeringVectorConfig:
    """What stands where tests give a LoRA of any options."""
    return SteeringVectorConfig()


def names_of(module: str, subject: str) -> dict[str, Any]:
    """What is put in place of names of a test module for a subject."""
    kind = module.rpartition("test_")[2].partition("_")[0]
    mixin, names = (_Full, {}) if subject == "ours" else (_Vector, {"LoraConfig": _vector})
    trainer = {"dpo": SteeringDPOTrainer, "sft": SteeringSFTTrainer}.get(kind)  # RewardTrainer stays TRL's own
    if trainer is not None:
        name = f"{kind.upper()}Trainer"
        names[name] = type(name, (mixin, trainer), {})
    return {} if subject == "control" else names


def pytest_configure(config: Any) -> None:
    """The suite's markers stand in its pyproject.toml, which is not copied."""
    torch.set_num_threads(1)
    disable_progress_bars()
    for marker in ("slow", "low_priority", "invariant"):
        config.addinivalue_line("markers", marker)
    for file in Path("tests").glob("*.py"):
        _stand_in(file)


def _stand_in(file: Path) -> None:
    """Let a file import names that the installed TRL does not have, as the tests of another version do."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("trl."):
            continue
        with contextlib.suppress(ImportError):  # of a file that is not run
            module = import_module(node.module or "")
            for name in [alias.name for alias in node.names if not hasattr(module, alias.name)]:
                setattr(module, name, lambda *_, **__: False)  # most ask whether a package is there


@pytest.fixture
def lazy_shared_datadir() -> Path:
    """As of pytest-datadir, for tests that only read: the suite's folder of data."""
    return Path("tests/data").resolve()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests of trainers; put models, data and, for ours, trainers in place."""
    kept = [i for i in items if i.cls.__name__ in CLASSES and not LEFT_OUT.search(i.name) and _model_is_made(i.name)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for module in {item.module for item in kept}:
        names = names_of(module.__name__, os.environ[WHO])
        for name, value in {"load_dataset": load_dataset, **names}.items():
            setattr(module, name, value)


def _model_is_made(name: str) -> bool:
    asked = re.search("internal-testing/([^]]*)", name)
    return asked is None or asked[1] in MODELS
