"""Teachers, which are the base model plus one known change, and pairs whose better answer that change decides."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.saved import write_checksums
from steertune.recipes.lab.files import write_whole

LAYER = 2
_WORDS, _LENGTH = 60, 6
_CANDIDATES = 4  # random pairs drawn for every pair that is kept


def save_base(folder: Path) -> None:
    """A tiny random model, its tokenizer (one word is one token), and neutral text."""
    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(_WORDS))])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.12, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    # large inner activations, so that a change of weights matters
    for name, parameter in model.named_parameters():
        parameter.data *= 8.0 if "gate_proj" in name or "up_proj" in name else 0.1 if "down_proj" in name else 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts, answers = torch.randint(4, 4 + _WORDS, (2, 16, _LENGTH), generator=torch.Generator().manual_seed(1))
    rows = [{"prompt": _words(p) + " ", "completion": _words(a)} for p, a in zip(prompts, answers, strict=True)]
    _write_rows(folder / "neutral.jsonl", rows)
    write_checksums(folder)  # written last, so that it marks a complete folder


def write_task(folder: Path, base: Any, problem: str, seed: int, train: int, test: int) -> None:
    """Write training and test pairs. Every seed has its own teacher of the same kind, prompts and answers."""
    generator = torch.Generator().manual_seed(seed)
    teacher = make_teacher(base, "bias" if problem == "shuffled" else problem, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        coin = problem == "base" or (problem == "shuffled" and split == "train")
        # The pairs on which a change weighs most are those that the base gets wrong, so any disturbance of the base
        # looks like learning there. Where nothing can be learned, pairs are therefore not selected.
        candidates = 1 if problem == "shuffled" else _CANDIDATES
        _write_rows(folder / f"{split}.jsonl", sample_pairs(base, teacher, rows, generator, coin, candidates))
    write_checksums(folder)


def make_teacher(base: Any, problem: str, seed: int) -> Any:
    """The base plus a random change of the problem's kind, large enough to be learned."""
    torch.manual_seed(seed)
    if problem == "base":
        return base
    if problem == "lora":
        config: Any = LoraConfig(r=1, lora_alpha=15, target_modules=["down_proj"], layers_to_transform=[LAYER])
    else:
        config = SteeringVectorConfig(form="gated" if problem == "gated" else "bias", layers=[LAYER])
    teacher = get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in teacher.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "steering_vector_v" in name or "steering_vector_w" in name:
            torch.nn.init.normal_(parameter, std=3.0 if problem == "gated" else 8.0)
        elif "steering_vector_b" in name:
            torch.nn.init.zeros_(parameter)
    return teacher


@torch.no_grad()
def sample_pairs(
    base: Any, teacher: Any, rows: int, generator: torch.Generator, coin: bool, candidates: int
) -> list[dict[str, str]]:
    """Random prompts, each with two random answers, of which the teacher (or a coin) chooses one. `candidates` times
    as many pairs are drawn as are kept: those on which the change weighs most."""
    # N candidates; T tokens of a prompt, and of an answer
    count = candidates * rows
    prompts_NT, first_NT, second_NT = (
        torch.randint(4, 4 + _WORDS, (count, _LENGTH), generator=generator) for _ in range(3)
    )
    # by how much the change alone prefers the first answer
    reward_N = _logps(teacher, prompts_NT, first_NT) - _logps(teacher, prompts_NT, second_NT)
    reward_N -= _logps(base, prompts_NT, first_NT) - _logps(base, prompts_NT, second_NT)
    # keep the clearest pairs, in random order
    clearest = reward_N.abs().argsort(descending=True, stable=True)[:rows]
    clearest = clearest[torch.randperm(rows, generator=generator)]
    first_is_better_N = torch.rand(count, generator=generator) < 0.5 if coin else reward_N > 0
    pairs = []
    for i in clearest.tolist():
        chosen, rejected = (first_NT, second_NT) if first_is_better_N[i] else (second_NT, first_NT)
        pairs.append(
            {"prompt": _words(prompts_NT[i]) + " ", "chosen": _words(chosen[i]), "rejected": _words(rejected[i])}
        )
    return pairs


@torch.no_grad()
def _logps(model: Any, prompts_NT: Tensor, answers_NT: Tensor) -> Tensor:
    """`log p(answer | prompt)`, `(N,)`."""
    logits = model(input_ids=torch.cat([prompts_NT, answers_NT], dim=1)).logits
    logps_NTV = logits[:, _LENGTH - 1 : -1].log_softmax(-1)
    return logps_NTV.gather(2, answers_NT[:, :, None]).sum(dim=(1, 2))


def _words(ids: Tensor) -> str:
    return " ".join(f"w{int(i) - 4}" for i in ids)


def _write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
