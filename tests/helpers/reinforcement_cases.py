r"""GRPO and RLOO on two processes: run by `test_reinforcement_distributed.py` in each process that it launches.

accelerate launch --config_file recipes/configs/accelerate/cpu_ddp.yaml tests/helpers/reinforcement_cases.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from tiny_data import tokenizer, values
from tiny_models import tiny
from trl import GRPOConfig, RLOOConfig

from steertune.trainers import RolloutError, SteeredRollouts, SteeringGRPOTrainer, SteeringRLOOTrainer

GROUP, STRENGTHS = 4, (0.0, 1.0)
PROMPTS = Dataset.from_list([{"prompt": "dog cat "}, {"prompt": "cat dog "}] * 4)


def look(kind: str, folder: Path) -> dict[str, Any]:
    """Train; what this process saw, and what it trained."""
    rank = PartialState().process_index
    seen: list[float] = []

    def variety(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(columns.get("strength", []))
        return [len(set(text.split())) / max(len(text.split()), 1) for text in completions]

    trainer_class, config_class = {
        "grpo": (SteeringGRPOTrainer, GRPOConfig),
        "rloo": (SteeringRLOOTrainer, RLOOConfig),
    }[kind]
    args = config_class(
        str(folder / kind), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=2,
        per_device_train_batch_size=2, num_generations=GROUP, max_completion_length=5, logging_steps=1, beta=0.0,
        gradient_checkpointing=False, save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    options = {"rollout_func": SteeredRollouts(str(folder / "vector"), STRENGTHS)} if kind == "grpo" else {}
    try:
        trainer = trainer_class(
            model=tiny(),
            reward_funcs=variety,
            args=args,
            train_dataset=PROMPTS,
            processing_class=tokenizer(),
            **options,
        )
    except RolloutError as error:
        return {"refused": str(error)}
    trainer.train()
    [vector] = values(trainer.accelerator.unwrap_model(trainer.model)).values()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    return {"rank": rank, "strengths": seen, "vector": vector.tolist(), "rewards": rewards}


if __name__ == "__main__":
    home, state = Path(sys.argv[1]), PartialState()
    results = {kind: look(kind, home) for kind in sys.argv[2:]}
    (home / f"{state.distributed_type.value}-{state.process_index}.json").write_text(json.dumps(results))
