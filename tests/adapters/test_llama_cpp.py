"""An exported control vector does in llama.cpp what the vector does in transformers, within quantisation error."""

from __future__ import annotations

import llama_cpp
import pytest
import torch
from gguf_files import gguf

from steertune.adapters.exports import adapter_of, constant_vectors, get
from steertune.recipes.lab import embedded

pytestmark = [pytest.mark.slow, pytest.mark.real]
PROMPTS = ("The capital of France is", "Should I quit my job and travel the world?", "Write one sentence about rain.")


@pytest.fixture(scope="module")
def llama(real) -> llama_cpp.LlamaCpp:
    if why := llama_cpp.missing():
        pytest.skip(f"llama.cpp: {why}")
    return llama_cpp.LlamaCpp(embedded.gguf_file())


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize("layers", [[1], [15], [5, 20]])
def test_llama_cpp_adds_the_vector_where_transformers_does(layers, real, llama, tmp_path):
    model, tokenizer = real
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]

    @torch.no_grad()
    def ours(steered: torch.nn.Module) -> torch.Tensor:
        return torch.stack([steered(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0) for ids in prompts])

    def theirs(*file) -> torch.Tensor:
        return torch.stack([llama.logps(ids, *file) for ids in prompts])

    with torch.no_grad():
        states = model(input_ids=torch.tensor([prompts[1]]), output_hidden_states=True).hidden_states
    numbers = torch.Generator().manual_seed(0)
    vectors = {}
    for layer in layers:  # 0.3 of the residual stream there
        direction = torch.nn.functional.normalize(torch.randn(576, generator=numbers), dim=0)
        vectors[layer] = 0.3 * float(states[layer + 1][0, 1:].norm(dim=-1).mean()) * direction
    base = ours(model)
    steered = adapter_of(model, vectors).eval()
    try:
        get("gguf").write(constant_vectors(steered, 0.5), steered, tmp_path)
        expected = ours(steered)
    finally:
        steered.unload()
    shifted = adapter_of(model, {layer + 1: vector for layer, vector in vectors.items()}).eval()
    try:
        elsewhere = ours(shifted)
    finally:
        shifted.unload()
    found = theirs(tmp_path / "control-vector.gguf", 2.0)  # half the strength is baked in
    quantised = rms(theirs() - base)  # 4-bit weights and 8-bit activations, without any vector
    assert rms(expected - base) > 5 * quantised, "the vector moves log-probabilities"
    assert rms(found - expected) < 2 * quantised, "as in transformers"
    assert rms(found - elsewhere) > 3 * quantised, "and one block further it would not be"


def test_llama_cpp_refuses_layer_0(real, llama, tmp_path):
    file = gguf(tmp_path / "zero.gguf", "controlvector", {"direction.0": torch.ones(576)})
    with pytest.raises(ValueError, match=r"llama\.cpp refuses"):
        llama.logps([1, 2, 3], file)
