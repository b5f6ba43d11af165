"""Look at an adapter after it was written: sharded set-ups can leave an empty or partial one, without an error."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

_CHECKED = (
    "steering_vector_",
    "lora_A",
    "lora_B",
)  # saved under their own name and whole; others have rules of theirs
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class IncompleteAdapterError(RuntimeError):
    """A saved adapter does not hold what was trained."""


def adapter_folder(model: nn.Module, folder: Path) -> Path:
    """Where PEFT saves the active adapter of a model in a folder: adapters not named `default` have one of theirs."""
    name = str(model.active_adapter) if isinstance(model, PeftModel) else "default"
    return folder if name == "default" else folder / name


def check_saved(model: nn.Module, folder: Path) -> None:
    """Compare the names and shapes in an adapter's file with the trained parameters in their full size.

    Raises:
        IncompleteAdapterError: the file is not there, or weights are missing from it or cut.
    """
    expected = _full_shapes(model)
    if not expected:
        return
    file = adapter_folder(model, folder) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        if (folder / "pytorch_model_fsdp_0").is_dir():
            raise IncompleteAdapterError(
                f"{folder} holds shards and no adapter. Set fsdp_state_dict_type: FULL_STATE_DICT."
            )
        raise IncompleteAdapterError(f"{file} was not written: the adapter is not saved.")
    with safe_open(file, "pt") as saved:
        names = set(saved.keys())
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in names & expected.keys()}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise IncompleteAdapterError(
                f"{file}: {name} has shape {shapes.get(name, 'none: it is missing')}, and {shape} were trained. Under "
                "ZeRO-3 set zero3_save_16bit_model: true, under FSDP fsdp_state_dict_type: FULL_STATE_DICT, and call "
                "save_model on every process."
            )


def _full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name in the file -> full shape, of the active adapter's trained vectors and LoRA factors."""
    if not isinstance(model, PeftModel):
        return {}
    active, found = str(model.active_adapter), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f".{active}." in f"{name}." and any(part in name for part in _CHECKED):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            # ZeRO-3 leaves an empty tensor in the place of a parameter; of a DTensor, the shape is the full one
            found[name.replace(f".{active}", "", 1)] = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return found
