"""Mixed batches: every request gets what it would get alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_data
import torch
from pydantic import ValidationError
from tiny_models import fill, steered, tiny, tokens

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.recipes import cli
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.generation import generate
from steertune.recipes.serve import Request, Server, load_vectors

SAY = [
    dict(prompt="the cat"),
    dict(prompt="a dog runs now the sky", vector="warm", strength=-2.5),
    dict(prompt="the cat", vector="careful"),
    dict(prompt=[{"role": "user", "content": "we go"}], vector="careful", strength=3.0, new_tokens=9),
    dict(prompt="red", vector="warm", strength=0.0, new_tokens=1),
    dict(prompt="the cat sits", vector="warm", temperature=1.5, seed=4),
    dict(prompt="the cat sits", vector="warm", temperature=1.5, seed=5, new_tokens=12),
]


SIZES = dict(max_position_embeddings=128, vocab_size=len(tiny_data.SPECIAL + tiny_data.WORDS))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base with a tokenizer, and two vectors."""
    home = tmp_path_factory.mktemp("serve")
    base = tiny(**SIZES)
    base.save_pretrained(home / "base")
    tiny_data.tokenizer().save_pretrained(home / "base")
    for name, switches in (("careful", dict(layers=[1, 2])), ("warm", dict(layers=3, norm="capped", norm_value=4.0))):
        model = steered(tiny(**SIZES), seed=len(name), **switches)
        model.peft_config["default"].base_model_name_or_path = str(home / "base")
        model.save_pretrained(home / name)
    return home


@pytest.fixture(scope="module")
def server(home) -> Server:
    return Server(*load_vectors({"careful": home / "careful", "warm": home / "warm"}), batch=4)


def test_an_answer_does_not_depend_on_the_batch(server):
    requests = [Request(**{"new_tokens": 6, **say}) for say in SAY]
    mixed = server.answers(requests)
    assert mixed == [server.answers([request])[0] for request in requests]
    assert mixed[::-1] == server.answers(requests[::-1])
    assert len(set(mixed)) >= 5, "vectors, strengths and seeds say different things"
    assert all(len(a.split()) <= r.new_tokens for a, r in zip(mixed, requests, strict=True))


def test_an_answer_is_generation_at_that_strength(server):
    """Against `set_strength` and plain greedy generation, one request at a time."""
    model, words = server.model, server.tokenizer
    for say in SAY[1:4]:
        request = Request(**{"new_tokens": 6, **say})
        model.set_adapter(request.vector)
        with set_strength(model, request.strength, request.vector):
            assert server.answers([request.model_copy(update={"strength": 1.0})]) == generate(
                model, words, [request.prompt], request.new_tokens
            )
        assert server.answers([request]) != server.answers([request.model_copy(update={"vector": None})])
    with model.disable_adapter():
        assert generate(model, words, ["the cat"], 6) == server.answers([Request(prompt="the cat", new_tokens=6)])


def test_sampling_follows_the_softmax(server):
    """Draws of the first token against its probabilities."""
    requests = [Request(prompt="the cat", temperature=1.0, seed=seed, new_tokens=1) for seed in range(400)]
    with server.model.disable_adapter(), torch.no_grad():
        ids = torch.tensor([server.tokenizer("the cat")["input_ids"]])
        probabilities = server.model(input_ids=ids).logits[0, -1].softmax(0)
    word = int(probabilities[len(tiny_data.SPECIAL) :].argmax()) + len(tiny_data.SPECIAL)
    text, chance = server.tokenizer.decode([word]), float(probabilities[word])
    wide = Server(server.model, server.tokenizer, batch=100)
    share = sum(answer == text for answer in wide.answers(requests)) / len(requests)
    assert abs(share - chance) < 4 * (chance * (1 - chance) / len(requests)) ** 0.5


@pytest.mark.parametrize(
    "switches", [{}, {"norm": "preserve"}, {"form": "gated"}, {"norm": "capped", "norm_value": 1}]
)
def test_rows_with_strengths_are_rows_apart(switches):
    """`adapter_names=["default@2", ...]`, in a forward pass."""
    model, ids = steered(layers=[1, 2], **switches), tokens(rows=4)
    model.add_adapter("other", SteeringVectorConfig(layers=3))
    fill(model, "other", seed=3)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["default@2", "other@-1.5e0", "__base__", "default"]).logits
        for row, (name, strength) in enumerate([("default", 2), ("other", -1.5), ("default", 0), ("default", 1)]):
            model.set_adapter(name)
            with set_strength(model, strength, name):
                assert torch.allclose(mixed[row : row + 1], model(input_ids=ids[row : row + 1]).logits, atol=1e-5), row


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default@much", "default"], "'much' is not a finite strength"),
        (["default@nan", "default"], "'nan' is not a finite strength"),
        (["defalt@2", "default"], r"non-existing adapter\(s\): defalt@2"),
        (["__base__@2@", "default"], "non-existing adapter"),
    ],
)
def test_strengths_that_make_no_sense(names, message):
    with pytest.raises(ValueError, match=message):
        steered(layers=2)(input_ids=tokens(), adapter_names=names)


def test_an_adapter_with_an_at_in_its_name_is_that_adapter():
    model = steered(layers=2)
    model.add_adapter("default@2", SteeringVectorConfig(layers=1))
    fill(model, "default@2", seed=7)
    with torch.no_grad():
        one = model(input_ids=tokens(), adapter_names=["default@2"] * 2).logits
        model.set_adapter("default@2")
        assert torch.allclose(one, model(input_ids=tokens()).logits, atol=1e-6)


def test_requests_are_checked(server):
    for say in (
        dict(prompt=""),
        dict(prompt="a", temperature=-1),
        dict(prompt="a", strength=float("inf")),
        dict(p="a"),
    ):
        with pytest.raises(ValidationError):
            Request(**say)
    with pytest.raises(ArmError, match="Did you mean 'careful'"):
        server.answers([Request(prompt="a", vector="carefull")])
    with pytest.raises(ArmError, match="take 201 tokens, the model reads 128"):
        server.answers([Request(prompt="a", new_tokens=200)])


def serve(home: Path, *words: str) -> int:
    return cli.main(["serve", f"careful={home / 'careful'}", f"warm={home / 'warm'}", *words])


def test_the_command_answers_a_file_and_goes_on_where_it_stopped(home, server, tmp_path, capsys):
    lines = [json.dumps({"new_tokens": 5, **say}) for say in SAY]
    asked, said = tmp_path / "asked.jsonl", tmp_path / "said.jsonl"
    asked.write_text(
        "\n".join([*lines, "", '{"prompt": "a", "vector": "none"}', "no json", '{"id": 0, "prompt": "a"}'])
    )
    words = ["--input", str(asked), "--output", str(said), "--batch", "3"]
    assert serve(home, *words) == 1, "three lines were refused"
    replies = [json.loads(line) for line in said.read_text().splitlines()]
    assert [reply["id"] for reply in replies] == [0, 1, 2, 3, 4, 5, 6, 8, 9, 0]
    assert [r["answer"] for r in replies[:7]] == server.answers([Request(**{"new_tokens": 5, **say}) for say in SAY])
    assert "is none of ['careful', 'warm']" in replies[7]["error"] and "asked before" in replies[9]["error"]
    whole = said.read_text()
    said.write_text("".join(whole.splitlines(keepends=True)[:5]))
    serve(home, *words)
    assert set(said.read_text().splitlines()) == set(whole.splitlines()) - {json.dumps(replies[9])}
    said.write_text(whole[:-3])
    assert serve(home, *words) == 2 and "cut off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["careful"], "NAME=FOLDER"),
        (["a=x", "a=y"], "given twice"),
        (["a@2=x"], "without '@'"),
        (["a=nowhere"], "is no adapter folder"),
        (["a=nowhere", "--input", "nowhere.jsonl"], "no such file"),
    ],
)
def test_the_command_refuses(words, message, capsys):
    assert cli.main(["serve", *words]) == 2
    assert message in capsys.readouterr().err
