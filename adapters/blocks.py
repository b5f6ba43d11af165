"""Find the decoder blocks of a model, and the attention and MLP inside a block, without a table of models."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from .types import Layers, Site

# The endings of class names of attention and MLP (or mixture-of-experts) modules.
_SITE_CLASSES = {
    "attention": re.compile(r"attention$", re.I),
    "mlp": re.compile(r"(mlp|moe|moeblock|moelayer|feedforward|ffn)$", re.I),
}
_PARALLEL_STREAMS = re.compile(r"altup$", re.I)  # Gemma 3n
_WIDTHS = ("out_features", "normalized_shape", "embedding_dim")
_ESCAPE = "Name the modules to steer yourself: target_modules=<regular expression matching their full names>."


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder, which is nested inside that of a vision-language model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"{type(model).__name__} has no transformers config, so its decoder blocks are unknown.")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; steering vectors need a decoder-only one."
        )
    return config.get_text_config()


def has_config(model: nn.Module) -> bool:
    """Whether a model has a transformers configuration, which gives its width and depth."""
    return hasattr(getattr(model, "config", None), "get_text_config")


def width_of(model: nn.Module, name: str, target: nn.Module) -> int:
    """The width of the steered module's output: the hidden size. Without a transformers configuration it is the width
    of the last submodule that has one.

    Raises:
        ValueError: no submodule has a width.
    """
    if has_config(model):
        return text_config(model).hidden_size
    for module in reversed(list(target.modules())):
        for attribute in _WIDTHS:
            width = getattr(module, attribute, None)
            if isinstance(width, int):
                return width
            if isinstance(width, tuple) and width:
                return int(width[-1])
    raise ValueError(
        f"Cannot determine the output width of {name} ({type(target).__name__}): no submodule has one of {_WIDTHS}. "
        "Choose target_modules that are, or end with, a layer such as nn.Linear or nn.LayerNorm."
    )


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`(full name, module)` of every decoder block, in order.

    The blocks are in the one `nn.ModuleList` with `num_hidden_layers` entries that is not inside another such list.

    Raises:
        ValueError: it is not a decoder-only transformers model, or no list or several lists fit.
    """
    depth = text_config(model).num_hidden_layers
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    text = {n: m for n, m in outer.items() if not re.search(r"vision|visual|audio", n)}
    if len(text) != 1:
        raise ValueError(
            f"Cannot identify the {depth} decoder blocks of {type(model).__name__}: candidates {list(text)}. {_ESCAPE}"
        )
    [(name, blocks)] = text.items()
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


def find_stack(model: nn.Module) -> nn.Module:
    """The module that owns the decoder blocks and runs them, from token ids to the last hidden states.

    Raises:
        ValueError: see `find_blocks`.
    """
    return model.get_submodule(find_blocks(model)[0][0].rpartition(".")[0].rpartition(".")[0])


def resolve_layers(layers: Layers, depth: int) -> list[int]:
    """Resolve a `layers` setting (see `SteeringVectorConfig`) to sorted, unique block indices.

    Raises:
        ValueError: the model does not have one of the layers.
    """
    if layers == "all":
        return list(range(depth))
    indices = set()
    assert not isinstance(layers, str)  # the config rejects every other string
    for layer in [layers] if isinstance(layers, int | float) else layers:
        # The small term maps 0.29 * 100 = 28.999999999999996 to layer 29.
        index = math.floor(layer * depth + 1e-9) if isinstance(layer, float) else layer
        if index >= depth:
            raise ValueError(
                f"layers={layers!r}: layer {index} does not exist, the model has {depth}: 0 to {depth - 1}."
            )
        indices.add(index)
    return sorted(indices)


def site_name(block_name: str, block: nn.Module, site: Site) -> str:
    """The full name of the module whose output is steered.

    Raises:
        ValueError: the block has no or several direct children whose class name ends like an attention (or MLP)
            module's, or it returns several streams.
    """
    if site == "block":
        if any(_PARALLEL_STREAMS.search(type(child).__name__) for child in block.children()):
            raise ValueError(
                f"{block_name} ({type(block).__name__}) returns several parallel streams (AltUp), so it has no "
                "single residual stream to steer. Use site='attention' or site='mlp'."
            )
        return block_name
    children = [n for n, child in block.named_children() if _SITE_CLASSES[site].search(type(child).__name__)]
    if len(children) != 1:
        kinds = {n: type(child).__name__ for n, child in block.named_children()}
        raise ValueError(
            f"Cannot identify the {site} module of {block_name} ({type(block).__name__}) among {kinds}. {_ESCAPE}"
        )
    return f"{block_name}.{children[0]}"


def index_of(name: str) -> int:
    """The block's index: the first number in the module's name."""
    match = re.search(r"\.(\d+)(?:\.|$)", f".{name}")
    return int(match[1]) if match else 0
