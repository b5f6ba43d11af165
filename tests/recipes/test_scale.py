"""The arithmetic of `docs/results/scale/table.md` against measured small models."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_data
import torch
from paths import ROOT
from tiny_models import steered, tiny, tokens
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.studies.scale import LLAMA_70B, Scale, table
from steertune.trainers import FrozenPrefix


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1}])
def test_the_base_has_the_counted_bytes(changes: dict) -> None:
    model = tiny(**changes)
    assert Scale.of(model.config, bytes_each=4).base() == sum(p.numel() * p.element_size() for p in model.parameters())


def test_training_and_memo_take_the_counted_bytes(tmp_path: Path) -> None:
    memo = FrozenPrefix(ram_gb=1)
    made = tiny_data.trained(
        "sft", tmp_path, peft_config=SteeringVectorConfig(layers=[2, 3]), frozen_prefix=memo, max_steps=2
    )
    scale = Scale.of(made.model.config, bytes_each=4)
    trained = [p for p in made.model.parameters() if p.requires_grad]
    optimizer = made.optimizer.optimizer if hasattr(made.optimizer, "optimizer") else made.optimizer
    states = [v for p in trained for v in optimizer.state[p].values() if torch.is_tensor(v) and v.ndim]
    # gradients are gone after the step, and take what the parameters take
    measured = sum(2 * p.nbytes for p in trained) + sum(v.nbytes for v in states)
    assert scale.trained(2 * 32) == measured
    rows = {tuple(row["input_ids"]) for row in made.train_dataset}
    assert memo.memo.nbytes == scale.memo(sum(map(len, rows)))


def test_a_step_does_the_counted_work() -> None:
    model, ids = steered(layers=[1]), tokens(2, 16)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    scale = Scale.of(model.config)
    assert scale.flops(above=2) * ids.numel() == counter.get_total_flops()  # it does not see CPU attention scores


def test_the_page_holds_the_numbers_of_the_script() -> None:
    page = ROOT / "docs" / "results" / "scale" / "table.md"
    assert table(Scale.of(LlamaConfig(**LLAMA_70B)), 8) in page.read_text(encoding="utf-8")
