"""Mixed batches: every request gets what it would get alone."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import tiny_data
import torch
from live_monitors import monitor_of
from pydantic import ValidationError
from tiny_models import fill, steered, tiny, tokens

from steertune.adapters import SteeringVectorConfig, monitors, set_strength
from steertune.recipes import cli
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.generation import generate
from steertune.recipes.lab.progress import Bar
from steertune.recipes.serve import Request, Server, load_vectors
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.line_service import serve_lines
from steertune.recipes.serving.lines import Lines
from steertune.recipes.serving.remedies import remedy_of

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
    model, words = server.vectors.model, server.tokenizer
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


def test_a_line_may_name_several_vectors_and_positions(server):
    two = Request(prompt="the cat", vector="careful", strength=2, steering=[{"vector": "warm", "strength": -2}])
    listed = [{"vector": "careful", "strength": 2.0}, {"vector": "warm", "strength": -2.0, "positions": "all"}]
    answers = server.answers([two, Request(prompt="the cat", steering=listed), Request(prompt="the cat")])
    assert answers[0] == answers[1] != answers[2]
    with pytest.raises(ArmError, match="named twice"):
        server.answers([Request(prompt="the cat", vector="warm", steering=[{"vector": "warm"}])])


def test_a_remedy_puts_its_vector_in_place_of_what_the_request_named():
    remedy = remedy_of(None, "careful@1.5", ["careful", "warm"])
    assert remedy is not None
    request = Request(prompt="a", vector="warm", steering=[{"vector": "careful"}])
    changed = request.model_copy(update=remedy.changes[0](request))
    assert [(one.vector, one.strength) for one in changed.vectors] == [("careful", 1.5)]


def test_sampling_follows_the_softmax(server):
    """Draws of the first token against its probabilities."""
    requests = [Request(prompt="the cat", temperature=1.0, seed=seed, new_tokens=1) for seed in range(400)]
    model = server.vectors.model
    with model.disable_adapter(), torch.no_grad():
        ids = torch.tensor([server.tokenizer("the cat")["input_ids"]])
        probabilities = model(input_ids=ids).logits[0, -1].softmax(0)
    word = int(probabilities[len(tiny_data.SPECIAL) :].argmax()) + len(tiny_data.SPECIAL)
    text, chance = server.tokenizer.decode([word]), float(probabilities[word])
    wide = Server(server.vectors, server.tokenizer, batch=100)
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
    assert "Choose from ['careful', 'warm']" in replies[7]["error"] and "taken by an earlier" in replies[9]["error"]
    whole = said.read_text()
    said.write_text("".join(whole.splitlines(keepends=True)[:5]))
    serve(home, *words)
    assert set(said.read_text().splitlines()) == set(whole.splitlines()) - {json.dumps(replies[9])}
    said.write_text(whole[:-3])
    assert serve(home, *words) == 0 and "cut off" in capsys.readouterr().err
    assert [json.loads(line)["id"] for line in said.read_text().splitlines()] == [0, 1, 2, 3, 4, 5, 6, 8, 9]


HOSTILE = {
    "no JSON": (b"no json", "Line 2 is not a JSON object"),
    "a number": (b"5", "valid dict|no JSON object|object"),
    "no UTF-8": (b'{"prompt": "caf\xe9"}', r"Line 2 is not UTF-8 \(byte 15\)"),
    "NUL": (b"\0\0\0", "Line 2 is not a JSON object"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "Line 2 is not UTF-8"),
    "too long": (b'{"prompt": "' + b"a" * 2**20 + b'"}', "Line 2 is longer than 1048576 bytes"),
    "deep": (b'{"prompt": ' + b"[" * 100_000, "Line 2 is not a JSON object"),
    "10^9 tokens": (b'{"prompt": "the cat", "new_tokens": 1000000000}', "at most 1024 are allowed"),
    "400 digits": (b'{"prompt": "the cat", "new_tokens": ' + b"9" * 400 + b"}", "at most 1024|new_tokens"),
    "5000 digits": (b'{"prompt": "the cat", "seed": ' + b"9" * 5000 + b"}", "Line 2 is not a JSON object"),
    "a seed of 400 digits": (b'{"prompt": "the cat", "seed": ' + b"9" * 400 + b"}", "seed: "),
    "a number as text": (b'{"prompt": "the cat", "new_tokens": "8"}', "new_tokens: Input should be a valid integer"),
    "half a token": (b'{"prompt": "the cat", "new_tokens": 1.5}', "new_tokens: Input should be a valid integer"),
    "a truth value": (b'{"prompt": "the cat", "strength": true}', "strength: Input should be a valid number"),
    "NaN": (b'{"prompt": "the cat", "strength": NaN}', "strength: Input should be a finite number"),
    "1e400": (b'{"prompt": "the cat", "strength": 1e400}', "strength: Input should be a finite number"),
    "1e38": (b'{"prompt": "the cat", "vector": "careful", "strength": 1e38}', r"strength=1e\+38 times a vector"),
    "1e308": (b'{"prompt": "the cat", "vector": "careful", "strength": 1e308}', r"strength=1e\+308 times a vector"),
    "a key twice": (b'{"prompt": "the cat", "prompt": "a"}', "'prompt' occurs twice"),
    "an unknown key": (b'{"prompt": "the cat", "chat_template": "{{ 1 }}"}', "chat_template: Extra inputs"),
    "no prompt": (b"{}", "prompt: Field required"),
    "an empty prompt": (b'{"prompt": ""}', "prompt"),
    "a prompt of no tokens": (b'{"prompt": "   "}', "The prompt has no tokens"),
    "messages of numbers": (b'{"prompt": [{"role": "user", "content": 5}]}', "Input should be a valid string"),
    "messages without a role": (b'{"prompt": [{}]}', "every message needs a role and content"),
    "an unknown vector": (b'{"prompt": "the cat", "vector": "' + b"x" * 5000 + b'"}', "is unknown"),
    "an id of a list": (b'{"prompt": "the cat", "id": [1]}', "id"),
    "an id again": (b'{"prompt": "the cat", "id": "first"}', "taken by an earlier"),
    "half a character": (b'{"prompt": "\\ud800"}', "surrogate|UTF-8|JSON|Invalid"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_line_gets_an_error_and_the_others_their_answers(name, home, server, tmp_path):
    """Between two good requests, in one batch with them; a restart does not read it again."""
    line, says = HOSTILE[name]
    good = [{"prompt": "the cat", "id": "first", "new_tokens": 3}, {"prompt": "a dog", "id": "last", "new_tokens": 3}]
    asked, said = tmp_path / "asked.jsonl", io.StringIO()
    asked.write_bytes(b"\n".join([json.dumps(good[0]).encode(), line, json.dumps(good[1]).encode()]))
    assert answer_all(server, asked, said) == 1
    replies = [json.loads(reply) for reply in said.getvalue().splitlines()]
    assert [reply["id"] for reply in replies if "answer" in reply] == ["first", "last"]
    assert [r["answer"] for r in replies if "answer" in r] == server.answers([Request(**say) for say in good])
    [refused] = [reply for reply in replies if "error" in reply]
    assert re.search(says, refused["error"]) and len(refused["error"]) < 1000, refused["error"]
    again = io.StringIO()
    answer_all(server, asked, again, {reply["id"] for reply in replies})
    assert again.getvalue() == ""


def answer_all(server, asked: Path, said: IO[str], done: Any = ()) -> int:
    with asked.open("rb") as source:
        return serve_lines(server, Lines(source.fileno(), Bar(1)), said, set(done))


def test_a_request_that_takes_too_long_ends_alone(server, monkeypatch, tmp_path):
    slow = Server(server.vectors, server.tokenizer, batch=2, seconds=-1)
    [late, done] = slow.replies([Request(prompt="the cat", new_tokens=50), Request(prompt="a dog", new_tokens=1)])
    assert "was not complete after" in str(late) and isinstance(done, str)


def test_a_batch_that_fails_is_answered_one_by_one(server, monkeypatch):
    forward, dog = Engine._forward, server.tokenizer("dog")["input_ids"][-1]

    def fails(self: Engine, rows: Any, *args: Any) -> Any:
        if any(dog in row.job.prompt for row in rows):
            raise RuntimeError("out of memory")
        return forward(self, rows, *args)

    requests = [Request(prompt=text, new_tokens=3) for text in ("the cat", "a dog", "red")]
    expected = server.answers(requests)
    monkeypatch.setattr(Engine, "_forward", fails)
    replies = server.replies(requests)
    assert "out of memory" in str(replies[1]) and replies[0::2] == expected[0::2]


def test_lines_come_as_they_are_written(server):
    """A pipe that stays open: a request is answered when it is there, and not when a batch is full."""
    reader, writer = os.pipe()
    parts = Lines(reader, Bar(1)).parts(8)
    os.write(writer, b"\xef\xbb\xbfone\n\ntwo\nhal")
    assert next(parts) == [(0, b"one"), (2, b"two")]
    os.write(writer, b"f\n")
    assert next(parts) == [(3, b"half")]
    os.close(writer)
    assert list(parts) == []
    os.close(reader)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["careful"], "NAME=FOLDER"),
        (["a+b=x"], "without '@', '+' and '.'"),
        ([], "none names the base model"),
        (["--port", "0", "--input", __file__], "cannot be combined with --input"),
        (["--port", "0", "--vectors-in", "nowhere"], "the folder does not exist"),
        (["--port", "70000"], "less than or equal to 65535"),
        (["--port", "0", "--host", "256.0.0.1", "--model", "embedded"], "is not available"),
        (["a=x", "a=y"], "given twice"),
        (["a@2=x"], "without '@'"),
        (["a=nowhere"], "is not an adapter folder"),
        (["a=nowhere", "--input", "nowhere.jsonl"], "no such file"),
        (["keys=nowhere"], "cannot be the name of an adapter"),
        (["a.b=nowhere"], "without '@', '+' and '.'"),
        (["a="], "NAME=FOLDER"),
        (["a=nowhere", "--output", "nowhere/answers.jsonl"], "there is no folder nowhere"),
        (["a=nowhere", "--output", "."], "is not a file"),
        (["a=nowhere", "--input", __file__, "--output", __file__], "is the file of requests"),
        (["a=nowhere", "--output", __file__], "is not a file of answers"),
        (["a=nowhere", "--longest", "0"], "whole number of 1 or more"),
    ],
)
def test_the_command_refuses(words, message, capsys):
    assert cli.main(["serve", *words]) == 2
    assert message in capsys.readouterr().err


# -- scores -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def monitor(server) -> monitors.Monitor:
    return monitor_of(server.engine.base, server.tokenizer)


def scored(server, monitor, threshold: float, **cure) -> Server:
    """A server whose answers are scored, and the flagged ones replaced."""
    reader = replace(monitor, threshold=monitors.Threshold(threshold, 0.1, 40))
    remedy = remedy_of(cure.get("resample"), cure.get("steer"), ["careful", "warm"])
    return Server(server.vectors, server.tokenizer, 4, monitor=reader, remedy=remedy)


def test_answers_have_scores_that_do_not_depend_on_the_batch(server, monitor):
    requests = [Request(**{"new_tokens": 6, **say}) for say in SAY]
    watched = scored(server, monitor, 0.0)
    replies = watched.replies(requests)
    assert [str(reply) for reply in replies] == server.answers(requests), "a monitor only reads"
    alone = [watched.replies([request])[0].score for request in requests]
    known = [i for i, score in enumerate(alone) if score is not None]  # one token is chosen and never read
    assert len(known) >= 5 and [r.score is None for r in replies] == [score is None for score in alone]
    assert [replies[i].score for i in known] == pytest.approx([alone[i] for i in known], abs=1e-3)
    assert [replies[i].flagged for i in known] == [alone[i] > 0 for i in known]
    assert len({round(alone[i], 3) for i in known}) >= 4


def test_a_flagged_answer_is_sampled_again_and_the_least_suspicious_is_given(server, monitor):
    requests = [Request(prompt="the cat", new_tokens=6), Request(prompt="the sky", new_tokens=6, temperature=1.0)]
    plain = scored(server, monitor, -99.0).replies(requests)
    replies = scored(server, monitor, -99.0, resample=4).replies(requests)
    for before, reply in zip(plain, replies, strict=True):
        assert reply.score <= before.score
        assert reply == before or (reply.first == before and reply.details()["first"]["score"] > reply.score)
    assert any(reply.first is not None for reply in replies)
    assert scored(server, monitor, 99.0, resample=4).replies(requests) == plain


def test_a_flagged_request_is_answered_again_with_a_vector(server, monitor):
    request = Request(prompt="the cat", new_tokens=6)
    [with_vector] = server.answers([request.model_copy(update={"vector": "careful", "strength": 3.0})])
    [reply] = scored(server, monitor, -99.0, steer="careful@3").replies([request])
    assert str(reply) == with_vector and str(reply.first) == server.answers([request])[0]
    [kept] = scored(server, monitor, 99.0, steer="careful@3").replies([request])
    assert str(kept) == server.answers([request])[0] and kept.first is None


def test_lines_have_scores(home, monitor, tmp_path, capsys):
    folder = str(monitors.save(monitor, tmp_path / "monitor"))
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "the cat", "new_tokens": 4}\n')
    words = ["serve", f"careful={home / 'careful'}", "--model", str(home / "base"), "--input", str(file)]
    assert cli.main([*words, "--monitor", folder]) == 0
    line = json.loads(capsys.readouterr().out)
    assert {*line} == {"id", "answer", "score", "flagged"} and line["flagged"] == (line["score"] > 0)
    for more, says in (
        (["--monitor", folder, "--steer", "warmm@1"], "must be NAME@STRENGTH with one of the vectors"),
        (["--monitor", folder, "--steer", "careful@much"], "a finite number"),
        (["--monitor", folder, "--steer", "careful@1", "--resample", "2"], "Give --resample or --steer"),
        (["--resample", "2"], "Give --monitor FOLDER"),
        (["--monitor", str(home / "base")], "is not a monitor"),
    ):
        assert cli.main([*words, *more]) == 2
        assert says in capsys.readouterr().err
