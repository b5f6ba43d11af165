"""Steered logits of tiny models of many families, in every way they can be computed, against a plain reference.

The reference is the base model without a cache, with a hook that adds the vector to an explicit mask of tokens. Run
`python tests/helpers/families.py` to write the table of all results, `tests/helpers/families.md`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import get_peft_model
from tiny_models import ARCHITECTURES, fill, tiny, tokens, vector_of
from torch import Tensor, nn
from transformers import DynamicCache

from steertune.adapters import SteeringVectorConfig, prompt_length
from steertune.adapters.blocks import find_blocks

LAYER, PROMPT, NEW = 1, 6, 3
POSITIONS = ["all", "completion", "prompt", "last_prompt"]
TOLERANCE = 1e-4
TABLE = Path(__file__).with_name("families.md")

_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
_CONVOLUTION = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
_ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4, "mamba_d_state": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
RECURRENT: dict[str, dict] = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 4},
    "falcon_mamba": {"state_size": 4},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "head_dim": 8},
    "recurrent_gemma": {
        "num_key_value_heads": 1, "head_dim": 8, "lru_width": 32, "attention_window_size": 64,
        "block_types": ("recurrent", "recurrent", "attention"),
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xlstm": {
        "hidden_size": 64, "num_heads": 4, "num_blocks": 4, "chunk_size": 4, "mode": "inference", "qk_dim_factor": 1.0,
        "v_dim_factor": 1.0, "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native", "step_kernel": "native",
    },
    "jamba": {
        "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "zamba": {**_ZAMBA, "n_mamba_heads": 2, "use_mamba_kernels": False, "attention_hidden_size": 64,
              "attention_head_dim": 16},
    "zamba2": {**_ZAMBA, "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 4,
               "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1, "adapter_rank": 4, "kv_channels": 8},
    "lfm2": {**_CONVOLUTION, "block_multiple_of": 8},
    "lfm2_moe": {**_CONVOLUTION, **_EXPERTS, "num_dense_layers": 1},
    "qwen3_next": {**_DELTA_NET, **_EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {**_DELTA_NET, "head_dim": 8},
    "olmo_hybrid": _DELTA_NET,
    "nemotron_h": {
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 4,
        "head_dim": 8, "layers_block_type": ["mamba", "mlp", "attention", "mamba"], "use_mamba_kernels": False,
    },
    "granitemoehybrid": {**_MAMBA2, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16,
                         "layer_types": ["mamba", "attention"] * 2},
    "minimax": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 4,
                "layer_types": ["linear_attention", "full_attention"] * 2},
}  # fmt: skip
"""Families with recurrent or convolutional states, and hybrids."""
SEVERAL_STREAMS = {
    "gemma3n_text": {
        "head_dim": 8, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4,
    },
}  # fmt: skip
FAMILIES = {**{family: {} for family in ARCHITECTURES}, **RECURRENT, **SEVERAL_STREAMS}

Computed = tuple[Tensor, Tensor, Tensor | None, int]
"""Token ids, logits from the last prompt token on, the attention mask, and the prompt's length."""


def model_of(family: str, positions: str, inside: bool = False) -> nn.Module:
    """A tiny steered model: as a PEFT model, or with transformers' own `add_adapter`."""
    base, config = tiny(family, **FAMILIES[family]), SteeringVectorConfig(layers=LAYER, positions=positions)
    if inside:
        base.add_adapter(config)
        fill(base)
        return base.eval()
    model = get_peft_model(base, config)
    fill(model)
    return model.eval()


def chosen(positions: str, shape: tuple[int, int], prompt: int) -> Tensor:
    """The steered tokens of rows whose prompts have this length, `(rows, columns)`."""
    column = torch.arange(shape[1]).expand(shape)
    rules: dict[str, Callable[[], Tensor]] = {
        "all": lambda: column >= 0,
        "completion": lambda: column >= prompt,
        "prompt": lambda: column < prompt,
        "last_prompt": lambda: column == prompt - 1,
    }
    return rules[positions]()


@contextmanager
def added(base: nn.Module, vector: Tensor, mask: Tensor) -> Iterator[None]:
    """Inside, a vector is added to the masked tokens of block LAYER."""

    def add(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + mask[..., None] * vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = find_blocks(base)[LAYER][1].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def reference(family: str, positions: str, vector: Tensor, ids: Tensor, mask: Tensor | None, prompt: int) -> Tensor:
    """Logits that predict what follows the prompt, without a cache, `(rows, tokens, vocabulary)`."""
    base = tiny(family, **FAMILIES[family])
    inputs = {"input_ids": ids, "use_cache": False}
    if mask is not None:
        inputs |= {"attention_mask": mask}
        if "position_ids" in inspect.signature(type(base).forward).parameters:
            inputs |= {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}
    with added(base, vector, chosen(positions, tuple(ids.shape), prompt)):
        return base(**inputs).logits[:, prompt - 1 : -1]


def generated(model: nn.Module, ids: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    """Greedy tokens and the logits they were chosen from."""
    kwargs = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, **kwargs}
    out = model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **kwargs)
    return out.sequences, torch.stack(out.logits, dim=1)


def difference(family: str, way: str, positions: str, vector_scale: float = 1.0) -> float:
    """The largest difference of a way's logits from the reference.

    Args:
        family: One of FAMILIES.
        way: One of WAYS.
        positions: Which tokens are steered.
        vector_scale: 0 for the base model, whose own ways may differ.
    """
    model = model_of(family, positions, inside=way.startswith("inside"))
    vector_of(model).data *= vector_scale
    sequences, logits, mask, prompt = WAYS[way](model)
    expected = reference(family, positions, vector_of(model).detach(), sequences, mask, prompt)
    return float((logits - expected).abs().max())


def _forward(model: nn.Module) -> Computed:
    ids = tokens(2, PROMPT + NEW)
    with prompt_length(model, PROMPT):
        return ids, model(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 : -1], None, PROMPT


def _labels(model: nn.Module) -> Computed:
    ids = tokens(2, PROMPT + NEW)
    labels = torch.where(torch.arange(PROMPT + NEW) < PROMPT, -100, ids)
    return ids, model(input_ids=ids, labels=labels, use_cache=False).logits[:, PROMPT - 1 : -1], None, PROMPT


def _cached(model: nn.Module) -> Computed:
    return *generated(model, tokens(2, PROMPT)), None, PROMPT


def _one_row(model: nn.Module) -> Computed:
    return *generated(model, tokens(1, PROMPT)), None, PROMPT


def _left_padded(model: nn.Module) -> Computed:
    ids, mask = tokens(2, PROMPT), torch.ones(2, PROMPT + NEW, dtype=torch.long)
    ids[0, :2] = mask[0, :2] = 0
    return *generated(model, ids, attention_mask=mask[:, :PROMPT]), mask, PROMPT


def _chunked(model: nn.Module) -> Computed:
    return *generated(model, tokens(2, PROMPT), prefill_chunk_size=2), None, PROMPT


def _static(model: nn.Module) -> Computed:
    return *generated(model, tokens(2, PROMPT), cache_implementation="static", disable_compile=True), None, PROMPT


def _looked_up(model: nn.Module) -> Computed:
    ids = tokens(1, PROMPT // 2).repeat(1, 2)  # so that there is something to find
    return *generated(model, ids, prompt_lookup_num_tokens=2), None, PROMPT


def _assisted(model: nn.Module) -> Computed:
    base = getattr(model, "base_model", model)
    draft = tiny(base.config.model_type, **FAMILIES[base.config.model_type])
    return *generated(model, tokens(1, PROMPT), assistant_model=draft), None, PROMPT


def _continued(model: nn.Module) -> Computed:
    """`generate` continues a cache that holds the beginning of its prompt."""
    ids = tokens(2, PROMPT)
    with prompt_length(model, PROMPT):
        cache = model(input_ids=ids[:, :-2], use_cache=True, past_key_values=DynamicCache(config=model.config))
    return *generated(model, ids, past_key_values=cache.past_key_values), None, PROMPT


WAYS: dict[str, Callable[[nn.Module], Computed]] = {
    "forward": _forward,
    "labels": _labels,
    "cached": _cached,
    "one row": _one_row,
    "left-padded": _left_padded,
    "chunked": _chunked,
    "static cache": _static,
    "prompt lookup": _looked_up,
    "assisted": _assisted,
    "continued": _continued,
    "inside: cached": _cached,
    "inside: chunked": _chunked,
    "inside: prompt lookup": _looked_up,
    "inside: assisted": _assisted,
    "inside: continued": _continued,
}
"""`inside`: the adapter was added by transformers' own `add_adapter`, so there is no PeftModel around `generate`."""


def result(family: str, way: str, positions: str) -> str:
    """ "right", or why there is nothing to compare: who refuses it, or that the base's own ways differ.

    Raises:
        AssertionError: the logits are wrong.
    """
    try:
        steered = difference(family, way, positions)
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        return _refusal(family, way, positions, error)
    if steered < TOLERANCE:
        return "right"
    with torch.no_grad():
        unsteered = difference(family, way, "all", vector_scale=0.0)
    assert unsteered >= TOLERANCE, f"{family}, {way}, {positions}: the logits differ by {steered:.1e}"
    return "transformers' own ways differ"


def _refusal(family: str, way: str, positions: str, error: Exception) -> str:
    """Who refuses it. What we refuse names the switch to change; transformers refuses it of the base too."""
    if any(name in str(error) for name in ("positions=", "site=")):
        return "refused by name"
    try:
        difference(family, way, "all", vector_scale=0.0)
    except Exception as of_the_base:
        assert type(of_the_base) is type(error), f"{family}, {way}, {positions}: {error}"
        return "transformers refuses it"
    raise AssertionError(f"{family}, {way}, {positions}: {error}") from error


def main() -> int:
    """Write the table."""
    lines = [
        "# Steered logits in every way of computing them",
        "",
        "Written by `python tests/helpers/families.py`; compared with the base model without a cache and a hook",
        f"that adds the vector to an explicit mask of tokens (within {TOLERANCE:g}). An entry holds for all of",
        f"{', '.join(POSITIONS)}, unless it names some.",
        "",
        f"| family | {' | '.join(WAYS)} |",
        f"|---|{'---|' * len(WAYS)}",
    ]
    with torch.no_grad():
        for family in FAMILIES:
            lines.append(f"| {family} | {' | '.join(entry(family, way) for way in WAYS)} |")
            print(lines[-1], flush=True)
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def entry(family: str, way: str) -> str:
    by_result: dict[str, list[str]] = {}
    for positions in POSITIONS:
        by_result.setdefault(result(family, way, positions), []).append(positions)
    if len(by_result) == 1:
        return next(iter(by_result))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in by_result.items())


if __name__ == "__main__":
    sys.exit(main())
