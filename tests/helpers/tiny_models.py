"""Tiny random models of every architecture, with and without a steering vector."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from steertune.adapters import SteeringVectorConfig

# What the configuration classes call the sizes; every model is 4 layers deep, 32 wide, 64 tokens.
_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"num_key_value_heads": 4},
    "gptj": {"rotary_dim": 4},
    "falcon": {},
    "bloom": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


def tiny(model_type: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A tiny random model in eval mode, without dropout."""
    sizes = {**_SIZES, **ARCHITECTURES.get(model_type, {}), **changes}
    if model_type in ("gpt2", "gptj"):
        sizes["n_positions"] = sizes.pop("max_position_embeddings")
        sizes.pop("num_key_value_heads")
        sizes.pop("intermediate_size")
    config = AutoConfig.for_model(model_type, **sizes)
    for name in dir(config):
        if name.endswith(("dropout", "pdrop", "dropout_rate")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def quantised_tiny(bits: int, folder: Path, **sizes: int) -> Callable[[], PreTrainedModel]:
    """Loads a tiny llama in 4 or 8 bits."""
    pytest.importorskip("bitsandbytes")
    tiny(**sizes).save_pretrained(folder)

    def load() -> PreTrainedModel:
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")

    return load


def fill(model: torch.nn.Module, adapter_name: str = "default", seed: int = 1) -> None:
    """Give every parameter of a steering vector random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "steering_vector_" in name and f".{adapter_name}." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)


def steered(base: PreTrainedModel | None = None, seed: int = 1, **switches) -> PeftModel:
    """A tiny model in eval mode with a random steering vector."""
    model = get_peft_model(base or tiny(), SteeringVectorConfig(**switches))
    fill(model, seed=seed)
    return model.eval()


def vector_of(model: torch.nn.Module, adapter_name: str = "default") -> torch.Tensor:
    """The (first) write vector of an adapter: the parameter itself."""
    return next(p for n, p in model.named_parameters() if n.endswith(f"steering_vector_v.{adapter_name}.weight"))


def tokens(rows: int = 2, columns: int = 8, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, 64, (rows, columns), generator=torch.Generator().manual_seed(seed))


def of_the_prefix(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the frozen prefix has logged, of all that was."""
    return [record for record in caplog.records if ".prefix." in record.name]


def hooks_on(model: torch.nn.Module) -> int:
    """How many forward hooks and pre-hooks the model carries."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def logits(model, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """A model's logits, by default of `tokens()`."""
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **kwargs).logits
