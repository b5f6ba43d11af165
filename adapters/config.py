"""The switches of a steering vector, one field per ingredient."""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, get_args

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .fingerprint import check_fingerprint_form
from .registration import AUTO, PEFT_TYPE
from .registry import choose, did_you_mean, file_names
from .saved import check_adapter_folder, checksum_of, drop_undeclared, local_folder, read_config
from .types import CONSTANT_FORMS, NORMS_WITH_VALUE, Form, Layers, Norm, Positions, Site

_DIRECTIONS = Path(__file__).parent / "directions"


@dataclass
class SteeringVectorConfig(PeftConfig):
    """A trainable vector in the residual stream: activation addition as a PEFT method.

    The default is the plain trained activation addition: one zero-initialised vector, added to the output of the
    block at two thirds of the depth, at every position.

    Args:
        form: What is added to the residual state `h` of shape `(d,)`; `v` is the write vector.
            `bias` `h + v` (ActAdd, Turner et al. 2308.10248; CAA, Rimsky et al. 2312.06681: a rank-one,
            input-independent update); `gated` `h + relu(w·h + b) v` (PSR, 2605.03907); `linear` `h + (w·h + b) v`;
            `low_rank` `h + Vᵀ(Wh + b)` with `rank` rows (DiReFT, Wu et al. 2404.03592). Every form starts as the
            `bias` form with the same vector (`w = 0`, `b = 1` for the first row). `span` `h + Σ cₖ bₖ`: only the
            coefficients c of existing vectors bₖ are trained, a few numbers that need few examples. `project`
            `h - (h·u) u` with `u = v / |v|`: the direction is removed from every state (Arditi et al. 2406.11717),
            exactly at strength 1, by half at 0.5. With `layers="all"` and `tied=True` it is gone everywhere.
        rank: Rows of `low_rank`; filled in for `span`; 1 for every other form.
        basis: The existing vectors of `span`: adapter folders, or one folder that contains them. They are read when
            the adapter is made, and saved with it.
        layers: Blocks counted from 0: an index, a fraction of the depth in [0, 1) (`0.5` of 30 layers is layer 15),
            a list of either, or `"all"`. After injection this holds the resolved indices.
        tied: One vector shared by all chosen layers.
        site: Where it is added: to the output of the `block` (the residual stream), of its `attention` or its `mlp`.
        norm: How the vector's length is constrained. `free`; `fixed` length `norm_value`; `capped`: the change at any
            position is at most `norm_value` long (Dunefsky & Cohan 2502.18862); `relative`: length is `norm_value`
            times the mean norm of the residual stream there (see `residual_norms`); `preserve`: free, and the steered
            state is rescaled to its old norm (ICV, Liu et al. 2311.06668); `learned`: `s · v / |v|`, whose length s is
            trained along with the direction (PrOSV, 2605.05983).
        norm_value: Length (`fixed`, `capped`) or share (`relative`).
        length_rate: The learning rate of the length (`learned`), as a multiple of the direction's.
        residual_norms: Mean norm of the residual stream per layer (key: the layer's index as a string). Needed by
            `norm="relative"`; the trainers and `Direction.write` fill it in.
        positions: Tokens that are steered: `all`, `completion`, `prompt` or `last_prompt`. Where the prompt ends is
            read from `labels`, from `generate`, or from `adapters.prompt_length`. In labels, -100 before a labelled
            token marks a prompt: a row of several answers (packed samples, chats) has a prompt before each answer.
        init: `zeros`, `random` (a random direction of length 1, Dunefsky & Cohan), or the name of a file in
            `adapters/directions/`, computed from data by the trainers or by `directions.compute(...).write(model)`.
        init_scale: Factor applied to the initial vector.
        stream_sizes: Typical size of the residual stream where each layer's vector is written (key: the layer's index
            as a string), the unit of learning rates (see `adapters/units.py`). Measured at injection of an adapter
            that is to be trained. `{}`: learning rates are absolute.
        base_fingerprint: Filled in at injection: identifies the base model. Loading on another base is an error; set
            it to None to transfer a vector on purpose.
        target_modules: Filled in from `layers` and `site`. For a model whose blocks cannot be found, give a regular
            expression that matches the full names of the modules whose output is to be steered. Their names are
            saved.
        modules_to_save: Other modules to train and save whole, as in every PEFT method.
        checksum: Filled in when PEFT saves the adapter: a checksum of this configuration and the weights, compared
            when the adapter is loaded. Set it to null in a file that was changed on purpose.
        init_weights: False starts from a random direction instead of zeros, so that the adapter has an effect before
            it is trained. It is the name that other PEFT methods use for `init="random"`.

    Without `task_type`, the task is that of the model. Sequence and token classifiers and models for question
    answering save their head (PEFT names it in `modules_to_save`), and all their positions are steered.

    Raises:
        ValueError: a value is out of its range; the message names it, the allowed values and the fix.
    """

    form: Form = field(default="bias")
    rank: int = field(default=1)
    basis: str | list[str] | None = field(default=None)
    layers: Layers = field(default=2 / 3)
    tied: bool = field(default=False)
    site: Site = field(default="block")
    norm: Norm = field(default="free")
    norm_value: float | None = field(default=None)
    length_rate: float = field(default=1.0)
    residual_norms: dict[str, float] | None = field(default=None)
    positions: Positions = field(default="all")
    init: str = field(default="zeros")
    init_scale: float = field(default=1.0)
    stream_sizes: dict[str, float] | None = field(default=None)
    base_fingerprint: dict[str, Any] | None = field(default=None)
    target_modules: str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    checksum: str | None = field(default=None)
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        self.task_type = None if self.task_type == AUTO else self.task_type
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.task_type = self.task_type or AUTO  # pyright: ignore[reportAttributeAccessIssue]
        for name, kind in (("form", Form), ("site", Site), ("norm", Norm), ("positions", Positions)):
            choose(name, getattr(self, name), get_args(kind))
        self._start_with_an_effect()
        self._check_layers()
        self._check_norm()
        self._check_init()
        self._check_types()
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be a whole number of at least 1.")
        if self.rank > 1 and self.form not in ("low_rank", "span"):
            raise ValueError(f"rank={self.rank} with form={self.form!r}: rank > 1 needs form='low_rank'.")
        if self.basis is not None and self.form != "span":
            raise ValueError(f"form={self.form!r} has no basis, got basis={self.basis!r}. Set form='span'.")

    def to_dict(self) -> dict[str, Any]:
        """Like the parent, with a task of None while the model is unknown."""
        values = super().to_dict()
        return {**values, "task_type": None if self.task_type == AUTO else self.task_type}

    @property
    def init_from_data(self) -> bool:
        """Whether the starting vector has to be computed from examples."""
        return self.init not in ("zeros", "random")

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters one steered layer holds: `v`, and for input-dependent forms `w` and `b`.

        For `span`, v holds the coefficients and w the fixed vectors; for `norm="learned"`, b holds the length.
        """
        if self.form == "project":
            return ("v",)
        if self.form in CONSTANT_FORMS:
            return ("v", *(["w"] if self.form == "span" else []), *(["b"] if self.norm == "learned" else []))
        return ("v", "w", "b")

    def parameter_shape(self, name: str, d: int) -> tuple[int, ...]:
        """Shape of parameter `v`, `w` or `b` in a residual stream of width `d`."""
        if name == "b" or (name == "v" and self.form == "span"):
            return (self.rank,)
        return (self.rank, d) if self.form in ("low_rank", "span") else (d,)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Read `adapter_config.json`, and check the weights in the same folder (see `check_adapter_folder`).

        Raises:
            TypeError: the file does not say which kind of adapter it is.
            ValueError: it is another kind of adapter, or its weights are not usable.
        """
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, SteeringVectorConfig):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(f"{pretrained_model_name_or_path} holds a {kind} adapter, not a steering vector.")
        hub_options = cls._split_kwargs(kwargs)[0]
        check_adapter_folder(local_folder(pretrained_model_name_or_path, subfolder, **hub_options), config)
        config.checksum = None  # it describes the file, and the vector may change
        config.basis = [] if config.form == "span" else None  # its vectors are in the file
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Like the parent, and also check that it is the configuration of a steering vector (see `read_config`)."""
        values = read_config(path_json_file)
        values.pop("runtime_config", None)  # like the parent
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Like the parent, and also write a checksum if `PeftModel` saves, which has already written the weights.

        transformers writes the weights afterwards, over those of an earlier save, so it gets no checksum. Embeddings
        that PEFT added because the vocabulary was resized belong to the base and are removed from the weights.
        """
        weights = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
        saved = copy.copy(self)
        saved.checksum = None
        if "auto_mapping_dict" in kwargs:
            kwargs["auto_mapping_dict"] = (
                None  # code to import for models without a task: never read, so never written
            )
        if "auto_mapping_dict" in kwargs and os.path.isfile(weights):
            drop_undeclared(weights, self)
            saved.checksum = checksum_of(saved.to_dict(), weights)
        super(SteeringVectorConfig, saved).save_pretrained(save_directory, **kwargs)

    def _check_layers(self) -> None:
        layers = [self.layers] if isinstance(self.layers, int | float | str) else self.layers
        if not layers:
            raise ValueError(
                f"layers={self.layers!r} steers nothing. Give an index, a fraction of the depth, a list, or 'all'."
            )
        if self.layers == "all":
            return
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int | float):
                raise ValueError(f"layers={self.layers!r}: {layer!r} is neither an index, a fraction nor 'all'.")
            if not layer >= 0 or (isinstance(layer, float) and layer >= 1):
                raise ValueError(
                    f"layers={self.layers!r}: {layer!r} is out of range. Indices are whole numbers from 0 "
                    "(model.layers[i]); fractions of the depth are in [0, 1)."
                )

    def _check_norm(self) -> None:
        if self.norm in NORMS_WITH_VALUE and not (_is_finite(self.norm_value) and self.norm_value > 0):
            raise ValueError(f"norm={self.norm!r} needs a finite norm_value > 0, got {self.norm_value!r}.")
        if self.norm not in NORMS_WITH_VALUE and self.norm_value is not None:
            raise ValueError(f"norm={self.norm!r} takes no norm_value, got {self.norm_value!r}. Remove it.")
        if not (_is_finite(self.length_rate) and self.length_rate > 0):
            raise ValueError(f"length_rate={self.length_rate!r} must be a finite number above 0.")
        if self.length_rate != 1 and self.norm != "learned":
            raise ValueError(f"norm={self.norm!r} trains no length, got length_rate={self.length_rate}. Remove it.")
        if self.norm == "learned" and self.form != "bias":
            raise ValueError(f"norm='learned' is defined for form='bias', got form={self.form!r}.")
        if self.form == "project" and self.norm != "free":
            raise ValueError(f"norm={self.norm!r} needs a length, but form='project' has none. Use norm='free'.")
        if self.form == "project" and (self.init == "zeros" or self.init_scale == 0):
            raise ValueError(
                f"form='project' needs a direction to start from, got init={self.init!r} times "
                f"init_scale={self.init_scale}: set init='random' or a direction."
            )
        if self.form == "span" and self.norm in ("fixed", "relative"):
            raise ValueError(f"norm={self.norm!r} is defined for one write vector, not for form='span'.")
        if self.norm in ("fixed", "relative", "learned"):
            if self.init == "zeros" or self.init_scale == 0:
                raise ValueError(
                    f"norm={self.norm!r} needs a direction to start from, got init={self.init!r} times "
                    f"init_scale={self.init_scale}: set init='random' or a direction."
                )
            if self.form == "low_rank":
                raise ValueError(f"norm={self.norm!r} is defined for one write vector, not for form='low_rank'.")

    def _check_types(self) -> None:
        """Check the types of values that PEFT and JSON accept without a check."""
        kinds = {
            "basis": str | list | None,
            "tied": bool,
            "target_modules": str | None,
            "checksum": str | None,
            "init": str,
        }
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                expected = getattr(kind, "__name__", str(kind))
                raise ValueError(f"{name}={value!r:.200} must be {expected}, got {type(value).__name__}.")
        names = self.modules_to_save
        if names is not None and not (isinstance(names, list) and all(isinstance(n, str) and n for n in names)):
            raise ValueError(
                f"modules_to_save={names!r:.200} must be a list of module names such as ['lm_head'], or None."
            )
        for name in ("residual_norms", "stream_sizes"):
            norms = getattr(self, name)
            if norms is not None and not (
                isinstance(norms, dict) and all(str(k).isdigit() and _is_finite(n) and n > 0 for k, n in norms.items())
            ):
                raise ValueError(
                    f"{name}={norms!r:.200} must map each layer to a finite number above 0, such as {{'15': 40.2}}. "
                    "With None, they are measured."
                )
        if self.base_fingerprint is not None:
            check_fingerprint_form(self.base_fingerprint)

    def _start_with_an_effect(self) -> None:
        """Apply PEFT's `init_weights=False`."""
        if not isinstance(self.init_weights, bool):
            kind = type(self.init_weights).__name__
            raise ValueError(f"init_weights={self.init_weights!r:.200} must be bool, got {kind}.")
        if not self.init_weights:
            if self.init not in ("zeros", "random"):
                raise ValueError(
                    f"init_weights=False starts from a random direction, but init={self.init!r} from another one. "
                    "Remove one of them."
                )
            self.init = "random"

    def _check_init(self) -> None:
        if not _is_finite(self.init_scale):
            raise ValueError(f"init_scale={self.init_scale!r} is not a finite number.")
        if self.init_from_data:
            directions = file_names(_DIRECTIONS)
            if self.init not in directions:
                hint = did_you_mean(self.init, ["zeros", "random", *directions])
                raise ValueError(f"init={self.init!r} is not 'zeros', 'random' or a direction {directions}.{hint}")


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
