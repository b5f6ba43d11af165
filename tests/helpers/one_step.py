"""One step of plain gradient descent, and the gradients that it used."""

from __future__ import annotations

import torch
from peft import LoraConfig
from tiny_data import trainer
from tiny_models import tiny

SGD = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_steps=1)


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": "all-linear", **changes})


def steps(made) -> dict[str, torch.Tensor]:
    """What one step of gradient descent changed, by name: minus the learning rate times the gradient."""
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def gradients(tmp_path, biases, kind="dpo", config=None, model=tiny, **options) -> dict[str, torch.Tensor]:
    """Gradients of the first step, from what plain gradient descent did."""
    options = {**SGD, "loss": "dpo" if kind == "dpo" else "cross_entropy", **options}
    if kind == "dpo" and config is None:
        options["ref_model"] = model()
    made = trainer(kind, tmp_path, model=model(), peft_config=config, inductive_biases=biases, **options)
    if config is not None:  # LoRA's second matrices are zero, and so would be every gradient of the first ones
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name and name.endswith("weight"):
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    before = steps(made)
    made.train()
    return {name: (before[name] - value) / options["learning_rate"] for name, value in steps(made).items()}
