"""Tiny random models of every architecture, the embedded real one, and pair data."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# What the configuration classes call the sizes; every model is 4 layers deep, 32 wide, 64 tokens.
_SIZES = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
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


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def architecture(request) -> str:
    """Each architecture in turn."""
    return request.param
