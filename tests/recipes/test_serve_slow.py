"""The service under load, behind evaluation harnesses, and with a real model."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import torch
from served import running, save_home

from steertune.adapters.rows import RowVector
from steertune.recipes.lab import zoo
from steertune.recipes.lab.generation import end_tokens
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.jobs import Job, Sampling
from steertune.recipes.serving.loading import load_vectors

pytestmark = pytest.mark.slow
CLIENTS, EACH = 32, 8
MODELS = ["base", "base+careful", "base+careful@-1.5", "base+warm@2", "base+careful@0.5+warm@-1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return save_home(tmp_path_factory.mktemp("served"))


def asked(number: int) -> dict[str, Any]:
    """A request that depends on its number alone."""
    return {
        "model": MODELS[number % len(MODELS)],
        "prompt": " ".join(["the cat", "a dog runs now", "red", "we go then"][: 1 + number % 4]),
        "max_tokens": 2 + number % 23,
        "temperature": number % 2 * 1.0,
        "seed": number,
        "logprobs": 1,
        "n": 1 + number % 3 // 2,
    }


def test_32_clients_with_mixed_vectors_lose_nothing(home):
    """Every answer is the one that its request gets alone; refused requests come again; memory stays bounded."""
    with running(home, batch=16, queue=24) as served:
        alone = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        expected = [alone.completions.create(**asked(number)) for number in range(CLIENTS * EACH)]
        before = psutil.Process().memory_info().rss
        replies, refused = asyncio.run(load(f"{served.url}/v1"))
        grown = psutil.Process().memory_info().rss - before
        assert sorted(replies) == list(range(CLIENTS * EACH))
        for number, reply in replies.items():
            for mine, theirs in zip(reply.choices, expected[number].choices, strict=True):
                assert mine.text == theirs.text and mine.finish_reason == theirs.finish_reason
                assert mine.logprobs.token_logprobs == pytest.approx(theirs.logprobs.token_logprobs, abs=1e-4)
        # the engine counts what has ended at its next turn
        for _ in range(50):
            state = requests.get(f"{served.url}/health").json()
            if not state["running"]:
                break
            time.sleep(0.1)
        assert (state["running"], state["waiting"]) == (0, 0), "nothing is left behind"
        assert refused > 0, "the queue was full at times"
        assert grown < 150e6
        assert not any(vector.uses for vector in served.service.vectors.named.values())


async def load(url: str) -> tuple[dict[int, Any], int]:
    """What each of the clients' requests got, and how often one was refused. Bad requests come between good ones, and
    some clients leave in the middle of a stream."""
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    replies: dict[int, Any] = {}
    refused = 0

    async def one(number: int) -> None:
        nonlocal refused
        while True:
            try:
                replies[number] = await client.completions.create(**asked(number))
                return
            except openai.RateLimitError:
                refused += 1
                await asyncio.sleep(0.05)

    async def nuisance(number: int) -> None:
        with pytest.raises(openai.APIStatusError):
            await client.completions.create(model="base+none", prompt="the cat")
        try:
            stream = await client.completions.create(model="base+warm", prompt="red", max_tokens=60, stream=True)
        except openai.RateLimitError:
            return
        async for _ in stream:
            break
        await stream.close()

    async def many(client_number: int) -> None:
        for turn in range(EACH):
            await one(client_number * EACH + turn)
            if client_number % 4 == 0:
                await nuisance(turn)

    await asyncio.gather(*(many(number) for number in range(CLIENTS)))
    return replies, refused


TASK = """
task: tiny_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
"""


def test_lm_eval_scores_as_it_does_on_the_model_itself(home, tmp_path):
    """Multiple choice and generation, through the completions endpoint and in the same process."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager
    from peft import PeftModel

    from steertune.adapters import set_strength

    rows = [{"prompt": p, "a": a, "b": b, "gold": 0} for p, a, b in (
        ("the cat", "sits now", "red"), ("a dog", "runs", "the sea"), ("we", "go", "stay then"), ("red", "sea", "we"),
    )]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(
        TASK.format(kind="multiple_choice", file=data) + 'doc_to_choice: ["{{a}}", "{{b}}"]\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "text.yaml").write_text(
        TASK.format(kind="generate_until", file=data) + 'doc_to_target: "{{a}}"\ngeneration_kwargs: {until: ["zzz"], '
        "max_gen_toks: 5, temperature: 0, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path))
    names = ["tiny_multiple_choice", "tiny_generate_until"]

    def run(model: Any) -> dict[str, Any]:
        result = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0)
        assert result is not None
        return result["samples"]

    with running(home) as served:
        api = LocalCompletionsAPI(
            base_url=f"{served.url}/v1/completions", model="base+careful@1.5", tokenizer=str(home / "base"),
            tokenizer_backend="huggingface", num_concurrent=4, batch_size=2,
        )  # fmt: skip
        over_http = run(api)
        tokenizer = served.service.tokenizer
    base = importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(home / "base")
    model = PeftModel.from_pretrained(base, str(home / "careful"), adapter_name="careful").eval()
    with set_strength(model, 1.5):
        in_process = run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1))  # type: ignore[arg-type]
    for name in names:
        pairs = list(zip(over_http[name], in_process[name], strict=True))
        assert len(pairs) == len(rows)
        for one, other in pairs:
            if name == names[0]:
                ours, theirs = ([float(score) for score, _ in row["filtered_resps"]] for row in (one, other))
                assert ours == pytest.approx(theirs, abs=1e-4)
            else:
                assert one["filtered_resps"][0].strip() == other["filtered_resps"][0].strip()


def test_inspect_runs_on_a_steered_model(home, tmp_path, monkeypatch):
    """Its OpenAI-compatible provider, with the vector in the model's name."""
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    monkeypatch.setenv("STEERTUNE_BASE_URL", "")
    monkeypatch.chdir(tmp_path)
    with running(home) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
        [choice] = client.chat.completions.create(
            model="base+warm@2", messages=[{"role": "user", "content": "the cat"}], temperature=0, max_tokens=6
        ).choices
        task = inspect_ai.Task(
            dataset=[Sample("the cat", target=choice.message.content.split()[0]), Sample("we go", target="zzz")],
            solver=generate(),
            scorer=includes(),
        )
        model = inspect_ai.model.get_model(
            "openai-api/steertune/base+warm@2", base_url=f"{served.url}/v1", api_key="none"
        )
        [log] = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none", temperature=0, max_tokens=6)
    assert log.status == "success", log.error
    assert [sample.scores["includes"].value for sample in log.samples] == ["C", "I"]
    assert log.samples[0].output.completion.strip() == choice.message.content.strip()


@pytest.fixture(scope="module")
def embedded(real) -> Iterator[str]:
    """The command on the embedded model, with two vectors that come with it, in a process of its own."""
    command = [sys.executable, "-m", "steertune.recipes.serve", "--port", "0", "--threads", "2"]
    command += [f"{name}={zoo.folder(name)}" for name in ("lower_case", "formal")]
    environment = {**os.environ, "STEERTUNE_API_KEY": "a-key-of-this-test"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    url = None
    while url is None and (line := process.stderr.readline()):
        url = (re.search(r"http://127\.0\.0\.1:\d+/v1", line) or [None])[0]
    assert url is not None, "the command says where it serves"
    try:
        yield url
    finally:
        process.send_signal(2)
        assert process.wait(30) in (0, 130)


@pytest.mark.real
def test_the_embedded_model_behind_the_command(embedded):
    """A steered answer is in lower case; log-probabilities do not depend on the batch; unknown keys are refused."""
    client = openai.OpenAI(base_url=embedded, api_key="a-key-of-this-test", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=embedded, api_key="another", max_retries=0).models.list()
    messages: Any = [{"role": "user", "content": "Which animal sleeps most?"}]
    plain = client.chat.completions.create(model="base", messages=messages, temperature=0, max_tokens=24)
    steered = client.chat.completions.create(
        model="base+lower_case@1.5", messages=messages, temperature=0, max_tokens=24
    )
    assert plain.choices[0].message.content != plain.choices[0].message.content.lower()
    assert steered.choices[0].message.content == steered.choices[0].message.content.lower()

    texts = ["The capital of France is Paris.", "Rain fell on the roof all night, and nobody slept.", "Two and two"]
    scores: Any = dict(max_tokens=0, echo=True, logprobs=1)
    together = client.completions.create(model="base+formal", prompt=texts, **scores)
    for text, choice in zip(texts, together.choices, strict=True):
        alone = client.completions.create(model="base+formal", prompt=text, **scores).choices[0]
        assert "".join(alone.logprobs.tokens) == text
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(alone.logprobs.token_logprobs[1:], abs=1e-4)


@pytest.mark.real
def test_a_batch_takes_as_long_as_generate():
    """Eight rows with vectors of their own; seconds of the processor, so that other processes do not count."""
    vectors, tokenizer = load_vectors({name: zoo.folder(name) for name in ("lower_case", "formal")})
    prompt = tokenizer("Once upon a time there was")["input_ids"]
    sampling = Sampling(logit_bias=dict.fromkeys(end_tokens(vectors.model.get_base_model(), tokenizer), -1000.0))

    def served() -> None:
        engine = Engine(vectors, tokenizer, batch=8)
        for row in range(8):
            vector = (RowVector(("lower_case", "formal")[row % 2]),)
            engine.submit(Job([*prompt], 16, lambda event: None, vector, sampling))
        engine.run()

    def generated() -> None:
        ids = torch.tensor([prompt] * 8)
        vectors.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=16, max_new_tokens=16, do_sample=False,
            adapter_names=["lower_case", "formal"] * 4, pad_token_id=0,
        )  # fmt: skip

    assert min(seconds(served) for _ in range(3)) < 1.25 * min(seconds(generated) for _ in range(3))


def seconds(function: Callable[[], None]) -> float:
    """Of the processor."""
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.mark.real
def test_tokens_come_before_the_answer_is_complete(embedded):
    client = openai.OpenAI(base_url=embedded, api_key="a-key-of-this-test", max_retries=0)
    start, arrived = time.monotonic(), []
    for chunk in client.completions.create(model="base", prompt="Once upon a time", max_tokens=40, stream=True):
        arrived += [time.monotonic() - start] if chunk.choices[0].text else []
    assert len(arrived) > 20 and arrived[0] < arrived[-1] / 3
