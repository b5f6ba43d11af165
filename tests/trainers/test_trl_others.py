"""TRL's other trainers take a steering vector as they take any PEFT config."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny_data import tokenizer
from tiny_models import tiny, vector_of

from steertune.adapters import SteeringVectorConfig

COMMON = dict(
    use_cpu=True, bf16=False, report_to="none", max_steps=2, per_device_train_batch_size=4, learning_rate=0.05,
    logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip
SAMPLED = dict(num_generations=4, max_completion_length=6, temperature=1.0)


def reward(completions, **_):
    """How many words of a completion are `cat` or `dog`, plus a little for its length, so rewards differ."""
    return [float(len(set(text.split()) & {"cat", "dog"})) + 0.1 * len(text) for text in completions]


def kto(folder):
    from trl import KTOConfig, KTOTrainer

    data = [{"prompt": "the ", "completion": "cat runs", "label": i % 2 == 0} for i in range(8)]
    return KTOTrainer, KTOConfig(folder, **COMMON), data, {}


def grpo(folder):
    from trl import GRPOConfig, GRPOTrainer

    data = [{"prompt": "the cat"}] * 8
    return GRPOTrainer, GRPOConfig(folder, **COMMON, **SAMPLED), data, {"reward_funcs": reward}


def rloo(folder):
    from trl import RLOOConfig, RLOOTrainer

    data = [{"prompt": "the cat"}] * 8
    return RLOOTrainer, RLOOConfig(folder, **COMMON, **SAMPLED), data, {"reward_funcs": reward}


@pytest.mark.parametrize("positions", ["all", "completion"])
@pytest.mark.parametrize("method", [kto, grpo, rloo])
def test_vector_trains(method, positions, tmp_path):
    kind, args, data, options = method(str(tmp_path))
    trainer = kind(
        model=tiny(), args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer(),
        peft_config=SteeringVectorConfig(positions=positions), **options,
    )  # fmt: skip
    assert not vector_of(trainer.model).any()
    trainer.train()
    vector = vector_of(trainer.model)
    assert torch.isfinite(vector).all() and vector.norm() > 1e-3 and vector.dtype == torch.float32
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 1 and "steering_vector_v" in trained[0]
