r"""`trl dpo` with a steering vector: TRL's own command line, for preference pairs.

    accelerate launch -m steertune.recipes.trl_dpo --model_name_or_path embedded --dataset_name cautious_advice \
        --steering_layers 0.5 --learning_rate 5e-4 --max_steps 16 --output_dir my-vector
    steertune trl_dpo --config my.yaml --loss bipo --steering_norm capped --steering_norm_value 8

Every flag of `trl dpo` works, also in a YAML file; `--use_peft` trains TRL's LoRA instead of the vector, with the same
losses. `--steering_...` are the fields of `SteeringVectorConfig`. `--loss` is a file of losses/; without it the loss
is TRL's own. Data: a Hub name, a local folder or file, or an embedded task.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    from trl import DPOConfig

    from steertune.recipes.lab.trl_command import run
    from steertune.trainers import SteeringDPOTrainer

    return run(SteeringDPOTrainer, DPOConfig, argv, "trl_dpo", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
