"""When the cached prefix is exact, how that is verified, when it is off, and how that is reported.

*Exact* means equal to the plain path up to rounding: 1e-6 in 32 bits, and 16-bit rounding in 16 bits. A pass under the
policy and one under the reference take the same path, so that an untrained adapter has a margin of 0.

1. *States below the suffix are constants of a row*, because nothing below is trained, adapted, hooked or random. A
   short pass lists the modules that run below; `check_frozen` and `check_hooks` look at each of them. A second pass
   in training mode must draw no random number and give the same states (`draws`).
2. *The suffix needs only those states*, because a block reads the residual stream and nothing else. The shortest and
   the longest row of the first batch run both ways and are compared (`Proofs.make`, `difference`).
3. *Rows can be packed into one line and share common prefixes*, because blocks treat tokens one by one, and attention
   is causal and knows where rows begin. Compared like 2, for rows of equal and of different lengths, and again when
   rows are twice as long.
4. *A prompt can run separately from what follows it*, because attention is causal. Compared like 3.
5. *New rows can run together*, because the bits of each do not depend on the others (`new_rows.py`): matrix products
   have the same bits at any number of tokens (`least_tokens`), or always get the same number of tokens. Three rows of
   the first batch are compared bit by bit.
6. *A tensor that is read again is the one that was computed*, because its key is a digest of weights, settings,
   precision and row. On disk its bytes have a digest, too.

Because of 5, stored values do not depend on the batch in which a row was first seen, so a resumed run reads the same
bits.

It is off, and a message names the reason, with dropout or noise below the suffix (NEFTune, router jitter),
embeddings that are trained or adapted, layers that are unfrozen or adapters that are added during a run, reentrant
gradient checkpointing, losses that read hidden states, inputs other than tokens, rows beyond the original context of a
dynamic RoPE, `torch.compile`, and sharded weights. After an error inside, the pass is repeated without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.observing import ADAPTER_LAYERS, training

logger = logging.getLogger(__name__)
_SILENCE = "This only costs time. frozen_prefix=False trains in the same way without this message"
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOKENS = 8  # enough to see which modules run, and how
# Numbers of tokens for which matrix products are tested, to cover every remainder of the kernels' tiles.
_TRIED_TOKENS = (*range(4, 13), 15, 16, 17, 19, 25, 27, 32, 33, 47, 64, 65, 100, 129, 200, 255, 300, 511)


class NoPrefix(ValueError):
    """Raised when nothing below the trained parameters is frozen or can be cached; the message gives the reason."""


class Unknown(ValueError):
    """Raised when a model gets an input that is not part of a row's key; the message names it."""


# -- notices ----------------------------------------------------------------------------------------------------


class Notices:
    """Log why something is not skipped: each reason once per run, on one process.

    Args:
        level: Level of the messages.
        visible: Whether the first message that the prefix is off is a warning, whatever the level.
    """

    def __init__(self, level: int, visible: bool = False) -> None:
        self._level, self._visible = level, visible
        self._logged: set[str] = set()

    def off(self, why: object) -> None:
        """Log that the lower layers run in every pass, because of `why`."""
        level = logging.WARNING if self._visible else self._level
        self._visible = False
        self._log(level, f"The frozen prefix is off: {why}. {_SILENCE}")

    def failed(self, what: str, error: str) -> None:
        """Log that `what` raised an `error` that the plain path did not. This is a bug here, so always a warning."""
        self._visible = False
        self._log(logging.WARNING, f"The frozen prefix is off: {what} failed with {error}. {_SILENCE}")

    def less(self, why: object) -> None:
        """Log that less is skipped than is possible, because of `why`."""
        self._log(self._level, f"The frozen prefix: {why}")

    def _log(self, level: int, text: str) -> None:
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if first and text not in self._logged:
            self._logged.add(text)
            logger.log(level, "%s.", text)


def in_words(error: BaseException) -> str:
    """The text of an error; its traceback would keep the tensors of the failed pass alive."""
    return f"{type(error).__name__}: {error}".removesuffix(".")


# -- what runs below the suffix is constant --------------------------------------------------------------------------


def check_frozen(modules: Iterable[tuple[str, nn.Module]], training: bool, random: bool) -> None:
    """Refuse modules below the suffix that are trained, adapted, random, sharded or offloaded.

    Args:
        modules: Names and modules that a forward pass ran before it reached the suffix.
        training: Whether parameters that require gradients will change.
        random: Whether dropout will be active.

    Raises:
        NoPrefix: the message names the module and what is wrong with it.
    """
    for name, module in modules:
        # adapters change a module's output even if they are not trained
        if isinstance(module, ADAPTER_LAYERS):
            raise NoPrefix(f"{name} below the trained layers has an adapter")
        # a value that is computed only once cannot be random
        if random and (rate := dropout(module)):
            raise NoPrefix(f"{name}.{rate} below the trained layers makes its output random. Set it to 0")
        # weights that change, or that are not on this process
        for key, parameter in module.named_parameters(recurse=False):
            if training and parameter.requires_grad:
                raise NoPrefix(f"{name}.{key} below the trained layers is trained. Freeze it, or train an adapter")
            if parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh"):
                raise NoPrefix(f"{name}.{key} is sharded or offloaded: all processes must run the same layers")


def dropout(module: nn.Module) -> str | None:
    """The module's own dropout rate above 0, as `name=value`, if it has one (layer drop too)."""
    # rates are attributes of the module, or of a Dropout inside it
    attributes = vars(module)
    rates = {key: value for key, value in attributes.items() if "drop" in key}
    if "drop" in type(module).__name__.lower():
        rates["p"] = attributes.get("p")
    return next((f"{key}={value}" for key, value in rates.items() if isinstance(value, float) and value > 0), None)


def check_hooks(modules: Iterable[nn.Module]) -> None:
    """Refuse a hook below the suffix: its effect is not part of any key, and it may be gone in the next pass.

    Hooks of transformers only record, and ours are known. Gradient checkpointing registers one on the embeddings, so
    that their output requires a gradient (transformers, PEFT and TRL give it the same name).

    Raises:
        NoPrefix: the message names the module.
    """
    for module in modules:
        # torch has no public API for this
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if "make_inputs_require_grad" in getattr(hook, "__qualname__", ""):
                continue
            owner = str(getattr(getattr(hook, "func", hook), "__module__", ""))
            if not owner.startswith(("transformers.utils.output_capturing", "steertune.")):
                raise NoPrefix(f"a {type(module).__name__} below the trained layers has a forward hook")


# -- what depends on other rows -------------------------------------------------------------------------------------


def has_experts(config: Any) -> bool:
    """Whether tokens are sent to experts, whose matrix products depend on how many other tokens were."""
    return any(getattr(config, name, None) for name in _EXPERTS)


def is_wide(modules: Iterable[nn.Module]) -> bool:
    """Whether a token's bits can be the same however many tokens run with it.

    If a width is not a multiple of 64, the last elements of a row are not computed by vector instructions (SiLU then
    rounds differently), and for narrow matrices the kernel depends on how many tokens there are.
    """
    weights = [p for module in modules for p in module.parameters(recurse=False) if p.ndim == 2]
    return bool(weights) and all(size % 64 == 0 and size >= 128 for weight in weights for size in weight.shape)


@torch.no_grad()
def least_tokens(modules: Iterable[nn.Module]) -> int | None:
    """The number of tokens above which every linear layer gives a token the same bits, however many tokens it gets.

    A kernel is chosen by the size of the product and the number of threads, and each can sum in a different order.

    Returns:
        The number, at most 64; None if no such number exists.
    """
    layers = {(m.weight.shape, m.weight.dtype): m for m in modules if type(m) is nn.Linear}
    least = _TRIED_TOKENS[0]
    for layer in layers.values():
        # a separate generator, so that the random numbers of training do not change
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(512, layer.in_features, generator=generator).to(layer.weight)
        output_TD = layer(x_TD)
        # tokens from the middle, like those of packed rows
        differ = [n for n in _TRIED_TOKENS if not torch.equal(layer(x_TD[1 : n + 1].clone()), output_TD[1 : n + 1])]
        if differ:
            larger = [n for n in _TRIED_TOKENS if n > differ[-1]]
            # above 64 most rows would run alone anyway
            if not larger or larger[0] > 64:
                return None
            least = max(least, larger[0])
    return least


def beyond_window(config: Any, columns: int) -> bool:
    """Whether a sliding window would have to know how far apart tokens are, which a padded cache changes."""
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return any(isinstance(window, int) and columns > window for window in windows)


def original_context(config: Any) -> int | None:
    """Tokens beyond which the frequencies of a dynamic RoPE depend on the longest row of a batch; None if they never
    do."""
    # some models have one rope for each kind of layer
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given] if "rope_type" in given else [kind for kind in given.values() if isinstance(kind, dict)]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if "dynamic" in str(kind.get("rope_type")) or kind.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


# -- equal up to rounding, and random numbers ------------------------------------------------------------------------


def difference(plain: Tensor, ours: Tensor, real: Tensor | None = None) -> float | None:
    """The largest difference over the largest state, or None if that is rounding (the root of the precision's eps).

    Args:
        plain: States, `(rows, tokens, d)`.
        ours: The same states, computed with a shortcut.
        real: The tokens to compare, `(rows, tokens)`; None for all.
    """
    if real is not None:
        plain, ours = plain[real], ours[real]
    device = plain.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else plain.dtype
    # relative to the largest state: massive activations round by more than others are large
    apart = float((plain - ours).abs().max() / plain.abs().max())
    return None if apart <= torch.finfo(dtype).eps ** 0.5 else apart  # NaN is not rounding either


def draws(model: nn.Module, row: Mapping[str, Tensor], run: Callable[[Mapping[str, Tensor]], Any]) -> tuple[Any, bool]:
    """The output of `run` for the last tokens of a row in training mode, and whether it drew a random number.

    Args:
        model: The model, which is put in training mode.
        row: Inputs of one row, `(1, tokens)`, with no padding at the end.
        run: A pass of the model.
    """
    device = row["input_ids"].device
    devices = [device] if device.type == "cuda" else []
    with training(model), torch.random.fork_rng(devices), torch.no_grad():
        # drawing a random number changes the state of a generator
        before = _states(devices)
        output = run(last_tokens(row))
        return output, not all(map(torch.equal, before, _states(devices)))


def draws_again(device: torch.device) -> Callable[[], None]:
    """A function that resets the generators to their current state, so that the next random numbers are drawn again.

    Args:
        device: The device on which the model runs.
    """
    devices = [device] if device.type == "cuda" else []
    before = _states(devices)

    def rewind() -> None:
        torch.set_rng_state(before[0])
        for device, state in zip(devices, before[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    return rewind


def last_tokens(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last tokens of a row: enough to see which modules run, and how."""
    return {name: value[:, -_TOKENS:] for name, value in row.items()}


def _states(devices: Sequence[torch.device]) -> list[Tensor]:
    """The states of the random number generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
