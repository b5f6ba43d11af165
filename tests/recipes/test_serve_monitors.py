"""Monitors, gates, effects and training over HTTP."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from served import running, save_home

from steertune.adapters import monitors
from steertune.adapters.rows import RowVector, steer_rows
from steertune.recipes.cli import main
from steertune.recipes.serving.http import HttpServer

ASK: dict[str, Any] = dict(
    model="base", prompt="the cat", max_tokens=6, temperature=0, logit_bias={"2": -100}, monitors=["odd"]
)
CAREFUL = {"vector": "careful", "strength": 3.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return save_home(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(home):
    with running(home) as server:
        yield server


def post(served: HttpServer, body: dict[str, Any], path: str = "completions") -> dict[str, Any]:
    reply = requests.post(f"{served.url}/v1/{path}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def choice(served: HttpServer, **asked: Any) -> dict[str, Any]:
    [one] = post(served, {**ASK, **asked})["choices"]
    return one


def ids(served: HttpServer, text: str) -> list[int]:
    return served.service.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_scores_are_those_of_the_monitor_on_the_whole_text(served):
    """Of every token but the last, which is drawn and never read; with two vectors on, by two monitors at once."""
    asked = dict(model="base+careful@2+warm@-1", monitors=["odd", "late"])
    reply = choice(served, **asked)
    prompt, answer = ids(served, "the cat"), ids(served, reply["text"])
    batch = {
        "input_ids": torch.tensor([prompt + answer]),
        "labels": torch.tensor([[-100] * len(prompt) + answer]),
    }
    service = served.service
    both = [RowVector("careful", 2.0), RowVector("warm", -1.0)]

    def scores() -> list[torch.Tensor]:
        with steer_rows(service.vectors.model, [both]):
            [found] = monitors.token_scores([*service.monitors.values()], service.vectors.model, [batch])
            return found

    expected = service.worker.call(scores).result()
    for (name, reader), whole in zip(service.monitors.items(), expected, strict=True):
        said = reply["monitors"][name]
        assert said["tokens"] == pytest.approx(whole[:-1].tolist(), abs=1e-4)
        assert said["score"] == pytest.approx(reader.pool(whole[:-1]), abs=1e-4)
        assert said["flagged"] == (said["score"] > 0)
    assert choice(served, monitors=[])["text"] == choice(served)["text"] and "monitors" not in choice(
        served, monitors=[]
    )


def test_a_stream_has_the_scores_of_the_whole_answer(served):
    whole = choice(served, n=1, seed=3, temperature=1)
    lines = requests.post(
        f"{served.url}/v1/completions", json={**ASK, "seed": 3, "temperature": 1, "stream": True}
    ).text.split("\n\n")
    parts = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    tokens = [score for part in parts for score in part.get("monitors", {}).get("odd", {}).get("tokens", [])]
    assert tokens == whole["monitors"]["odd"]["tokens"] and len(tokens) == 5
    assert parts[-1]["monitors"]["odd"]["score"] == whole["monitors"]["odd"]["score"]
    assert sum("monitors" in part for part in parts[:-1]) == 5, "one at a time"


def test_a_gate_that_stops(served):
    """Behind the first token whose score so far is too high; not at all where none is."""
    free = choice(served)
    scores = free["monitors"]["odd"]["tokens"]
    means = [sum(scores[: i + 1]) / (i + 1) for i in range(len(scores))]
    threshold = sum(sorted(means)[-2:]) / 2  # only one is above
    reply = choice(served, gate={"monitor": "odd", "action": "stop", "threshold": threshold})
    at = means.index(max(means)) + 1
    assert reply["gate"] == {"monitor": "odd", "action": "stop", "at": at}
    assert reply["finish_reason"] == "content_filter"
    assert reply["monitors"]["odd"]["tokens"] == pytest.approx(scores[:at], abs=1e-5)
    assert free["text"].startswith(reply["text"])
    never = choice(served, gate={"monitor": "odd", "action": "stop", "threshold": 99.0})
    assert never["text"] == free["text"] and "gate" not in never and never["finish_reason"] == "length"


def test_a_gate_that_switches_a_vector_on(served):
    """The tokens before are the base model's, those behind are drawn by the steered one, as by hand."""
    free = choice(served, logprobs=0)
    gate = {"monitor": "odd", "action": "steer", "threshold": -99.0, "steering": [CAREFUL]}
    reply = choice(served, gate=gate, logprobs=0)
    assert reply["gate"]["at"] == 1
    # the first token and the one drawn in the pass that read it are the base model's
    assert reply["logprobs"]["tokens"][:2] == free["logprobs"]["tokens"][:2]
    assert reply["logprobs"]["token_logprobs"][2:] != free["logprobs"]["token_logprobs"][2:]
    stays = choice(served, gate={**gate, "threshold": 99.0}, logprobs=0)
    assert stays["logprobs"] == free["logprobs"]


def test_a_gate_that_answers_again(served):
    free = choice(served)
    again = {"monitor": "odd", "threshold": -99.0}
    steered = choice(served, gate={**again, "action": "restart", "steering": [CAREFUL]})
    assert steered["text"] == choice(served, model="base+careful@3")["text"] != free["text"]
    assert steered["gate"]["first"]["text"] == free["text"] and steered["gate"]["replaced"] is True
    sampled = choice(served, gate={**again, "action": "resample", "attempts": 6}, seed=0)
    assert sampled["gate"]["attempts"] == 6
    assert sampled["monitors"]["odd"]["score"] <= free["monitors"]["odd"]["score"]
    assert sampled["gate"]["replaced"] == (sampled["text"] != free["text"])
    several = post(served, {**ASK, "n": 3, "gate": {**again, "action": "restart", "steering": [CAREFUL]}})
    assert [one["text"] for one in several["choices"]] == [steered["text"]] * 3
    served.service.worker.call(lambda: None).result()  # the engine is through with it
    assert all(vector.uses == 0 for vector in served.service.vectors.named.values()), "vectors are let go of"


REFUSED = {
    "an unknown monitor": (dict(monitors=["od"]), "Did you mean 'odd'"),
    "a gate of an unknown monitor": (dict(gate={"monitor": "x", "action": "stop"}), "must be one of"),
    "no action": (dict(gate={"monitor": "odd"}), "action"),
    "no vector to switch on": (dict(gate={"monitor": "odd", "action": "steer"}), "need one or more"),
    "a vector that does nothing": (
        dict(gate={"monitor": "odd", "action": "stop", "steering": [CAREFUL]}),
        "the other actions none",
    ),
    "an unknown vector": (
        dict(gate={"monitor": "odd", "action": "steer", "steering": [{"vector": "x"}]}),
        "is unknown",
    ),
    "a threshold of nan": (dict(gate={"monitor": "odd", "action": "stop", "threshold": "nan"}), "threshold"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_watched_is_refused(name, served):
    asked, says = REFUSED[name]
    reply = requests.post(f"{served.url}/v1/completions", json={**ASK, **asked})
    assert reply.status_code == 400 and says in reply.json()["error"]["message"], reply.text
    assert all(vector.uses == 0 for vector in served.service.vectors.named.values())


def test_effects_are_those_of_two_forward_passes(served):
    reply = post(served, {"prompt": "the cat", "answer": "a dog runs", "steering": [CAREFUL]}, "effects")
    service = served.service
    prompt, answer = ids(served, "the cat"), ids(served, "a dog runs")
    row = torch.tensor([prompt + answer])

    def logps(names: list[RowVector]) -> torch.Tensor:
        with steer_rows(service.vectors.model, [names]), torch.no_grad():
            return service.worker.engine.base(input_ids=row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    base, steered = (service.worker.call(lambda v=v: logps(v)).result() for v in ([], [RowVector("careful", 3.0)]))
    kl = (steered.exp() * (steered - base)).sum(-1)
    assert [token["kl"] for token in reply["answer"]] == pytest.approx(kl.tolist(), abs=1e-5)
    for name, values in (("base", base), ("steered", steered)):
        expected = values[range(len(answer)), answer]
        assert [token[name] for token in reply["answer"]] == pytest.approx(expected.tolist(), abs=1e-5)
        assert reply["perplexity"][name] == pytest.approx(math.exp(-expected.mean()), rel=1e-4)
    assert "".join(token["token"] for token in reply["answer"]) == "a dog runs"

    nothing = post(served, {}, "effects")
    assert nothing["kl"] == pytest.approx(0, abs=1e-6) and nothing["perplexity"]["base"] > 1
    stronger = [post(served, {"model": f"base+careful@{s}"}, "effects")["kl"] for s in (1, 3)]
    assert 0 < stronger[0] < stronger[1]
    for body, says in (
        ({"prompt": "the cat"}, "Give messages or prompt, and answer"),
        ({"prompt": "the", "messages": [{"role": "user", "content": "a"}], "answer": "a"}, "Give messages or prompt"),
        ({"model": "base+x"}, "is none of"),
        ({"prompt": "the cat", "answer": "a " * 500}, "the model reads 128"),
    ):
        error = requests.post(f"{served.url}/v1/effects", json=body)
        assert error.status_code == 400 and says in error.json()["error"]["message"], error.text


def test_a_vector_is_trained_on_pairs_and_nothing_else_changes(served):
    pair = {"prompt": "the cat", "chosen": "a dog runs", "rejected": "we go"}
    before = [choice(served, model=name, logprobs=0) for name in ("base", "base+careful@2")]
    made = post(served, {"pairs": [pair], "steps": 8}, "vectors/mine/train")
    assert made["id"] == "mine" and made["seconds"] > 0
    assert [choice(served, model=name, logprobs=0) for name in ("base", "base+careful@2")] == before

    def margin(model: str) -> float:
        logps = []
        for answer in (pair["chosen"], pair["rejected"]):
            messages = [{"role": "user", "content": "the cat"}]
            told = post(served, {"model": model, "messages": messages, "answer": answer}, "effects")["answer"]
            logps.append(sum(token["steered"] for token in told))
        return logps[0] - logps[1]

    assert margin("base+mine") > margin("base") + 0.01
    assert margin("base+mine@-1") < margin("base")
    for body, says in (
        ({"pairs": []}, "pairs"),
        ({"pairs": [{**pair, "rejected": pair["chosen"]}]}, "both answers are the same"),
        ({"pairs": [pair], "arm": "lora_dpo"}, "arm"),
        ({"pairs": [pair], "steps": 10**6}, "steps"),
    ):
        error = requests.post(f"{served.url}/v1/vectors/other/train", json=body)
        assert error.status_code == 400 and says in error.json()["error"]["message"], error.text
    assert requests.post(f"{served.url}/v1/vectors/a+b/train", json={"pairs": [pair]}).status_code == 400


def test_monitors_are_listed_and_the_command_refuses_bad_ones(served, home, tmp_path, capsys):
    listed = requests.get(f"{served.url}/v1/monitors").json()["data"]
    assert [one["id"] for one in listed] == ["odd", "late"] and listed[1]["layer"] == 2
    folder = str(monitors.save(served.service.monitors["odd"], tmp_path / "odd"))
    words = ["serve", f"careful={home / 'careful'}"]
    for more, says in (
        (["--port", "0", "--monitor", str(home / "base")], "is not a monitor"),
        (["--port", "0", "--monitor", folder, "--resample", "2"], "has its own gate"),
        (["--port", "0", "--monitor", folder, folder], "is given twice"),
        (["--monitor", folder, f"other={folder}"], "names 2 monitors"),
    ):
        assert main([*words, *more]) == 2
        assert says in capsys.readouterr().err
