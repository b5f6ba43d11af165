"""The module that is attached to a steered block and adds the vector to its output."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import units
from .config import SteeringVectorConfig
from .forms import change, null
from .norms import cap, preserve, write_vector
from .outputs import states_in, with_states
from .parameter import Frozen, Vector
from .positions import PromptBoundary
from .types import GATELESS_FORMS, Positions, Strength

BASE_ROW = "__base__"  # PEFT's name, in `adapter_names`, for a row without an adapter


def check_adapter_name(name: str) -> None:
    """Check that PyTorch can register a module under an adapter's name.

    Raises:
        ValueError: it is empty, contains a ".", or is the name of an attribute of `nn.ModuleDict`.
    """
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r:.80} cannot be the name of an adapter: it must not be empty, contain a '.', or be an attribute "
            "of nn.ModuleDict, such as 'keys' or 'type'. Choose another name."
        )


class SteeringVectorLayer(nn.Module, BaseTunerLayer):
    """Steering vectors, one per adapter, for the output of one module.

    It is a child of the steered module, not a wrapper around it: the model's own layers keep their class, so that
    hidden-state capture, LoRA on the same layers and FSDP wrap policies find what they expect. A forward hook on the
    parent calls it.

    Vectors are NaN, which means missing, until they are initialised or loaded.
    """

    adapter_layer_names = ("steering_vector_v", "steering_vector_w", "steering_vector_b")
    other_param_names = ("config", "strength", "tied_to")

    def __init__(self, hidden_size: int, layer_index: int, boundary: PromptBoundary) -> None:
        super().__init__()
        self.steering_vector_v = nn.ModuleDict()
        self.steering_vector_w = nn.ModuleDict()
        self.steering_vector_b = nn.ModuleDict()
        self.config: dict[str, SteeringVectorConfig] = {}
        self.strength: dict[str, Strength] = {}
        self.tied_to: dict[str, SteeringVectorLayer] = {}
        self.in_features = self.out_features = hidden_size
        self.layer_index = layer_index
        self.boundary = boundary
        self.handle: RemovableHandle  # of the hook on the steered module
        self.merged_adapters: list[str] = []
        self._checked: set[str] = set()

    # -- parameters ---------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        config: SteeringVectorConfig,
        device: torch.device,
        owner: SteeringVectorLayer | None,
        basis: Tensor | None = None,
    ) -> None:
        """Create the parameters of adapter `name`, or share those of `owner` (tied layers).

        Args:
            name: The adapter.
            config: Its configuration.
            device: Device of the parameters.
            owner: The layer that holds the vector of tied layers.
            basis: The fixed vectors of `form="span"`, `(rank, d)`; None if they are loaded later.

        Raises:
            ValueError: `rank` is greater than the width of the residual stream.
        """
        if config.rank > self.in_features:
            raise ValueError(
                f"rank={config.rank} must be at most {self.in_features}, the width of the residual stream."
            )
        self.config[name], self.strength[name] = config, 1.0
        self._checked.discard(name)
        if owner is not None:
            self.tied_to[name] = owner
            return
        for parameter in config.parameter_names:
            shape = config.parameter_shape(parameter, self.in_features)
            frozen = config.form == "span" and parameter == "w"
            self._vectors(parameter)[name] = Frozen(shape, device) if frozen else Vector(shape, device)
        if basis is not None:
            self.parameter(name, "w").data.copy_(basis)
        self.set_units(name)
        if not config.inference_mode:
            self.initialise(name)

    @torch.no_grad()
    def initialise(self, name: str, direction: Tensor | None = None) -> None:
        """Set the parameters so that every form starts as the `bias` form with the same vector.

        Without a `direction`, an `init` that needs data leaves `v` missing (NaN).
        """
        config = self.config[name]
        v = self.parameter(name, "v")
        if direction is None and not config.init_from_data:
            direction = torch.zeros(self.in_features)
            if config.init == "random":
                direction = nn.functional.normalize(torch.randn(self.in_features), dim=0)
        v.zero_()
        start = torch.full((self.in_features,), torch.nan) if direction is None else direction * config.init_scale
        if config.form == "span":  # the coefficients of the nearest vector in the span
            w_KD = self.parameter(name, "w")
            v.copy_(torch.linalg.lstsq(w_KD.double().T, start.to(w_KD).double()[:, None]).solution[:, 0].to(v))
        else:
            # The first row writes the vector; the other rows of a low-rank form write nothing yet.
            v.reshape(-1, self.in_features)[0] = start.to(v)
        if config.norm == "learned":
            self.parameter(name, "b").fill_(torch.linalg.vector_norm(v))
        self.fit_length(name)
        if config.form == "project" and (size := (config.stream_sizes or {}).get(str(self.layer_index))):
            # Its length is free. At the size of the stream, a step turns it as far as it would move a vector.
            v.copy_(nn.functional.normalize(v, dim=0) * size)
        if config.form not in GATELESS_FORMS:
            w, b = self.parameter(name, "w"), self.parameter(name, "b")
            w.zero_()
            b.zero_()
            b[0] = 1.0
            if config.rank > 1:  # the other rows start at random, because equal rows would have equal gradients
                nn.init.kaiming_uniform_(w[1:], a=5**0.5)
                if size := (config.stream_sizes or {}).get(str(self.layer_index)):
                    w[1:] *= self.in_features**0.5 / size  # so that gates are of order 1 on every model
        for kind in config.parameter_names:
            vector = self._vector(name, kind)
            vector.exact = vector.weight.detach().float().clone()
        self._checked.discard(name)

    @torch.no_grad()
    def fit_length(self, name: str) -> None:
        """Rescale the parameter to the length that `norm` prescribes, if it is known, so that a step turns it as far
        as it would move a free vector."""
        config = self.config[name]
        if config.norm == "fixed" or (config.norm == "relative" and config.residual_norms):
            self.parameter(name, "v").copy_(self.written(name))

    def _vectors(self, kind: str) -> nn.ModuleDict:
        return {"v": self.steering_vector_v, "w": self.steering_vector_w, "b": self.steering_vector_b}[kind]

    def _vector(self, name: str, kind: str) -> Vector:
        vector: Any = self.tied_to.get(name, self)._vectors(kind)[name]  # FSDP may have wrapped it
        return vector

    def parameter(self, name: str, kind: str) -> Tensor:
        """Parameter `v`, `w` or `b` of adapter `name`, looked up at call time (FSDP2 replaces Parameter objects)."""
        return self._vector(name, kind).weight

    def value(self, name: str, kind: str) -> Tensor:
        """The same parameter for the forward pass, with its gradient in units of the stream (see `units`)."""
        return units.value(self._vector(name, kind))

    def set_units(self, name: str) -> None:
        """Express the parameters of adapter `name` in units of the stream for optimisers, if its size is known."""
        config = self.config[name]
        if name in self.tied_to:
            return
        sizes = config.stream_sizes or {}
        # A tied vector is written at several layers, so it takes their median size.
        size = statistics.median(sizes.values()) if config.tied and sizes else sizes.get(str(self.layer_index))
        for kind in config.parameter_names:
            vector = self._vector(name, kind)
            if size is None or isinstance(vector, Frozen):
                vector.unit = None
            elif config.form == "span":  # a change of a coefficient moves the vector by that times a fixed vector
                norms = torch.linalg.vector_norm(self.parameter(name, "w").detach(), dim=-1)
                vector.unit = units.length_unit(size, len(sizes)) / float(norms.median())
            elif config.norm == "learned" and kind == "b":
                vector.unit = config.length_rate * units.length_unit(size, len(sizes))
            else:
                vector.unit = units.unit_of(kind, size, self.in_features, len(sizes))

    def written(self, name: str) -> Tensor:
        """The write vector(s) of adapter `name`, with the length set by `norm`."""
        config = self.config[name]
        v = self.value(name, "v")
        if config.form == "span":
            v = v @ self.value(name, "w")
        length = self.value(name, "b") if config.norm == "learned" else None
        return write_vector(config.norm, v, config.norm_value, self._residual_norm(config), length)

    def train(self, mode: bool = True) -> SteeringVectorLayer:
        """Like the parent, and also undo a cast of the vectors to half precision before they are trained: TRL casts
        every trained parameter on a quantised base."""
        if mode:
            for module in self.modules():
                if isinstance(module, Vector):
                    module.restore_fp32()
        return super().train(mode)

    # -- forward ------------------------------------------------------------------------------------------------

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the steered module. Its output is a tensor or a tuple that starts with one."""
        hidden = states_in(output)
        if not isinstance(hidden, Tensor) or hidden.shape[-1] != self.in_features:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(
                f"{type(module).__name__} returned {shape}, not residual states of width {self.in_features}. "
                "It is not a decoder block: choose other layers, another site or other target_modules."
            )
        if hidden.ndim > 3:
            raise ValueError(
                f"{type(module).__name__} returned states of shape {tuple(hidden.shape)}: several parallel streams, "
                "not one (rows, tokens, width). Choose site='attention' or site='mlp', or other target_modules."
            )
        steered = self(hidden)
        if steered is hidden:
            return None
        return with_states(output, steered)

    def forward(
        self,
        hidden: Tensor,
        adapter_names: list[str] | None = None,
        strengths: list[float] | None = None,
        positions: list[Positions | None] | None = None,
    ) -> Tensor:
        """Steer `(rows, tokens, d)`: every row by all active adapters in turn, or row `i` by `adapter_names[i]` at
        strength `strengths[i]` and at `positions[i]` (None: those of its configuration)."""
        if self.disable_adapters:
            return hidden
        if adapter_names is None:
            for name in self.active_adapters:
                hidden = self._steer(name, hidden)
            return hidden
        if len(adapter_names) != len(hidden):
            raise ValueError(  # PEFT's wording, as for LoRA
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(hidden)} respectively. Give one per row."
            )
        times = torch.tensor(strengths or [1.0] * len(hidden), device=hidden.device)[:, None, None]
        chosen = list(zip(adapter_names, positions or [None] * len(hidden), strict=True))
        for name, where in sorted({pair for pair in chosen if pair[0] != BASE_ROW}, key=str):
            rows = torch.tensor([i for i, pair in enumerate(chosen) if pair == (name, where)], device=hidden.device)
            hidden = hidden.index_copy(0, rows, self._steer(name, hidden[rows], rows, times[rows], where))
        return hidden

    def _steer(
        self,
        name: str,
        hidden: Tensor,
        rows: Tensor | None = None,
        times: Tensor | float = 1.0,
        positions: Positions | None = None,
    ) -> Tensor:
        config = self.config.get(name)
        strength = self.strength.get(name, 1.0)
        if config is None or strength == 0.0:
            return hidden
        self._check_filled(name)
        mask = self.boundary.mask(positions or config.positions, hidden)
        if strength == "null":
            steered = hidden + null(hidden, self.written(name))
        else:
            # The sum is in fp32, because the vector is.
            steered = hidden + strength * times * self._change(name, hidden)
            if config.norm == "preserve":
                steered = preserve(steered, hidden)
        steered = steered.to(hidden.dtype)
        if mask is None:
            return steered
        return torch.where(mask if rows is None else mask[rows], steered, hidden)

    def _change(self, name: str, hidden: Tensor) -> Tensor:
        config = self.config[name]
        gateless = config.form in GATELESS_FORMS
        w, b = (None, None) if gateless else (self.value(name, "w"), self.value(name, "b"))
        delta = change(config.form, hidden, self.written(name), w, b)
        if config.norm != "capped":
            return delta
        assert config.norm_value is not None
        return cap(delta, config.norm_value)

    def _residual_norm(self, config: SteeringVectorConfig) -> float | None:
        if config.norm != "relative":
            return None
        norms = config.residual_norms or {}
        if str(self.layer_index) not in norms:
            raise ValueError(
                f"norm='relative' needs the mean residual norm of layer {self.layer_index}; known: {sorted(norms)}. "
                "Train with a steertune trainer, write a Direction, or set residual_norms in the config."
            )
        return norms[str(self.layer_index)]

    def _check_filled(self, name: str) -> None:
        """Refuse missing (NaN) and infinite vectors, once per adapter."""
        if name in self._checked or torch.compiler.is_compiling():
            return
        config = self.config[name]
        for kind in config.parameter_names:
            # Detached, because gradient checkpointing must save the same tensors in its second forward pass.
            if torch.isfinite(self.parameter(name, kind).detach()).all():
                continue
            why = (
                f"init={config.init!r} needs data: use a steertune trainer, or "
                f"directions.compute({config.init!r}, ...).write(model)"
                if config.init_from_data and not config.inference_mode
                else "its values are missing in the adapter file, or not finite"
            )
            raise ValueError(f"Steering vector {name!r} at layer {self.layer_index} has no usable {kind}: {why}.")
        self._checked.add(name)

    # -- PEFT ---------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """A steering layer wraps nothing, so it has no base weight. (PEFT's default would recurse forever.)"""
        raise AttributeError("weight")

    @property
    def bias(self) -> Tensor:
        """See `weight`."""
        raise AttributeError("bias")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises a NotImplementedError that gives the reason."""
        raise NotImplementedError(NO_MERGE)


def steering_layers(model: nn.Module, name: str | None = None) -> list[SteeringVectorLayer]:
    """Every steering layer of a model, or those of adapter `name`."""
    layers = (module for module in model.modules() if isinstance(module, SteeringVectorLayer))
    return [layer for layer in layers if name is None or name in layer.config]


NO_MERGE = (
    "A steering vector cannot be merged: most architectures have no bias where the residual stream is written, and "
    "one added in memory is dropped silently by save and reload. Keep the adapter (it is a few kilobytes)."
)
