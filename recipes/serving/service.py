"""A running service: turns requests of OpenAI's protocol into jobs for the engine's thread."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steertune.adapters.monitors import Monitor
from steertune.recipes.lab.files import ArmError, nearest, shown
from steertune.recipes.lab.forms import has_template
from steertune.recipes.serving.answers import ChatForm, CompletionForm, Form
from steertune.recipes.serving.call import Call, samplings
from steertune.recipes.serving.defaults import BATCH, LONGEST, QUEUE, SECONDS
from steertune.recipes.serving.engine import Engine
from steertune.recipes.serving.errors import ApiError
from steertune.recipes.serving.limits import Limits, read_prompt
from steertune.recipes.serving.metrics import Metrics
from steertune.recipes.serving.names import Steering, combined, read_model_name
from steertune.recipes.serving.schema import ChatRequest, CompletionRequest, GenerationRequest
from steertune.recipes.serving.vectors import Vectors
from steertune.recipes.serving.worker import QueueFull, Stopped, Worker


@dataclass(frozen=True)
class Settings:
    """Settings of a service.

    Attributes:
        name: Name of the base model.
        batch: Number of answers at a time.
        longest: Maximum length of an answer, in tokens.
        seconds: Time limit of a request, from its arrival.
        queue: Maximum number of waiting answers.
        key: The key that requests must send; None: no key is needed.
        folder: Folder below which requests can load vectors by their path; None: they cannot load vectors by path.
        hosts: Host names that requests can use; None: any.
    """

    name: str
    batch: int = BATCH
    longest: int = LONGEST
    seconds: float = SECONDS
    queue: int = QUEUE
    key: str | None = None
    folder: Path | None = None
    hosts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Started:
    """A running request."""

    call: Call
    form: Form
    prompts: list[list[int]]


class Service:
    """Answers requests with one model and its vectors.

    Args:
        vectors: The model and its vectors.
        tokenizer: The model's tokenizer.
        settings: Limits and names.
        monitors: The monitors that requests can name.
    """

    def __init__(
        self, vectors: Vectors, tokenizer: Any, settings: Settings, monitors: Mapping[str, Monitor] | None = None
    ) -> None:
        self.settings, self.vectors, self.monitors = settings, vectors, dict(monitors or {})
        self.frames: tuple[str, ...] = ("'none'",)
        """Pages that can embed the explorer. By default none: a page could make visitors click on what it covers."""
        self.metrics = Metrics()
        # tokenizers are not thread-safe, so requests are read with a copy
        self.tokenizer = copy.deepcopy(tokenizer)
        engine = Engine(vectors, tokenizer, settings.batch, self.metrics.step, self.monitors)
        self.limits = Limits.of(engine.base, tokenizer, settings.longest)
        self._vocabulary = engine.base.config.get_text_config().vocab_size
        self.worker = Worker(engine, settings.queue)
        self.metrics.running.set_function(lambda: engine.running)
        self.metrics.waiting.set_function(lambda: self.worker.waiting)
        self.metrics.vectors.set_function(lambda: len(vectors.named))
        self._reader = ThreadPoolExecutor(1, "reader")

    def stop(self) -> None:
        """End the threads; running answers fail."""
        self.worker.stop()
        self._reader.shutdown()

    async def in_reader(self, function: Callable[[], Any]) -> Any:
        """Run work that can be slow on a thread beside the event loop, one task at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, function)

    async def start(self, body: ChatRequest | CompletionRequest) -> Started:
        """Check a request and submit it to the engine.

        Raises:
            ApiError: it cannot be answered.
        """
        try:
            named = read_model_name(body.model, self.settings.name, [*self.vectors.named])
        except ArmError as error:
            raise ApiError(404, str(error), "model_not_found") from error
        try:
            steering = combined(named, body.steering)
            watching = self.watching(body.watching)
            prompts, jobs = await self.in_reader(lambda: self._jobs(body))
            begun = time.monotonic()
            gate = None if body.gate is None else (body.gate, watching[body.gate.monitor])
            call = Call(self.vectors, steering, lambda: self.metrics.seconds.observe(time.monotonic() - begun), gate)
            form = self._form(body, steering, call, prompts, watching)
            call.start(self.worker, jobs)
        except ArmError as error:
            raise ApiError(400, str(error)) from error
        except QueueFull as error:
            raise ApiError(429, str(error), "queue_full") from error
        except Stopped as error:
            raise ApiError(503, str(error), "stopped") from error
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return Started(call, form, prompts)

    def watching(self, names: Sequence[str]) -> dict[str, Monitor]:
        """The monitors that a request names.

        Raises:
            ArmError: there is no monitor of this name.
        """
        for name in names:
            if name not in self.monitors:
                served = sorted(self.monitors)
                fix = f"must be one of {served}" if served else "is not loaded. Start with --monitor [NAME=]FOLDER"
                raise ArmError(f"monitor {shown(name)} {fix}.{nearest(name, served)}")
        return {name: self.monitors[name] for name in names}

    def _jobs(self, body: ChatRequest | CompletionRequest) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """The prompts, and the arguments of a `Job` for each answer."""
        for token in body.logit_bias or {}:
            self._check_token(token, "logit_bias")
        if isinstance(body, ChatRequest):
            if not has_template(self.tokenizer):
                raise ArmError("The model's tokenizer has no chat template. Send text to /v1/completions.")
            prompts = [read_prompt(self.tokenizer, [message.as_text() for message in body.messages])]
            name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
            limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
            top, echo = body.top, False
        else:
            prompts, name, limit = [self._read(prompt) for prompt in body.prompts], "max_tokens", body.max_tokens
            top, echo = body.logprobs, bool(body.echo) and body.logprobs is not None
            if not prompts:
                raise ArmError("prompt=[] is empty. Give a text, token ids, or a list of either.")
        choices = len(prompts) * (body.n or 1)
        if choices > self.settings.queue:
            raise ArmError(f"The request asks for {choices} answers, but the queue takes {self.settings.queue}.")
        jobs = []
        for prompt in prompts:
            new_tokens = max(1, self.limits.room(prompt)) if limit is None else limit
            self.limits.check(prompt, new_tokens, name)
            jobs += [self._job(body, prompt, new_tokens, sampling, top, echo) for sampling in samplings(body)]
        return prompts, jobs

    def _job(
        self, body: GenerationRequest, prompt: list[int], new_tokens: int, sampling: Any, top: int | None, echo: bool
    ) -> dict[str, Any]:
        seconds = self.settings.seconds
        return {
            "prompt": prompt,
            "new_tokens": new_tokens,
            "sampling": sampling,
            "stops": body.stops,
            "monitors": body.watching,
            "top": top,
            "echo": echo,
            "seconds": seconds,
            "deadline": time.monotonic() + seconds,
        }

    def _read(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt of `completions`."""
        if isinstance(prompt, str):
            return read_prompt(self.tokenizer, prompt)
        for token in prompt:
            self._check_token(token, "prompt")
        return prompt

    def _check_token(self, token: int, name: str) -> None:
        if not 0 <= token < self._vocabulary:
            raise ArmError(f"{name}: token {shown(token)} must be in 0 .. {self._vocabulary - 1}.")

    def _form(
        self,
        body: GenerationRequest,
        steering: Sequence[Steering],
        call: Call,
        prompts: list[list[int]],
        watching: Mapping[str, Monitor],
    ) -> Form:
        """The form that writes the response."""
        digest = hashlib.blake2b(self.settings.name.encode(), digest_size=6)
        for one, vector in zip(steering, call.held, strict=False):
            digest.update(f"+{vector.digest}@{one.strength!r}/{one.positions}".encode())
        given = (self.tokenizer, body.model, f"steertune-{digest.hexdigest()}")
        if isinstance(body, ChatRequest):
            return ChatForm(*given, body.top is not None, watching)
        assert isinstance(body, CompletionRequest)
        texts = None
        if body.echo:
            written = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in body.prompts]
            texts = [text for text in written for _ in range(body.n or 1)]
        return CompletionForm(*given, body.logprobs is not None, watching, prompts=texts)
