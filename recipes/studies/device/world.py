"""A made-up model, its tokenizer and rows: nothing is downloaded or read from a disk."""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.layer import steering_layers

WORDS = 5000
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": WORDS + 256, "max_position_embeddings": 512}  # fmt: skip
_LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
          "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 2048}  # fmt: skip
"""The sizes of Llama 3.2 1B."""


class NotRun(Exception):
    """Raised by a check that does not apply to this machine; the message says why."""


@dataclass(frozen=True)
class World:
    """What the checks and the benchmark share.

    Attributes:
        device: Device of the checks.
        tiny: Whether the steps are timed on a tiny model too.
        folder: Where trainers write.
        tokenizer: One token per word.
    """

    device: torch.device
    tiny: bool
    folder: Path
    tokenizer: Any

    @classmethod
    def make(cls, tiny: bool, folder: Path) -> World:
        """The world of this machine: on the GPU, or on the CPU if there is none."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = False  # so that fp32 is really fp32
        torch.backends.cudnn.allow_tf32 = False
        return cls(device, tiny, folder, tokenizer())

    def small(self, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """A tiny model, the same on every device."""
        return made(_SMALL, "cpu", torch.float32).to(device=device, dtype=dtype)

    def timed(self) -> Any:
        """The model whose steps are timed, in 16 bits, on the device."""
        return made(_SMALL if self.tiny else _LARGE, self.device, torch.bfloat16)

    def ids(self, rows: int = 3, length: int = 12) -> torch.Tensor:
        """Random token ids `(rows, length)`, on the CPU."""
        return torch.randint(256, WORDS, (rows, length), generator=torch.Generator().manual_seed(1))


def made(sizes: dict[str, Any], device: Any, dtype: torch.dtype) -> Any:
    """A model with random weights."""
    config = LlamaConfig(**sizes, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokenizer() -> Any:
    """Every word of four letters is a token, with the space before it."""
    letters = map("".join, itertools.product(string.ascii_lowercase, repeat=4))
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"<{i}>" for i in range(4, 256))]
    words += [f"Ġ{word}" for word in itertools.islice(letters, WORDS)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def steered(model: nn.Module, **switches: Any) -> Any:
    """A model with a random vector, whose effect is well above rounding."""
    made = get_peft_model(model, SteeringVectorConfig(**{"layers": [2, 3], **switches}))  # pyright: ignore
    generator = torch.Generator().manual_seed(7)
    for layer in steering_layers(made):
        for parameter in layer.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.eval()
