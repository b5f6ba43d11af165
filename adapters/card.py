"""The model card of an adapter: what it is for, what it did, what it costs, and what is not known about it.

PEFT's own card is a template of blanks. This one lists the measurements and names what was not measured. It keeps the
metadata that PEFT and the Hub put at its top, and PEFT keeps the text when it updates a card.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

MARK = "<!-- written by steertune: a card without this line is left as it is -->"
"""Part of every card that may be overwritten."""
UNKNOWN = "Not measured."
SAFETY = (
    "A steering vector changes what a model says without retraining it, and can undo refusals and other trained "
    "behaviour on the way, at negative strengths too. Check the steered model on what the base model was checked on "
    "before others use it. What is measured here holds for this base model, these layers and these strengths alone."
)
_PACKAGES = ("steertune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "scikit-learn")
_SWITCHES = ("form", "rank", "layers", "tied", "site", "norm", "norm_value", "positions", "init")
_GAP = "[More Information Needed]"  # in the template of Hugging Face
_TAGS = ["steering-vector", "steertune"]


@dataclass(frozen=True)
class Card:
    """Facts about an adapter beyond its configuration, as Markdown; the card reports None as unknown.

    Attributes:
        title: The heading.
        behaviour: What it makes the model do, and on what.
        problem: The question it was made for, with baselines and what would have counted against it.
        data: The data it was made from.
        made: How it was made.
        measured: Its effect on held-out rows.
        side_effects: Its effect on text that it should leave alone.
        advice: Which layer and strength to use, and how they were chosen.
        safety: What to check before others use it.
    """

    title: str = "Steering vector"
    behaviour: str | None = None
    problem: str | None = None
    data: str | None = None
    made: str | None = None
    measured: str | None = None
    side_effects: str | None = None
    advice: str | None = None
    safety: str = SAFETY


def write_card(folder: str | Path, card: Card, anyway: bool = False) -> Path | None:
    """Write the card of a saved adapter as its README.md, over PEFT's template or an earlier card of this kind.

    Args:
        folder: The folder of the adapter.
        card: The facts to print.
        anyway: Whether to replace a README that a person may have written.

    Returns:
        The file, or None if a README that a person wrote was left unchanged.

    Raises:
        FileNotFoundError: the folder holds no adapter.
    """
    home = Path(folder)
    config = json.loads((home / "adapter_config.json").read_text(encoding="utf-8"))
    file = home / "README.md"
    if file.is_file():
        existing = ModelCard.load(file)
        if not anyway and not replaceable(existing.text):
            return None
        data = existing.data
    else:
        data = ModelCardData()
    data["library_name"] = "peft"
    data["base_model"] = _on_the_hub(config)
    is_vector = config.get("peft_type") == "STEERING_VECTOR"
    kept = [tag for tag in data.get("tags") or [] if data["base_model"] or not tag.startswith("base_model:")]
    data["tags"] = sorted({*kept, *(_TAGS if is_vector else _TAGS[1:])})
    text = "\n".join(_lines(card, config, home.name)).strip()
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(file)
    return file


def replaceable(text: str) -> bool:
    """Whether a card may be overwritten: it is the unfilled template, or was written by `write_card`."""
    gaps = ModelCard.default_template_path.read_text(encoding="utf-8").count(_GAP)
    return MARK in text or text.count(_GAP) >= gaps


def versions() -> str:
    """The versions that a result was made with: Python, packages, device."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return ", ".join([f"Python {platform.python_version()}", *packages, f"on {device}"])


def _lines(card: Card, config: dict[str, Any], folder: str) -> list[str]:
    base = _on_the_hub(config) or Path(config.get("base_model_name_or_path") or "BASE").name
    sections = {
        "Behaviour": card.behaviour or "Not stated.",
        "Problem": card.problem or "No card of the problem was written.",
        "Data": card.data or "Not said.",
        "How it was made": card.made or "Not said.",
        "What it did on held-out rows": card.measured or UNKNOWN,
        "Side effects": card.side_effects or UNKNOWN,
        "Layer and strength": card.advice or "Not chosen by measurement. " + UNKNOWN,
    }
    lines = [f"# {card.title}", "", _what(config, base), ""]
    for title, text in sections.items():
        lines += [f"## {title}", "", text, ""]
    lines += ["## Use", "", "```python", *_use(config, base, folder), "```", ""]
    lines += _made_for(config)
    return [*lines, "## Safety", "", card.safety, "", "## Versions", "", f"{versions()}.", "", MARK]


def _on_the_hub(config: dict[str, Any]) -> str | None:
    """The name of the base model, or None if it is a folder on this machine."""
    name = config.get("base_model_name_or_path")
    return None if not name or Path(name).is_dir() else name


def _what(config: dict[str, Any], base: str) -> str:
    if config.get("peft_type") != "STEERING_VECTOR":
        return f"A PEFT adapter ({config.get('peft_type')}) for `{base}`."
    switches = ", ".join(f"`{name}={config[name]!r}`" for name in _SWITCHES if config.get(name) is not None)
    what = "taken out of" if config.get("form") == "project" else "added to"
    return f"A steering vector for `{base}`, {what} its residual stream: {switches}."


def _use(config: dict[str, Any], base: str, folder: str) -> list[str]:
    ours = config.get("peft_type") == "STEERING_VECTOR"
    lines = ["import steertune.adapters  # makes the method known to PEFT"] if ours else []
    lines += ["from peft import PeftModel", "from transformers import AutoModelForCausalLM"]
    lines += ["from steertune.adapters import set_strength"] if ours else []
    lines += ["", f'base = AutoModelForCausalLM.from_pretrained("{base}")']
    lines += [f'model = PeftModel.from_pretrained(base, "{folder}")  # or its name on the Hub']
    return [*lines, "set_strength(model, 1.0)  # 0 is the base model, negative the opposite"] if ours else lines


def _made_for(config: dict[str, Any]) -> list[str]:
    """The fingerprint, so that a reader can recognise the base by eye; loading compares it automatically."""
    fingerprint = config.get("base_fingerprint")
    if not fingerprint:
        return []
    sample = ", ".join(f"{value:g}" for value in (fingerprint.get("embedding") or [])[:6])
    return [
        "## Base model",
        "",
        f"Made for `{fingerprint.get('model_type')}` of width {fingerprint.get('hidden_size')} and "
        f"{fingerprint.get('num_layers')} layers, whose sampled embeddings begin "
        f"{sample or 'unknown (its weights were sharded)'}. Another base is refused when the adapter is loaded.",
        "",
    ]
