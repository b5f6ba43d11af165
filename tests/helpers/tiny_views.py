"""Hidden states seen through views."""

from __future__ import annotations

import torch
from datasets import Dataset
from tiny_data import tokenizer

from steertune.trainers import tokenise


@torch.no_grad()
def states_of(model, data, view=None, layer=2, site="block") -> torch.Tensor:
    """The base's states where the answer's tokens are predicted, `(tokens, d)`, by hand."""
    rows, found, attention = data.to_list(), [], []
    block = model.model.layers[layer]
    block.self_attn.register_forward_hook(lambda module, args, output: attention.append(output[0]))
    for row in tokenise(Dataset.from_list(view(rows) if view else rows), tokenizer()).to_list():
        answer = "chosen_ids" if "chosen_ids" in row else None
        ids = row["prompt_ids"] + row[answer] if answer else row["input_ids"]
        start = len(row["prompt_ids"]) if answer else next(i for i, label in enumerate(row["labels"]) if label != -100)
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1]
        found.append((hidden if site == "block" else attention[-1])[0, start - 1 : -1])
    return torch.cat(found)
