"""A judge behind any OpenAI-compatible endpoint. A judgement that fails is None, never 0."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from datasets import Dataset
from pydantic import BaseModel, Field, field_validator

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.scorers import Scorer


class Options(BaseModel, extra="forbid", strict=True):
    """Where the judge is and which question it answers.

    Attributes:
        url: The endpoint's address without `/chat/completions`.
        model: Name of the judging model.
        question: The question; `{prompt}` and `{answer}` are filled in. The reply must contain `Score: <number>`.
        highest: The largest valid score; scores are divided by it.
        key: Name of the environment variable that holds the API key; empty: none.
        tries: Number of tries before a judgement counts as failed.
        timeout: Seconds for one try.
    """

    url: str = Field(pattern=r"^https?://")
    model: str
    question: str
    highest: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    key: str = ""
    tries: int = Field(default=3, ge=1, le=100)
    timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)

    @field_validator("question")
    @classmethod
    def _has_an_answer(cls, question: str) -> str:
        if "{answer}" not in question:
            raise ValueError("it must contain {answer}")
        return question


def fit(options: Options, rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """The judge as a scorer; nothing is fitted.

    Raises:
        ArmError: the environment variable with the key is not set.
    """
    if options.key and options.key not in os.environ:
        raise ArmError(f"scorer.key: the environment variable {options.key!r} is not set.")
    headers = {"Authorization": f"Bearer {os.environ[options.key]}"} if options.key else {}

    def ask(prompt: str, answer: str) -> float | None:
        # in one pass: a prompt or an answer may itself contain {answer}, or other braces
        texts = {"prompt": prompt, "answer": answer}
        question = re.sub(r"\{(prompt|answer)\}", lambda match: texts[match[1]], options.question)
        message = {"role": "user", "content": question}
        body = {"model": options.model, "temperature": 0, "messages": [message]}
        for _ in range(options.tries):
            try:
                reply = requests.post(
                    f"{options.url.rstrip('/')}/chat/completions", json=body, headers=headers, timeout=options.timeout
                )
                reply.raise_for_status()
                text = reply.json()["choices"][0]["message"]["content"]
            except (requests.RequestException, KeyError, IndexError, TypeError, ValueError):
                continue
            score_line = re.search(r"score:\s*(-?\d+(?:\.\d+)?)", str(text), re.IGNORECASE)
            if score_line and 0 <= float(score_line[1]) <= options.highest:
                return float(score_line[1]) / options.highest
        return None

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(ask, prompts, answers))

    return Scorer(score, f"judge {options.model}, scores 0 to {options.highest:g}")
