"""The worlds that a problem is planted in: a base model, prompts to draw, and answers sampled from any model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from steertune.adapters import SteeringVectorConfig, steering_layers
from steertune.recipes.lab import embedded
from steertune.recipes.lab.files import read_jsonl
from steertune.recipes.lab.generation import left_padded, prompt_ids
from steertune.recipes.lab.paths import TASKS
from steertune.trainers import share_weights

_WORDS, _PROMPT = 60, 6  # of the tiny model, and of a prompt
_NO_WORDS = [0, 1, 3]  # its special tokens, all but the end
_ENDS = 0.12  # probability that the tiny model ends an answer at each word
_SHARPER = 2.5  # times the tiny model's logits, so that its likeliest word is likelier than the end
_BATCH = 256


@dataclass(frozen=True)
class Sizes:
    """How large a study is.

    Attributes:
        tasks: Teachers, each with its own data; a study treats them as a sample.
        train: Training pairs.
        test: Test rows, on which measures are computed.
        fresh: Prompts on which the truth is computed, answered by the teacher.
        rows: Pairs in a training step.
    """

    tasks: int
    train: int
    test: int
    fresh: int
    new_tokens: int
    steps: int
    rows: int = 16


@dataclass(frozen=True)
class World:
    """A base model and its prompts.

    Attributes:
        name: `tiny` or `embedded`.
        layer: The layer that teachers change.
        wrong_layer: The layer that some arms train instead.
        sizes: Sizes of a study.
    """

    name: str
    model: Any
    tokenizer: Any
    layer: int
    wrong_layer: int
    sizes: Sizes

    def prompts(self, count: int, seed: int) -> list[Any]:
        """Prompts, drawn from the same distribution for every seed."""
        generator = np.random.default_rng(seed)
        if self.name == "tiny":
            ids = generator.integers(0, _WORDS, (count, _PROMPT))
            return [" ".join(f"w{i}" for i in row) + " " for row in ids]
        # all generated tasks have the same prompts
        files = [TASKS / "formal" / f"{split}.jsonl" for split in ("train", "test")]
        pool = [row["prompt"] for file in files for row in read_jsonl(file)]
        return [pool[i] for i in generator.choice(len(pool), count, replace=False)]

    @torch.no_grad()
    def answers(self, model: Any, prompts: Sequence[Any], seed: int) -> list[str]:
        """Answers sampled from a model's whole distribution. An answer of the tiny model that does not end is left
        empty, so that no arm learns an end that the model did not write."""
        texts: list[str] = []
        tiny = self.name == "tiny"
        for start in range(0, len(prompts), _BATCH):
            inputs, filler = left_padded(self.tokenizer, prompt_ids(self.tokenizer, prompts[start : start + _BATCH]))
            options = {"suppress_tokens": _NO_WORDS} if tiny else {}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + start)
                ids = model.generate(
                    **inputs, max_new_tokens=self.sizes.new_tokens, do_sample=True, top_k=0, top_p=1.0,
                    temperature=1.0, pad_token_id=filler, **options,
                )  # fmt: skip
            new = ids[:, inputs["input_ids"].shape[1] :]
            ended = (new == self.tokenizer.eos_token_id).any(dim=1).tolist()
            written = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            texts += [text.strip() if end or not tiny else "" for text, end in zip(written, ended, strict=True)]
        return texts

    def rows(self, prompts: Sequence[Any], **sides: Sequence[str]) -> Dataset:
        """Prompts with the answers of every side (`chosen`, `rejected` or `completion`), without rows that have an
        empty answer."""
        tiny = self.name == "tiny"

        def in_form(text: str) -> Any:
            return text if tiny else [{"role": "assistant", "content": text}]

        return Dataset.from_list(
            [
                {"prompt": prompt, **{side: in_form(text) for side, text in zip(sides, texts, strict=True)}}
                for prompt, *texts in zip(prompts, *sides.values(), strict=True)
                if all(texts)
            ]
        )

    def vector(self, direction: torch.Tensor, **options: Any) -> Any:
        """The base with a vector at the layer of the teachers, or as the config's `options` say. `direction` is
        `(D,)`, or `(layers, D)`."""
        config = SteeringVectorConfig(**{"layers": [self.layer], **options})
        model: Any = get_peft_model(share_weights(self.model), config)
        layers = [*steering_layers(model)]
        for layer, row in zip(layers, direction.expand(len(layers), -1), strict=True):
            layer.initialise("default", row)
        return model.eval()

    def lora(self, seed: int, modules: Sequence[str] = ("down_proj",)) -> Any:
        """The base with a random LoRA of rank one at the layer of the teachers."""
        config = LoraConfig(r=1, lora_alpha=1, target_modules=[*modules], layers_to_transform=[self.layer])
        torch.manual_seed(seed)
        model: Any = get_peft_model(copy.deepcopy(self.model), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        return model.eval()

    @property
    def batch(self) -> int:
        """Rows in one forward pass, where padding costs little."""
        return 128 if self.name == "tiny" else 4

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.model.config.hidden_size


def tiny_world(folder: Path, sizes: Sizes) -> World:
    """The tiny random model of `save_base`, which also ends its answers."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    world = World("tiny", model, AutoTokenizer.from_pretrained(folder), 2, 0, sizes)
    _let_it_end(world)
    return world


@torch.no_grad()
def _let_it_end(world: World) -> None:
    """Give every answer the same chance to end at each word: training appends an end to each of them, and if the base
    never wrote one, arms that learn answers would learn it, and arms that learn their difference would not.

    All embeddings get a constant, which the states carry to the head, and the end's logit is fitted to it.
    """
    model = world.model
    model.model.embed_tokens.weight[:, 0] = 4 * model.model.embed_tokens.weight.std()
    model.lm_head.weight *= _SHARPER
    model.lm_head.weight[:, 0] = 0.0
    end = world.tokenizer.eos_token_id
    model.lm_head.weight[end] = 0.0
    inputs, _ = left_padded(world.tokenizer, prompt_ids(world.tokenizer, world.prompts(256, seed=1)))
    states_ND = model.model(input_ids=inputs["input_ids"]).last_hidden_state.flatten(0, 1)
    logits_NV = model.lm_head(states_ND)
    logits_NV[:, [*_NO_WORDS, end]] = -torch.inf
    targets_N = logits_NV.logsumexp(dim=1) + math.log(_ENDS / (1 - _ENDS))
    model.lm_head.weight[end] = torch.linalg.lstsq(states_ND, targets_N[:, None]).solution[:, 0]


def embedded_world(sizes: Sizes) -> World:
    """The embedded model, with the everyday prompts of the embedded tasks."""
    return World("embedded", embedded.load_model(), embedded.load_tokenizer(), 15, 5, sizes)
