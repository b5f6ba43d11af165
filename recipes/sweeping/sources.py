"""The steered model at one site and layer: a closed-form direction, or an arm that is trained there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import set_seed

from steertune.adapters import SteeringVectorConfig, directions, steering_layers
from steertune.adapters.analysis.activations import collect
from steertune.adapters.types import NORMS_WITH_VALUE, Site
from steertune.recipes.lab.arm import Arm, ArmError
from steertune.recipes.lab.augmentation import grown
from steertune.recipes.lab.measures import batches
from steertune.recipes.lab.training import fit, make_trainer, silent
from steertune.recipes.sweeping.bench import Bench
from steertune.recipes.sweeping.settings import at
from steertune.trainers import share_weights

_BATCH = 4


class Source:
    """Makes the adapter of a place once, and keeps it in the sweep's folder.

    Args:
        bench: The base model and the rows.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.table = bench, bench.table
        self.rows = bench.splits.train(self.table.train, self.table.seed)
        self._directions = cache(self._fit_directions)

    def model(self, site: Site, layer: int, home: Path) -> Any:
        """The model with the adapter of a place, in evaluation mode.

        Args:
            site: Where in the block.
            layer: Which block.
            home: The place's folder; `adapter/` in it is read, or written whole.

        Raises:
            NonFiniteError: the training diverged.
        """
        folder, part = home / "adapter", home / "adapter.part"
        if not folder.is_dir():
            arm = self.table.arm
            made = self._direction(site, layer) if arm is None else self._trained(at(arm, site, layer), home)
            shutil.rmtree(part, ignore_errors=True)
            made.save_pretrained(str(part))
            os.replace(part, folder)
        # what was written is what is measured
        return PeftModel.from_pretrained(share_weights(self.bench.model), str(folder)).eval()

    def _direction(self, site: Site, layer: int) -> PeftModel:
        config = SteeringVectorConfig(layers=[layer], site=site, init=str(self.table.direction))
        model: Any = get_peft_model(share_weights(self.bench.model), config)
        vector = self._directions(site)[layer]
        for steered in steering_layers(model):
            steered.initialise("default", vector)
        return model

    def _fit_directions(self, site: Site) -> dict[int, Tensor]:
        """Every layer's direction from one pass of the base model, as long as the mean difference is there."""
        name = str(self.table.direction)
        method = directions.get(name)
        given: list[Mapping[str, Any]] = [
            {**batch.inputs, "labels": batch.labels} for batch in batches(self.bench.tokenizer, self.rows, _BATCH)
        ]
        states = collect(self.bench.model, given, self.table.layers, site, method.POOL)
        found = {}
        for layer, chosen in states.chosen.items():
            rejected = states.rejected[layer]
            vector = method.fit({layer: chosen}, {layer: rejected})[layer].float()
            gap = float((chosen.mean(dim=0) - rejected.mean(dim=0)).norm())
            if not (gap > 0 and vector.norm() > 0):
                raise ArmError(f"Direction {name!r} at layer {layer} ({site}) is zero: the two answers look alike.")
            found[layer] = vector * (gap / vector.norm())
        return found

    def _trained(self, arm: Arm, home: Path) -> PeftModel:
        table, bench = self.table, self.bench
        data = arm.data.model_copy(update={"name": table.task, "train": table.train, "seed": table.seed})
        arm = arm.model_copy(update={"data": data})
        rows, asked = self.rows, arm.augmenter()
        if asked is not None:
            apart = [bench.splits.test, bench.splits.validation]
            given: dict[str, Any] = {"seed": table.seed, "model": bench.model, "tokenizer": bench.tokenizer}
            rows = grown(rows, *asked, apart=apart, show=False, **given).rows
        set_seed(table.seed)
        quiet: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        trainer = make_trainer(arm, share_weights(bench.model), bench.tokenizer, rows, home, bench.prefix, **quiet)
        fit(silent(trainer), home)
        return trainer.model


def bake(model: PeftModel, strength: float) -> None:
    """Make what the active adapter does at a strength what it does at 1.

    Exact for every steering vector and LoRA: the write vectors are multiplied, lengths that `norm` prescribes too, or
    the LoRA's alpha.
    """
    config: Any = model.peft_config[str(model.active_adapter)]
    if isinstance(config, LoraConfig):
        config.lora_alpha *= strength  # pyright: ignore[reportAttributeAccessIssue]
        config.alpha_pattern = {name: alpha * strength for name, alpha in (config.alpha_pattern or {}).items()}
        return
    for layer in steering_layers(model, str(model.active_adapter)):
        if str(model.active_adapter) not in layer.tied_to:
            layer.parameter(str(model.active_adapter), "v").data.mul_(strength)
    if config.norm in NORMS_WITH_VALUE:
        config.norm_value *= abs(strength)
