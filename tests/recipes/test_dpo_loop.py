"""The flat loop trains the vector that `SteeringDPOTrainer` trains, and it learns on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny_models import tiny, vector_of

from steertune.adapters import SteeringVectorConfig
from steertune.recipes import dpo_loop


def chat_pairs(rows: int) -> list[dict[str, Any]]:
    """The tiny pairs in chat format."""

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return [
        {
            "prompt": message("user", row["prompt"].strip()),
            "chosen": message("assistant", row["chosen"]),
            "rejected": message("assistant", row["rejected"]),
        }
        for row in tiny_data.pairs(rows).to_list()
    ]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_loop_trains_the_trainers_vector(tmp_path: Path, seed: int) -> None:
    rows, steps, rate = chat_pairs(10), 7, 0.01  # 10 pairs in batches of 4: the last batch of an epoch is smaller
    options = dict(seed=seed, max_steps=steps, learning_rate=rate, lr_scheduler_type="constant", beta=0.1)
    config = SteeringVectorConfig(layers=2)
    by_trainer = tiny_data.trained("dpo", tmp_path, data=Dataset.from_list(rows), peft_config=config, **options)

    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2)).eval()
    dpo_loop.train(model, tiny_data.tokenizer(), rows, steps, batch=4, rate=rate, beta=0.1, seed=seed)

    by_loop = vector_of(model)
    assert by_loop.norm() > 0.05
    torch.testing.assert_close(by_loop, vector_of(by_trainer.model), rtol=0, atol=1e-6)


def test_the_loop_runs_on_a_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().save_pretrained(tmp_path)
    tiny_data.tokenizer().save_pretrained(tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_pairs(6)))
    words = f"--model {tmp_path} --data {tmp_path} --layer 2 --steps 3 --rate 0.01"
    assert dpo_loop.main(words.split()) == 0
    printed = capsys.readouterr().out
    assert printed.count("step ") == 3 and "(6 pairs)" in printed and printed.count("  vector: ") == 3


@pytest.mark.slow
@pytest.mark.real
def test_the_loop_learns_on_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert dpo_loop.main(["--test", "20"]) == 0
    words = capsys.readouterr().out.split("right order: ")[1].split()
    before, after = float(words[0].rstrip("%")), float(words[2].rstrip("%"))
    assert after >= before + 20
