"""The embedded real model: an ordinary model once loaded, and one that steering means something to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measuring import margins
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from steertune.adapters import SteeringVectorConfig, directions
from steertune.recipes.lab import embedded
from steertune.recipes.lab.data import load_splits
from steertune.recipes.lab.generation import generate
from steertune.recipes.lab.tables import DataTable
from steertune.trainers import collator, tokenise

pytestmark = pytest.mark.real


def test_it_saves_and_loads_like_any_model(tmp_path: Path) -> None:
    model = embedded.load_model()
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    assert next(model.parameters()).dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 520, 28, 11]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_the_unpacked_copy_is_named_by_what_the_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    monkeypatch.setitem(embedded.FILES, "smollm2", lambda: file)
    names = []
    for content in (b"a" * 3_000_000, b"a" * 3_000_000, b"a" * 2_999_999 + b"b", b"b" + b"a" * 2_999_999, b"a"):
        file.unlink(missing_ok=True)  # every installation writes a file of its own
        file.write_bytes(content)
        names.append(embedded.copy_folder())
    assert names[0] == names[1] and len({*names}) == 4


def test_it_speaks(real) -> None:
    model, tokenizer = real
    prompts = [
        [{"role": "user", "content": f"What is the capital of {land}?"}] for land in ("France", "the country Italy")
    ]
    answers = generate(model, tokenizer, prompts, new_tokens=12)
    assert "Paris" in answers[0]
    assert "Rome" in answers[1], "the longer prompt is in the same left-padded batch"


def test_the_mean_difference_of_eight_pairs_steers_held_out_ones() -> None:
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    train, test = load_splits(DataTable(name="warm_tone", train=8, test=6))
    rows = tokenise(train, tokenizer)
    batches = [collator(rows, tokenizer)(rows.to_list())]
    steered = get_peft_model(model, SteeringVectorConfig(layers=15, init="mean_difference"))
    directions.compute("mean_difference", steered, batches, layers=15).write(steered)
    found = {strength: margins(steered.eval(), tokenizer, test, strength) for strength in (-4.0, 0.0, 4.0)}
    assert found[4.0].mean() > found[0.0].mean() + 5 > found[-4.0].mean() + 10
    assert (found[4.0] > 0).mean() > (found[0.0] > 0).mean()
