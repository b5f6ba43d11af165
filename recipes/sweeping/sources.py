"""The steered model of one site and layer, with a closed-form direction or an arm that is trained there."""

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
from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.training import QUIET, fit, make_trainer, silent, training_of
from steertune.recipes.sweeping.context import Context
from steertune.recipes.sweeping.settings import at
from steertune.trainers import share_weights

_BATCH = 4


class Source:
    """Makes the adapter of each place once, and saves it in the sweep's folder."""

    def __init__(self, context: Context) -> None:
        self.context, self.table = context, context.table
        self.rows = context.splits.train(self.table.train, self.table.seed)
        self.cache: dict[Any, Any] = {}  # what ingredients compute once for all places
        self.vectors = cache(self._fit_directions)

    def model(self, site: Site, layer: int, home: Path) -> Any:
        """The model with the adapter of a place, in evaluation mode. It is read from the folder `adapter/` in the
        place's `home`, or made and written there atomically.

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
        # measure the adapter as it was saved
        return PeftModel.from_pretrained(share_weights(self.context.model), str(folder)).eval()

    def _direction(self, site: Site, layer: int) -> PeftModel:
        config = SteeringVectorConfig(layers=[layer], site=site, init=str(self.table.direction))
        model: Any = get_peft_model(share_weights(self.context.model), config)
        vector = self.vectors(site)[layer]
        for steered in steering_layers(model):
            steered.initialise("default", vector)
        return model

    def _fit_directions(self, site: Site) -> dict[int, Tensor]:
        """Every layer's direction from one pass of the base model, scaled to the length of the mean difference at that
        layer."""
        name = str(self.table.direction)
        method = directions.get(name)
        given: list[Mapping[str, Any]] = [
            {**batch.inputs, "labels": batch.labels} for batch in batches(self.context.tokenizer, self.rows, _BATCH)
        ]
        states = collect(self.context.model, given, self.table.layers, site, method.POOL)
        vectors = {}
        for layer, chosen in states.chosen.items():
            rejected = states.rejected[layer]
            vector = method.fit({layer: chosen}, {layer: rejected})[layer].float()
            gap = float((chosen.mean(dim=0) - rejected.mean(dim=0)).norm())
            if not (gap > 0 and vector.norm() > 0):
                raise ArmError(
                    f"Direction {name!r} at layer {layer} ({site}) is zero: the two answers have the same states."
                )
            vectors[layer] = vector * (gap / vector.norm())
        return vectors

    def _trained(self, arm: Arm, home: Path) -> PeftModel:
        table, context = self.table, self.context
        data = arm.data.model_copy(update={"name": table.task, "train": table.train, "seed": table.seed})
        set_seed(table.seed)
        training = training_of(
            arm.model_copy(update={"data": data}),
            share_weights(context.model),
            context.tokenizer,
            self.rows,
            home,
            held_out=[context.splits.test, context.splits.validation],
            near=table.splits.near_duplicates,
            cache=self.cache,
        )
        trainer = make_trainer(training, context.prefix, **QUIET)
        fit(silent(trainer), home)
        return trainer.model


def bake(model: PeftModel, strength: float) -> None:
    """Rescale the active adapter so that strength 1 has the effect that this strength has now.

    This is exact for every steering vector and LoRA: it multiplies the write vectors and the lengths set by `norm`, or
    the LoRA's alpha.
    """
    config: Any = model.peft_config[str(model.active_adapter)]
    if isinstance(config, LoraConfig):
        config.lora_alpha *= strength  # pyright: ignore[reportAttributeAccessIssue]
        config.alpha_pattern = {name: alpha * strength for name, alpha in (config.alpha_pattern or {}).items()}
        return
    for layer in steering_layers(model, str(model.active_adapter)):
        if str(model.active_adapter) not in layer.tied_to:
            scaled = "b" if config.norm == "learned" else "v"
            layer.parameter(str(model.active_adapter), scaled).data.mul_(strength)
    if config.norm in NORMS_WITH_VALUE:
        config.norm_value *= abs(strength)
