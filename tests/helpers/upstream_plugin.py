"""pytest plug-in that puts LoRA (the control) and our method in place of the configurations of PEFT's own tests.

`upstream_suites.py` runs PEFT's tests with it. Nothing of upstream is edited: lists of configurations are replaced
while tests are collected, and the models asked of the hub are tiny random ones in a hub cache made by `make_cache`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from steertune.adapters import SteeringVectorConfig

LOG = "STEERTUNE_UPSTREAM_LOG"
_SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT = {"n_positions": 128}  # the GPTs call sizes by names of their own
MODELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        AutoModelForCausalLM, "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (AutoModelForCausalLM, "gpt2", _GPT),
    "hf-internal-testing/tiny-random-gpt2": (AutoModelForCausalLM, "gpt2", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (AutoModelForCausalLM, "gptj", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (AutoModelForCausalLM, "llama", {}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (AutoModelForCausalLM, "mistral", {}),
    "peft-internal-testing/tiny-dummy-qwen2": (AutoModelForCausalLM, "qwen2", {}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (AutoModelForCausalLM, "gemma3_text", {"head_dim": 8}),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        AutoModelForSequenceClassification, "bert", {}),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        AutoModelForSequenceClassification, "roberta", {}),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (AutoModelForSequenceClassification, "llama", {}),
    "peft-internal-testing/tiny-random-BertModel": (AutoModel, "bert", {}),
    "peft-internal-testing/tiny-random-RobertaModel": (AutoModel, "roberta", {}),
    "peft-internal-testing/tiny-random-DebertaModel": (AutoModel, "deberta", {}),
    "peft-internal-testing/tiny-random-DebertaV2Model": (AutoModel, "deberta-v2", {}),
}  # fmt: skip


def make_cache(folder: Path) -> None:
    """Tiny random checkpoints, laid out as the hub's cache."""
    for name, (auto, kind, changes) in MODELS.items():
        snapshot = folder / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        refs = snapshot.parent.parent / "refs"
        refs.mkdir()
        (refs / "main").write_text(snapshot.name)
        sizes = {**_SIZES, **changes}
        if "n_positions" in sizes:
            for other in ("max_position_embeddings", "num_key_value_heads", "intermediate_size"):
                del sizes[other]
        torch.manual_seed(0)
        auto.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(snapshot)


# -- who is tested --------------------------------------------------------------------------------------------------


class Ours(SteeringVectorConfig):
    """Our configuration, which also understands how PEFT's tests ask for layers and for a start with an effect."""

    def __init__(self, *args: Any, init_weights: bool = True, layers_to_transform: Any = None, **kwargs: Any) -> None:
        if not init_weights:
            kwargs["init"] = "random"
        if layers_to_transform is not None:
            kwargs["layers"] = layers_to_transform
        super().__init__(*args, **kwargs)


SUBJECTS: dict[str, tuple[type, dict[str, Any]]] = {
    "lora": (LoraConfig, {"r": 8, "lora_alpha": 32, "target_modules": None, "lora_dropout": 0.05, "bias": "none"}),
    "ours-bias": (Ours, {}),
    "ours-gated": (Ours, {"form": "gated", "layers": "all"}),
    "ours-lowrank": (Ours, {"form": "low_rank", "rank": 2, "layers": [1, 2]}),
}
CUSTOM: dict[str, tuple[type, dict[str, Any]]] = {
    "lora": (LoraConfig, {"target_modules": ["o_proj", "down_proj"]}),
    "lora-saved": (LoraConfig, {"target_modules": ["down_proj"], "modules_to_save": ["head"]}),
    **{name: subject for name, subject in SUBJECTS.items() if name != "lora"},
    "ours-saved": (Ours, {"modules_to_save": ["head"]}),
}
_OTHER_MODELS = re.compile("conv|_mha_|unsupported_layer")  # tests about layers that no decoder has
_LORA = {"target_modules": ["q_proj"], "init_lora_weights": False}
_OTHER = {"target_modules": ["down_proj"], "init_lora_weights": False}
TWO: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "lora-same": (LoraConfig, _LORA, _LORA),
    "lora-different": (LoraConfig, _LORA, _OTHER),
    "ours-same": (Ours, {"layers": 1, "init": "random"}, {"layers": 1, "init": "random"}),
    "ours-different": (Ours, {"layers": 1, "init": "random"}, {"layers": [2, 3], "init": "random"}),
}


class TinyDecoder(nn.Module):
    """What stands where PEFT's tests of custom models have an MLP, which has no blocks to steer: a tiny Llama.

    Maps numbers (N, T) to log-probabilities of two classes (N, 2), as that MLP does.
    """

    is_gradient_checkpointing = False

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.config = AutoConfig.for_model("llama", **_SIZES, name_or_path="TinyDecoder")
        self.name_or_path = "TinyDecoder"  # PEFT reads it from the module
        self.body = AutoModel.from_config(self.config)
        self.head = nn.Linear(self.config.hidden_size, 2)
        self.head.weight.data *= 20  # gradients as large as that MLP's, which is fed numbers up to 90
        self.dtype = torch.float32

    def get_input_embeddings(self) -> nn.Module:
        """As every model of transformers."""
        return self.body.get_input_embeddings()

    def prepare_inputs_for_generation(self, *_: Any, **__: Any) -> Any:
        """PEFT wants to see one; it generates nothing."""
        raise NotImplementedError

    def forward(self, X: torch.Tensor | None = None, input_ids: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        numbers = input_ids if X is None else X
        states = self.body(input_ids=numbers.long(), use_cache=False).last_hidden_state
        return self.head(states.mean(dim=1)).log_softmax(dim=-1)


def _decoder(model_id: str, dtype: torch.dtype | None = None) -> nn.Module:
    torch.manual_seed(0)
    return TinyDecoder().to(dtype or torch.float32)


# -- hooks ----------------------------------------------------------------------------------------------------------


def pytest_configure(config: Any) -> None:
    """Give the suite its markers, and a name that its helpers import and these tests do not use."""
    if find_spec("diffusers") is None:
        sys.modules["diffusers"] = stub = ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # pyright: ignore
    for marker in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", marker)
    transformers.logging.set_verbosity_error()


def _task(module: str) -> str:
    return {"seq_classifier": "SEQ_CLS", "feature_extraction_models": "FEATURE_EXTRACTION"}.get(module, "CAUSAL_LM")


def _cases(names: str, module: str) -> list[Any] | None:
    """What stands in place of a list of configurations that upstream gives under these argument names."""
    words = tuple(word.strip() for word in names.split(","))
    of_models = {name: (cls, {"task_type": _task(module), **kw}) for name, (cls, kw) in SUBJECTS.items()}
    two = TWO.items()
    made: dict[tuple[str, ...], list[Any]] = {
        ("config_cls", "config_kwargs"): [pytest.param(*case, id=name) for name, case in of_models.items()],
        ("test_name", "model_id", "config_cls", "config_kwargs"): [
            pytest.param(name, "TinyDecoder", *case, id=name) for name, case in CUSTOM.items()
        ],
        ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): [
            # "lora" would ask for add_weighted_adapter, which is LoRA's own
            pytest.param(name, "any", *case, id=name) for name, case in two
        ],
        ("test_name", "config0", "config1"): [
            pytest.param(name, cls(**first), cls(**second), id=name) for name, (cls, first, second) in two
        ],
        ("config_class", "mandatory_kwargs"): [
            pytest.param(LoraConfig, {}, id="lora"), pytest.param(SteeringVectorConfig, {}, id="ours"),
        ],
    }  # fmt: skip
    return made.get(words)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: Any) -> None:
    """Put LoRA and ours in place of upstream's configurations; what is about one method alone stays as it is."""
    module = metafunc.module.__name__.rpartition(".test_")[2]
    for mark in metafunc.definition.iter_markers("parametrize"):
        cases, values = _cases(mark.args[0], module), mark.args[1]
        # a list for one method only (LoRA with rank patterns, prompts, ...) is shorter
        if cases and (len(values) > 8 or "config0" in mark.args[0]) and not any("ours" in str(v) for v in values):
            object.__setattr__(mark, "args", (mark.args[0], cases))  # pytest's mark is frozen


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests that are given a subject; lend the suite its models."""
    kept = [item for item in items if subject_of(item.name) and not _OTHER_MODELS.search(item.name)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES.update(dict.fromkeys(MODELS, 0))  # pyright: ignore
        if name.endswith("test_custom_models"):
            module.MLP = TinyDecoder  # pyright: ignore
            module.MockTransformerWrapper.from_pretrained = staticmethod(_decoder)  # pyright: ignore
        if name.endswith(("testing_common", "test_custom_models")):
            # upstream's own way for methods that cannot merge, from a list of their names
            module._skip_if_merging_not_supported = _skip_merging  # pyright: ignore


def _skip_merging(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
    if issubclass(config_cls, SteeringVectorConfig):
        pytest.skip("merging is refused: no weight of most architectures can take a constant in the residual stream")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """Lift the skips that name the methods which can mix adapters in a batch, or Conv1D: ours can."""
    modules = [m for n, m in sys.modules.items() if n.endswith("testing_common") and hasattr(m, "PeftCommonTester")]
    names = {"_skip_if_conv1d_not_supported": lambda *_: None}
    if "mixed_adapter_batches" in item.name:
        names["LoraConfig"] = Ours
    with pytest.MonkeyPatch.context() as patch:
        for module in [*modules, item.module] if "ours" in item.name else []:
            for name, value in names.items():
                patch.setattr(module, name, value, raising=False)
        yield


def subject_of(name: str) -> str | None:
    """Which subject a test of this name is given."""
    inside = name.partition("[")[2].rstrip("]")
    found = [subject for subject in (*SUBJECTS, *CUSTOM, *TWO, "ours") if f"-{subject}-" in f"-{inside}-"]
    return max(found, key=len, default=None)


def pytest_runtest_logreport(report: Any) -> None:
    """One line a test, for the table."""
    if report.when == "call" or report.outcome != "passed":
        why = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr or "")
        crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", why)
        with open(os.environ[LOG], "a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, crash[:400]]) + "\n")
