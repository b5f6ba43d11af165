"""The HTTP service, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import json
import re
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from served import running, save_home, save_vector
from tiny_models import steered, tiny

from steertune.recipes.serve import Request, Server, load_vectors
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.http import HttpServer
from steertune.recipes.serving.text import Text

CHAT = [{"role": "user", "content": "the cat"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return save_home(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def running_service(home):
    with running(home, folder=home) as served:
        yield served


@pytest.fixture(scope="module")
def client(running_service: HttpServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running_service.url}/v1", api_key="none", max_retries=0)


def completion(client: openai.OpenAI, model: str = "base", prompt: Any = "the cat", **asked: Any) -> Any:
    return client.completions.create(model=model, prompt=prompt, **{"max_tokens": 6, "temperature": 0, **asked})


def test_answers_are_those_of_the_line_based_service(home, client):
    """The same engine behind both: greedy, and sampled with a seed."""
    lines = Server(*load_vectors({"careful": home / "careful", "warm": home / "warm"}))
    for model, vector, strength in (
        ("tiny", None, 1.0),
        ("base+careful@1.5", "careful", 1.5),
        ("tiny+warm@-2", "warm", -2),
    ):
        for temperature in (0.0, 1.3):
            request = Request(
                prompt="the cat", vector=vector, strength=strength, new_tokens=6, temperature=temperature
            )
            reply = completion(client, model, temperature=temperature, seed=0)
            assert reply.choices[0].text.strip() == lines.answers([request])[0]
            chat = client.chat.completions.create(
                model=model,
                messages=CHAT,
                max_tokens=6,
                temperature=temperature,
                seed=0,  # type: ignore[arg-type]
            )
            [answer] = lines.answers([request.model_copy(update={"prompt": CHAT})])
            assert chat.choices[0].message.content.strip() == answer


def test_steering_may_stand_in_a_field_of_its_own(client):
    named = completion(client, "base+careful@1.5+warm@-1", logprobs=0)
    listed = [{"vector": "careful", "strength": 1.5}, {"vector": "warm", "strength": -1}]
    for model, steering in (("base", listed), ("base+careful@1.5", listed[1:])):
        reply = completion(client, model, logprobs=0, extra_body={"steering": steering})
        assert reply.choices[0].logprobs.token_logprobs == named.choices[0].logprobs.token_logprobs
        assert reply.system_fingerprint == named.system_fingerprint
    alone = completion(client, "base+careful@1.5", logprobs=0)
    assert alone.choices[0].logprobs.token_logprobs != named.choices[0].logprobs.token_logprobs
    assert alone.system_fingerprint != named.system_fingerprint


def test_positions_are_the_requests_own(client):
    """Steering everything, the prompt, its last token or the answer are four different things, and the first token of
    an answer does not know of a steered answer."""
    first = {}
    for positions in (None, "all", "completion", "prompt", "last_prompt"):
        steering = {"vector": "careful", "strength": 2.0} | ({} if positions is None else {"positions": positions})
        reply = completion(client, logprobs=0, echo=False, extra_body={"steering": [steering]})
        first[positions] = reply.choices[0].logprobs.token_logprobs
    base = completion(client, logprobs=0).choices[0].logprobs.token_logprobs
    assert first[None] == first["all"]
    assert first["completion"][0] == pytest.approx(base[0], abs=1e-6) and first["completion"][1:] != base[1:]
    assert first["prompt"][0] == pytest.approx(first["all"][0], abs=1e-6)
    assert len({tuple(values) for values in first.values()}) == 4


def test_log_probabilities_are_the_models(client, running_service):
    """Of a prompt that is echoed and of the answer, against a forward pass over both."""
    reply = completion(client, "base+careful", echo=True, logprobs=3)
    choice = reply.choices[0]
    model, words = running_service.service.vectors.model, running_service.service.tokenizer
    ids = words(choice.text, return_tensors="pt")["input_ids"]
    logits = running_service.service.worker.call(
        lambda: model(input_ids=ids, adapter_names=["careful"]).logits.detach()
    ).result()
    expected = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert choice.text.startswith("the cat ") and choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    top = logits[0, :-1].log_softmax(-1).max(-1).values.tolist()
    assert [max(best.values()) for best in choice.logprobs.top_logprobs[1:]] == pytest.approx(top, abs=1e-5)
    assert "".join(choice.logprobs.tokens) == choice.text
    offsets = choice.logprobs.text_offset
    assert [choice.text[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == choice.logprobs.tokens


def test_a_stream_says_what_a_whole_answer_says(client):
    asked: dict[str, Any] = dict(
        model="base+warm", messages=CHAT, max_tokens=9, n=2, seed=5, logprobs=True, top_logprobs=2
    )
    whole = client.chat.completions.create(**asked)
    texts, tokens, reasons, usage = {0: "", 1: ""}, {0: [], 1: []}, {}, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason
    assert usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content and reasons[choice.index] == choice.finish_reason
        assert tokens[choice.index] == choice.logprobs.content
    assert texts[0] != texts[1], "choices have random numbers of their own"
    assert "".join(entry.token for entry in tokens[0] if "<" not in entry.token).strip() == texts[0].strip()


def test_several_prompts_choices_stops_and_limits(client):
    reply = completion(client, prompt=["the cat", "a dog runs"], n=2, temperature=1, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].text == completion(client, temperature=1, seed=1).choices[0].text
    ids = [9, 10]
    assert completion(client, prompt=[ids, ids]).usage.prompt_tokens == 4
    text = completion(client, "base+careful", max_tokens=12).choices[0].text
    word = text.split()[1]
    stopped = completion(client, "base+careful", max_tokens=12, stop=["never", word]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(word)]
    nothing = completion(client, max_tokens=0, echo=True, logprobs=1)
    assert nothing.choices[0].text == "the cat" and len(nothing.choices[0].logprobs.tokens) == 2


def test_penalties_bias_and_nucleus(client):
    varied = completion(client, max_tokens=8, presence_penalty=2, frequency_penalty=2, logprobs=0)
    assert len({*varied.choices[0].logprobs.tokens}) == 8
    assert completion(client, logit_bias={"7": 100}, max_tokens=2, temperature=1).choices[0].text == " a a"
    greedy = completion(client).choices[0].text
    assert completion(client, temperature=1, top_p=1e-6).choices[0].text == greedy


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "another model": (dict(model="gpt-4"), 404, "must be 'tiny' or 'base'"),
    "an unknown vector": (dict(model="base+carful"), 404, "Did you mean 'careful'"),
    "a strength of nan": (dict(model="base+careful@nan"), 404, "not a finite strength"),
    "no strength": (dict(model="base+careful@"), 404, "not a finite strength"),
    "an unknown vector in steering": (dict(steering=[{"vector": "x"}]), 400, "is unknown"),
    "a vector twice": (dict(model="base+warm", steering=[{"vector": "warm"}]), 400, "named twice"),
    "a strength of 1e38": (dict(model="base+careful@1e38"), 400, "more than the model can add"),
    "positions that are none": (dict(steering=[{"vector": "warm", "positions": "some"}]), 400, "positions"),
    "too many tokens": (dict(max_tokens=5000), 400, "at most 1024"),
    "more than the model reads": (dict(max_tokens=500), 400, "the model reads 128"),
    "a temperature below 0": (dict(temperature=-1), 400, "temperature"),
    "tools": (dict(tools=[{"type": "function"}]), 400, "tools: not supported"),
    "an unknown field": (dict(strenght=2), 400, "strenght"),
    "a token beyond the vocabulary": (dict(logit_bias={"99": 1}), 400, "0 .. 21"),
    "more choices than the queue takes": (dict(n=100), 400, "the queue takes 64"),
    "a thousand stops": (dict(stop=["a"] * 1000), 400, "at most 16"),
    "a hundred vectors": (dict(steering=[{"vector": "warm"}] * 100), 400, "at most 32"),
    "no messages": (dict(messages=[]), 400, "messages"),
    "a picture": (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "text"),
    "no JSON": (None, 400, "Invalid JSON"),
}


@pytest.fixture(scope="module")
def small(home):
    """A service with a short queue, a key and a batch of two."""
    with running(home, queue=64, key="secret-of-the-test", batch=2) as served:
        yield served


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_and_says_why(name, small):
    asked, status, says = REFUSED[name]
    body = "{no json" if asked is None else json.dumps({"model": "base", "messages": CHAT, **asked})
    reply = requests.post(
        f"{small.url}/v1/chat/completions", body, headers={**JSON, "Authorization": "Bearer secret-of-the-test"}
    )
    error = reply.json()["error"]
    assert (reply.status_code, bool(re.search(says, error["message"]))) == (status, True), error
    assert len(error["message"]) < 1200


def test_keys_hosts_kinds_and_sizes(small):
    good = {"Authorization": "Bearer secret-of-the-test"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret-of-the-test"}):
        assert requests.get(f"{small.url}/v1/models", headers=headers).status_code == 401
    assert requests.get(f"{small.url}/v1/models", headers=good).status_code == 200
    assert requests.get(f"{small.url}/v1/models/base%2Bcareful", headers=good).json()["id"] == "base+careful"
    assert requests.get(f"{small.url}/v1/models/none", headers=good).status_code == 404
    assert requests.get(f"{small.url}/health").json()["status"] == "ok"
    assert requests.get(f"{small.url}/health", headers={"Host": "elsewhere.example"}).status_code == 400
    assert requests.post(f"{small.url}/v1/completions", "{}", headers=good).status_code == 415
    large = b'{"prompt": "' + b"a" * 2**24 + b'"}'
    assert requests.post(f"{small.url}/v1/completions", large, headers={**good, **JSON}).status_code == 413
    assert requests.post(f"{small.url}/v1/nothing", headers=good).json()["error"]["message"]
    text = requests.get(f"{small.url}/metrics", headers=good).text
    assert 'steertune_requests_total{endpoint="/v1/models",status="401"} 3.0' in text
    assert "steertune_vectors 2.0" in text


def test_a_full_queue_refuses_the_next_request_only(small):
    """All of a request's answers wait, or none does; what waits is answered."""
    blocked = threading.Event()
    small.service.worker.call(blocked.wait)
    replies = []
    key = openai.OpenAI(base_url=f"{small.url}/v1", api_key="secret-of-the-test", max_retries=0)
    thread = threading.Thread(target=lambda: replies.append(completion(key, n=60, temperature=1)))
    thread.start()
    while small.service.worker.waiting < 60:
        thread.join(0.01)
    with pytest.raises(openai.RateLimitError, match="60 answers are waiting, but the queue takes 64"):
        completion(key, n=5, temperature=1)
    blocked.set()
    thread.join()
    assert len(replies[0].choices) == 60
    assert small.service.worker.waiting == 0


def test_an_answer_that_takes_too_long_is_a_timeout(home):
    with running(home, seconds=-1.0) as late:
        client = openai.OpenAI(base_url=f"{late.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="was not complete after") as error:
            completion(client)
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match="was not complete after"):
            list(completion(client, stream=True, max_tokens=50))


def test_a_client_that_leaves_makes_room(client, running_service, monkeypatch):
    """Its answer ends before its 120 tokens, and the vector that it held is free."""
    step, pauses = Engine.step, threading.Event()
    monkeypatch.setattr(Engine, "step", lambda self: (pauses.wait(0.02), step(self))[1])
    tokens = "steertune_generated_tokens_total"
    before = number(running_service, tokens)
    stream = completion(client, "base+warm", stream=True, max_tokens=120, logit_bias={"2": -100})
    next(iter(stream))
    stream.close()
    while any(vector.uses for vector in running_service.service.vectors.named.values()):
        pauses.wait(0.01)
    assert 0 < number(running_service, tokens) - before < 100


def number(running_service: HttpServer, name: str) -> float:
    """A metric."""
    [line] = re.findall(rf"^{name} (.*)$", requests.get(f"{running_service.url}/metrics").text, re.M)
    return float(line)


def test_vectors_come_change_and_go_while_answers_are_under_way(home, client, running_service):
    service, url = running_service.service, f"{running_service.url}/v1/vectors"
    save_vector(home, "first", seed=11, layers=2)
    second = save_vector(home, "second", seed=12, layers=2)
    files = {
        name: base64.b64encode((second / name).read_bytes()).decode()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert requests.put(f"{url}/fresh", json={"folder": "first"}).json()["layers"] == [2]
    old = completion(client, "base+fresh@2", logprobs=0, max_tokens=40, logit_bias={"2": -100})

    # an answer that is under way when its vector is replaced keeps the one that it began with
    stream = completion(client, "base+fresh@2", logprobs=0, max_tokens=40, logit_bias={"2": -100}, stream=True)
    chunks = iter(stream)
    seen = [next(chunks)]
    assert requests.put(f"{url}/fresh", json={"files": files}).status_code == 200
    seen += list(chunks)
    values = [
        value for chunk in seen if chunk.choices[0].logprobs for value in chunk.choices[0].logprobs.token_logprobs
    ]
    assert values == pytest.approx(old.choices[0].logprobs.token_logprobs, abs=1e-5)

    new = completion(client, "base+fresh@2", logprobs=0, max_tokens=40, logit_bias={"2": -100})
    assert new.choices[0].logprobs.token_logprobs != old.choices[0].logprobs.token_logprobs
    assert new.system_fingerprint != old.system_fingerprint
    assert [vector["id"] for vector in requests.get(url).json()["data"]] == ["careful", "fresh", "warm"]
    assert requests.delete(f"{url}/fresh").json()["deleted"] is True
    with pytest.raises(openai.NotFoundError, match="'fresh' is none of"):
        completion(client, "base+fresh")
    service.worker.call(lambda: None).result()
    assert sorted(service.vectors.model.peft_config) == ["careful", "warm"], "nothing is left of the three versions"


def test_a_service_starts_without_vectors_and_outlives_the_last_one(home):
    vectors, tokenizer = load_vectors({}, str(home / "base"))
    steered(tiny(hidden_size=64), layers=1).save_pretrained(home / "wide")
    with HttpServer(vectors, tokenizer, name="tiny", folder=home) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        base = completion(client, logprobs=0).choices[0].logprobs.token_logprobs
        assert requests.put(f"{server.url}/v1/vectors/warm", json={"folder": "wide"}).status_code == 400
        seen = []
        for _ in range(2):
            with pytest.raises(openai.NotFoundError):
                completion(client, "base+warm")
            assert requests.put(f"{server.url}/v1/vectors/warm", json={"folder": "warm"}).status_code == 200
            seen.append(completion(client, "base+warm@2", logprobs=0).choices[0].logprobs.token_logprobs)
            assert completion(client, logprobs=0).choices[0].logprobs.token_logprobs == base
            assert requests.delete(f"{server.url}/v1/vectors/warm").status_code == 200
            assert completion(client, logprobs=0).choices[0].logprobs.token_logprobs == base
        assert seen[0] == seen[1] != base
        server.service.tokenizer.chat_template = None
        with pytest.raises(openai.BadRequestError, match="no chat template. Send text to /v1/completions"):
            client.chat.completions.create(model="base", messages=CHAT)  # type: ignore[arg-type]


def test_what_no_request_should_cause_hurts_one_answer_or_is_told(home, monkeypatch):
    """A tokenizer that fails on one token; then a bug in the engine itself."""
    with running(home) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        push = Text.push

        def fails(self: Text, token: int, *rest: Any) -> Any:
            if token == 7:
                raise OverflowError("no such token")
            return push(self, token, *rest)

        monkeypatch.setattr(Text, "push", fails)
        with pytest.raises(openai.InternalServerError, match="no such token"):
            completion(client, logit_bias={"7": 100})
        assert completion(client, logit_bias={"8": 100}).choices[0].text

        monkeypatch.setattr(Engine, "step", lambda self: 1 / 0)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            completion(client)
        with pytest.raises(openai.InternalServerError, match="The server has stopped") as error:
            completion(client)
        assert error.value.status_code == requests.get(f"{served.url}/health").status_code == 503


@pytest.mark.parametrize(
    ("name", "body", "status", "says"),
    [
        ("bad", {"folder": "../base"}, 403, "must lie below"),
        ("bad", {"folder": "/etc"}, 403, "must lie below"),
        ("bad", {"folder": "nowhere"}, 400, "is not an adapter folder"),
        ("bad", {"folder": "\0"}, 400, "not a path"),
        ("bad", {}, 400, "either folder or files"),
        ("bad", {"files": {"adapter_config.json": "e30="}}, 400, "lacks 'adapter_model.safetensors'"),
        ("bad", {"files": {"adapter_config.json": "%", "adapter_model.safetensors": ""}}, 400, "not in base64"),
        ("bad", {"files": {"adapter_config.json": "e30=", "adapter_model.safetensors": ""}}, 400, ""),
        ("bad", {"files": {"evil.py": "e30="}}, 400, "files"),
        ("a+b", {"folder": "warm"}, 400, "is not a valid vector name"),
        ("keys", {"folder": "warm"}, 400, "cannot be the name"),
        ("wide", {"folder": "wide"}, 400, "not the adapter's base model"),
    ],
)
def test_a_bad_vector_is_refused_and_changes_nothing(name, body, status, says, home, running_service):
    if name == "wide":
        steered(tiny(hidden_size=64), layers=1).save_pretrained(home / "wide")
    service = running_service.service
    before = sorted(service.vectors.model.peft_config)
    reply = requests.put(f"{running_service.url}/v1/vectors/{requests.utils.quote(name)}", json=body)
    assert reply.status_code == status and says in reply.json()["error"]["message"], reply.text
    assert sorted(service.vectors.model.peft_config) == before
    assert requests.delete(f"{running_service.url}/v1/vectors/bad").status_code == 404
