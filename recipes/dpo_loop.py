"""DPO on one steering vector as a plain PyTorch loop, in one file without a trainer or an arm.

    python recipes/dpo_loop.py
    python recipes/dpo_loop.py --data recipes/tasks/warm_tone --layer 12 --steps 32

`steertune train vector_dpo` does the same with checkpoints, several processes, cached prefixes and a report; the tests
check that both train the same vector. Data: a folder with train.jsonl and test.jsonl, each line a prompt, a chosen and
a rejected answer in chat format.

Shapes: P pairs, B = 2P rows (the chosen answers first, then the rejected ones), T tokens, V vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.recipes.lab import embedded

Pair = dict[str, Any]


def read_pairs(file: Path, count: int) -> list[Pair]:
    """The first `count` pairs of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]


def collate(pairs: Sequence[Pair], tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and answer mask (True on the tokens of the answer), each `(B, T)`, right-padded."""
    rows: list[tuple[list[int], int]] = []  # (ids of prompt and answer, length of the prompt)
    for side in ("chosen", "rejected"):
        for pair in pairs:
            prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False)
            rows.append((whole, len(prompt)))
    length = max(len(ids) for ids, _ in rows)
    ids_BT = torch.full((len(rows), length), tokenizer.pad_token_id)
    attention_BT = torch.zeros(len(rows), length, dtype=torch.long)
    answer_BT = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (ids, start) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        attention_BT[row, : len(ids)] = 1
        answer_BT[row, start : len(ids)] = True
    return ids_BT, attention_BT, answer_BT


def margins(model: Any, batch: tuple[Tensor, Tensor, Tensor], strength: float) -> Tensor:
    """`log p(chosen) - log p(rejected)` in nats, `(P,)`, with the vector multiplied by `strength`."""
    ids_BT, attention_BT, answer_BT = (tensor.to(model.device) for tensor in batch)
    with set_strength(model, strength):
        logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits.float()
    # the logits at a position predict the token after it
    logps_BTV = logits_BTV[:, :-1].log_softmax(-1)
    logps_BT = logps_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    logps_B = (logps_BT * answer_BT[:, 1:]).sum(1)
    chosen_P, rejected_P = logps_B.chunk(2)
    return chosen_P - rejected_P


def train(model: Any, tokenizer: Any, pairs: Sequence[Pair], steps: int, batch: int, rate: float, beta: float,
          seed: int) -> None:  # fmt: skip
    """Minimise the DPO loss (Rafailov et al. 2305.18290, equation 7) over the vector."""
    vector = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # the rate is in units of the residual stream: 1e-3 moves the vector by at most 6.4 % of its size per step
    optimizer = torch.optim.AdamW(vector, lr=rate, weight_decay=0.0)
    per_epoch = -(-len(pairs) // batch)
    for step in range(steps):
        # a new order in every epoch
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        batch_now = collate([pairs[i] for i in order[place * batch : (place + 1) * batch]], tokenizer)
        # the reference is the same model without its vector, so nothing is copied
        with torch.no_grad():
            reference_P = margins(model, batch_now, 0.0)
        loss_P = -logsigmoid(beta * (margins(model, batch_now, 1.0) - reference_P))
        loss_P.mean().backward()
        torch.nn.utils.clip_grad_norm_(vector, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:3} of {steps}: loss {loss_P.mean().item():.4f}", flush=True)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, pairs: Sequence[Pair], batch: int, strength: float) -> float:
    """Share of pairs whose chosen answer is more likely than the rejected one."""
    batches = [collate(pairs[i : i + batch], tokenizer) for i in range(0, len(pairs), batch)]
    margins_P = torch.cat([margins(model, batch, strength) for batch in batches])
    return (margins_P > 0).float().mean().item()


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: list[dict[str, str]], strength: float) -> str:
    """The model's greedy answer, at most 40 tokens."""
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    with set_strength(model, strength):
        ids_BT = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(ids_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="dpo_loop", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="embedded", help="a local folder or a Hub name (embedded)")
    parser.add_argument("--data", type=Path, default=embedded.TASKS / "cautious_advice", help="folder of pairs")
    parser.add_argument("--train", type=int, default=32, help="number of training pairs (32)")
    parser.add_argument("--test", type=int, default=40, help="number of held-out pairs (40)")
    parser.add_argument("--layer", type=int, default=15, help="the vector is added to this block's output (15)")
    parser.add_argument("--steps", type=int, default=16, help="optimiser steps (16)")
    parser.add_argument("--batch", type=int, default=4, help="pairs per step (4)")
    parser.add_argument("--rate", type=float, default=4e-4, help="learning rate in units of the stream (4e-4)")
    parser.add_argument("--beta", type=float, default=0.1, help="inverse temperature of DPO, in 1/nats (0.1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the pairs (0)")
    options = parser.parse_args(argv)

    # the base model, frozen, and one vector of zeros on one layer
    if options.model == "embedded":
        base, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    else:
        base, tokenizer = (
            kind.from_pretrained(options.model, trust_remote_code=False)
            for kind in (AutoModelForCausalLM, AutoTokenizer)
        )
    model = get_peft_model(base, SteeringVectorConfig(layers=options.layer)).eval()

    # strength 0 is the model as it was
    test = read_pairs(options.data / "test.jsonl", options.test)
    before = accuracy(model, tokenizer, test, options.batch, 0.0)
    pairs = read_pairs(options.data / "train.jsonl", options.train)
    train(model, tokenizer, pairs, options.steps, options.batch, options.rate, options.beta, options.seed)
    after = accuracy(model, tokenizer, test, options.batch, 1.0)
    print(f"\nHeld-out pairs in the right order: {before:.1%} before, {after:.1%} after ({len(test)} pairs)")
    for pair in test[:3]:
        print(f"\n{pair['prompt'][-1]['content']}")
        print(f"  base:   {answer(model, tokenizer, pair['prompt'], 0.0)}")
        print(f"  vector: {answer(model, tokenizer, pair['prompt'], 1.0)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
