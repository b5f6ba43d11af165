"""Memory and compute of training on a large frozen base, by arithmetic: the numbers of `docs/results/scale/table.md`.

    python -m steertune.recipes.studies.scale                    # a 70B llama on 8 GPUs
    python -m steertune.recipes.studies.scale CONFIG_FOLDER --gpus 4

The formulas are for the llama family. A test compares each of them with a measured small model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

from transformers import LlamaConfig

from steertune.recipes.lab.checks import configuration
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.options import Argument, Count
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.tables import ModelTable

LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 28672, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
ADAM = 16  # bytes per trained fp32 number: the number, its gradient and two moments
GB = 1e9


@dataclass(frozen=True)
class Scale:
    """The sizes of a base of the llama family, and what they cost.

    Args:
        hidden: Width d of the residual stream.
        layers: Number of blocks L.
        heads: Width of all query heads.
        keys: Width of all key (and of all value) heads.
        ffn: Width of the MLP.
        vocabulary: Number of tokens.
        tied: Whether embedding and head are one matrix.
        bytes_each: Bytes of a weight and of a cached state; 2 for bf16.
    """

    hidden: int
    layers: int
    heads: int
    keys: int
    ffn: int
    vocabulary: int
    tied: bool = False
    bytes_each: int = 2

    @classmethod
    def of(cls, config: Any, bytes_each: int = 2) -> Scale:
        """From a transformers configuration."""
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size, config.num_hidden_layers, width * config.num_attention_heads,
            width * config.num_key_value_heads, config.intermediate_size, config.vocab_size,
            bool(config.tie_word_embeddings), bytes_each,
        )  # fmt: skip

    @property
    def matrices(self) -> int:
        """Entries of a block's matrices: q and o, k and v, and three in the MLP."""
        return self.hidden * (2 * self.heads + 2 * self.keys + 3 * self.ffn)

    @property
    def parameters(self) -> int:
        """Parameters of the base: blocks with their two norms, the last norm, embedding and head."""
        ends = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.matrices + 2 * self.hidden) + self.hidden + ends

    def base(self, shards: int = 1) -> float:
        """Bytes of the base on one of `shards` GPUs."""
        return self.parameters * self.bytes_each / shards

    def trained(self, numbers: int) -> int:
        """Bytes of `numbers` trained fp32 numbers with their gradients and Adam's moments, on every GPU."""
        return numbers * ADAM

    def memo(self, tokens: int) -> int:
        """Bytes of the cached prefix: one state of width d per token."""
        return tokens * self.hidden * self.bytes_each

    def flops(self, above: int) -> float:
        """FLOPs of a training step per token, with a vector that has `above` blocks over it and nothing trained below.

        All blocks and the head run forward; the blocks above and the head run backward, for their inputs only.
        Attention scores are left out.
        """
        head = self.vocabulary * self.hidden
        return 2.0 * (self.layers * self.matrices + head) + 2.0 * (above * self.matrices + head)

    def gathered(self, above: int, shards: int) -> float:
        """Bytes of sharded weights that each GPU receives per step: all blocks forward, those above again backward."""
        share = (shards - 1) / shards * self.bytes_each
        return share * (self.parameters + above * self.matrices)


def numbers(scale: Scale, gpus: int) -> dict[str, float]:
    """What training on `gpus` GPUs needs: description -> value."""
    # the vector is at its default depth; compared with training every weight, and with a LoRA of rank 16 everywhere
    at = round(2 / 3 * (scale.layers - 1))
    above = scale.layers - 1 - at
    full = 6.0 * (scale.layers * scale.matrices + scale.vocabulary * scale.hidden)
    lora = scale.layers * 16 * (4 * scale.hidden + 2 * scale.heads + 2 * scale.keys + 3 * (scale.hidden + scale.ffn))
    return {
        "parameters of the base, billions": scale.parameters / 1e9,
        "base, whole (single GPU, DDP, ZeRO-1, ZeRO-2), GB": scale.base() / GB,
        f"base, sharded over {gpus} GPUs (FSDP, ZeRO-3), GB per GPU": scale.base(gpus) / GB,
        "two gathered blocks, GB": 2 * scale.matrices * scale.bytes_each / GB,
        "one vector with gradient and Adam, MB": scale.trained(scale.hidden) / 1e6,
        "a vector in every block, MB": scale.trained(scale.hidden * scale.layers) / 1e6,
        "LoRA of rank 16 on every linear, GB": scale.trained(lora) / GB,
        "cached prefix of 1000 pairs of 512 tokens, GB (unsharded bases only)": scale.memo(2 * 1000 * 512) / GB,
        "logits of 4096 labelled tokens in fp32, GB": 4096 * scale.vocabulary * 4 / GB,
        f"vector at layer {at}: work per token, TFLOP": scale.flops(above) / 1e12,
        "the same as a share of full finetuning": scale.flops(above) / full,
        "weights gathered per step, GB per GPU": scale.gathered(above, gpus) / GB,
    }


def table(scale: Scale, gpus: int) -> str:
    """The numbers in Markdown."""
    rows = numbers(scale, gpus).items()
    return "| | |\n|---|---|\n" + "".join(f"| {what} | {value:.3g} |\n" for what, value in rows)


@command
def main(
    config: Annotated[str | None, Argument(help="a model's folder or Hub name (a 70B llama)")] = None,
    gpus: Annotated[int, Count("GPUs that share the base")] = 8,
) -> Result:
    """Compute the table for a model's configuration."""
    begin(only_one=True)
    read = LlamaConfig(**LLAMA_70B) if config is None else configuration(ModelTable(name=config))
    scale = Scale.of(read)
    return Result(numbers(scale, gpus), table(scale, gpus))


if __name__ == "__main__":
    sys.exit(main())
