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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
from served import running, save_home

from steertune.recipes.lab import zoo

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
        state = requests.get(f"{served.url}/health").json()
        assert (state["running"], state["waiting"]) == (0, 0) and refused > 0, "the queue was full at times"
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
                assert choice.logprobs.token_logprobs[1:] == pytest.approx(alone.logprobs.token_logprobs[1:], abs=1e-4)


@pytest.mark.real
def test_tokens_come_before_the_answer_is_complete(embedded):
    client = openai.OpenAI(base_url=embedded, api_key="a-key-of-this-test", max_retries=0)
    start, arrived = time.monotonic(), []
    for chunk in client.completions.create(model="base", prompt="Once upon a time", max_tokens=40, stream=True):
        arrived += [time.monotonic() - start] if chunk.choices[0].text else []
    assert len(arrived) > 20 and arrived[0] < arrived[-1] / 3
