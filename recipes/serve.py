"""Answer requests, each with its own vector and strength, in mixed batches.

    steertune serve careful=runs/careful/adapter warm=runs/warm/adapter --input requests.jsonl --output answers.jsonl
    echo '{"prompt": "Shall I quit?", "vector": "careful", "strength": 1.5}' | steertune serve careful=my-vector

A request is a line of JSON: `prompt` (text or messages), and if wanted `vector` (a name; without one the base model
answers), `strength` (1), `new_tokens` (60), `temperature` (0: greedy), `seed` (0) and `id` (the line's number). The
answer is a line with `id` and `answer`, in the order of the requests. What a request gets does not depend on what else
is in its batch, sampling included (within rounding, which in 16 bits can change a word). A file of answers is
continued: requests whose `id` stands in it are not answered again.

In Python: `Server(model, tokenizer).answers([Request("Shall I quit?", "careful", 1.5)])`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any

import torch
from peft import PeftModel
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from steertune.adapters.layer import BASE_ROW
from steertune.recipes.lab.command_line import (
    Argument,
    Base,
    Count,
    Device,
    DType,
    Option,
    Threads,
    command,
)
from steertune.recipes.lab.data import adapter_config, load_steered
from steertune.recipes.lab.files import ArmError, nearest, reasons
from steertune.recipes.lab.generation import as_asked
from steertune.recipes.lab.processes import begin, default_device
from steertune.recipes.lab.progress import Bar, progress

_BATCH = 8


@command
def main(
    vectors: Annotated[list[str], Argument(metavar="NAME=FOLDER", help="adapters, and what requests call them")],
    input: Annotated[Path | None, Option(help="a file of requests (standard input)")] = None,
    output: Annotated[Path | None, Option(help="a file of answers (standard output)")] = None,
    model: Base = None,
    dtype: DType = "float32",
    device: Device = None,
    batch: Annotated[int, Count("requests at a time")] = _BATCH,
    threads: Threads = None,
) -> int:
    """Answer the requests; the exit code is 1 when one was refused."""
    if input is not None and not input.is_file():
        raise ArmError(f"--input {input}: there is no such file.")
    done = _answered(output)
    begin(threads, only_one=True)
    loaded, tokenizer = load_vectors(_named(vectors), model, dtype)
    server = Server(loaded.to(device or default_device()), tokenizer, batch)
    with (
        nullcontext(sys.stdin) if input is None else input.open(encoding="utf-8") as requests,
        nullcontext(sys.stdout) if output is None else output.open("a", encoding="utf-8") as answers,
    ):
        lines = list(requests) if input is not None else requests  # how many there are is known of a file alone
        with progress("Requests", total=len(lines) if isinstance(lines, list) else 1, show=input is not None) as bar:
            return _serve(server, lines, answers, done, bar)


class Request(BaseModel, extra="forbid", strict=True):
    """What is asked.

    Attributes:
        prompt: Text, which is continued, or messages, which are asked through the chat template.
        vector: Name of an adapter; None: the base model answers.
        strength: Of the vector.
        new_tokens: Longest answer.
        temperature: 0 is greedy.
        seed: Of this request's random numbers.
        id: Of the request.
    """

    prompt: str | list[dict[str, str]] = Field(min_length=1)
    vector: str | None = None
    strength: float = Field(default=1.0, allow_inf_nan=False)
    new_tokens: int = Field(default=60, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    seed: int = 0
    id: int | str | None = None


class Server:
    """Answers of one model with several steering vectors.

    Args:
        model: With the vectors as adapters (see `load_vectors`).
        tokenizer: Its tokenizer.
        batch: Requests at a time.
    """

    def __init__(self, model: PeftModel, tokenizer: Any, batch: int = _BATCH) -> None:
        self.model, self.tokenizer, self.batch = model.eval(), tokenizer, batch

    def check(self, request: Request) -> None:
        """Raise an ArmError for what cannot be answered."""
        known = sorted(self.model.peft_config)
        if request.vector is not None and request.vector not in known:
            raise ArmError(f"vector={request.vector!r} is none of {known}.{nearest(request.vector, known)}")
        if not isinstance(request.prompt, str) and self.tokenizer.chat_template is None:
            raise ArmError("prompt is a list of messages, and the tokenizer has no chat template: give text.")
        context = getattr(self.model.config, "max_position_embeddings", None)
        tokens = len(self._ids(request)) + request.new_tokens
        if context is not None and tokens > context:
            raise ArmError(f"The prompt and its answer take {tokens} tokens, the model reads {context}.")

    def answers(self, requests: Sequence[Request]) -> list[str]:
        """One answer a request, in their order.

        Raises:
            ArmError: a request that cannot be answered.
        """
        for request in requests:
            self.check(request)
        ids = [self._ids(request) for request in requests]
        found = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(ids[i]))  # prompts of like length: little padding
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            for row, answer in zip(
                rows, self._batch([requests[i] for i in rows], [ids[i] for i in rows]), strict=True
            ):
                found[row] = answer
        return found

    def _ids(self, request: Request) -> list[int]:
        special = isinstance(request.prompt, str)
        return self.tokenizer(as_asked(self.tokenizer, [request.prompt])[0], add_special_tokens=special)["input_ids"]

    @torch.no_grad()
    def _batch(self, requests: Sequence[Request], ids: Sequence[list[int]]) -> list[str]:
        width = max(map(len, ids))
        end = self.tokenizer.eos_token_id
        padded = torch.tensor([[end] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        out: Any = self.model.generate(
            input_ids=padded.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            adapter_names=[BASE_ROW if r.vector is None else f"{r.vector}@{r.strength!r}" for r in requests],
            max_new_tokens=max(r.new_tokens for r in requests),
            do_sample=False,
            pad_token_id=end,
            logits_processor=LogitsProcessorList([_Sampled(requests)]),
            stopping_criteria=StoppingCriteriaList([_Lengths(requests, width)]),
        )
        new = [row[width : width + r.new_tokens] for row, r in zip(out, requests, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def load_vectors(folders: dict[str, Path], base: str | None = None, dtype: str = "float32") -> tuple[PeftModel, Any]:
    """A base model with several steering vectors, and its tokenizer.

    Args:
        folders: Name of a vector -> its adapter folder.
        base: As in `load_steered`.
        dtype: Of the base model.

    Raises:
        ArmError: no usable adapter, or one of another base model.
    """
    for folder in folders.values():
        adapter_config(folder)
    (first, folder), *others = folders.items()
    model, tokenizer, _ = load_steered(folder, base, dtype, first)
    for name, folder in others:
        try:
            model.load_adapter(str(folder), adapter_name=name)
        except ValueError as error:
            raise ArmError(f"{name}={folder}: {error}") from error
    return model.eval(), tokenizer


class _Sampled(LogitsProcessor):
    """Sampling that knows its row only: the largest of logits plus Gumbel noise is a draw from their softmax, and the
    noise of every row comes from a seed of its own."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._rows = [(i, r.temperature) for i, r in enumerate(requests) if r.temperature > 0]
        self._noise = {i: torch.Generator().manual_seed(requests[i].seed) for i, _ in self._rows}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, temperature in self._rows:
            uniform = torch.rand(scores.shape[1], generator=self._noise[row], dtype=torch.float64)
            gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
            scores[row] = (scores[row].double() / temperature + gumbel.to(scores.device)).to(scores.dtype)
        return scores


class _Lengths(StoppingCriteria):
    """Every row ends at its own length."""

    def __init__(self, requests: Sequence[Request], width: int) -> None:
        self._ends = torch.tensor([width + r.new_tokens for r in requests])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return (input_ids.shape[1] >= self._ends).to(input_ids.device)


def _serve(server: Server, asked: Iterable[str], said: IO[str], done: set[Any], bar: Bar) -> int:
    """Answer line after line, some batches at a time; a refused request has an `error` in place of an answer."""
    refused, seen = 0, set()
    for lines in _parts(enumerate(asked), server.batch):
        good: list[tuple[Request, dict[str, Any]]] = []
        replies: list[dict[str, Any]] = []
        for number, line in lines:
            bar.advance()
            request, error = _read(server, line, number)
            if request.id in done:
                continue
            if request.id in seen:
                error = f"id={request.id!r} was asked before."
            seen.add(request.id)
            replies.append({"id": request.id} | ({} if error is None else {"error": error}))
            if error is None:
                good.append((request, replies[-1]))
        answers = server.answers([request for request, _ in good])
        for (_, reply), answer in zip(good, answers, strict=True):
            reply["answer"] = answer
        refused += len(replies) - len(good)
        said.writelines(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies)
        said.flush()
    return 1 if refused else 0


def _read(server: Server, line: str, number: int) -> tuple[Request, str | None]:
    """The request of a line; and why it is refused, if it is."""
    empty = Request(prompt="-", id=number)
    try:
        request = Request.model_validate_json(line)
    except ValidationError as error:
        return empty, reasons(error)
    request = request.model_copy(update={"id": number if request.id is None else request.id})
    try:
        server.check(request)
    except ArmError as error:
        return request, str(error)
    return request, None


def _parts(lines: Iterable[tuple[int, str]], size: int) -> Iterator[list[tuple[int, str]]]:
    """Lines that say something, `size` at a time."""
    rest = ((number, line) for number, line in lines if line.strip())
    while part := list(islice(rest, size)):
        yield part


def _answered(file: Path | None) -> set[Any]:
    """Ids that a file of answers holds.

    Raises:
        ArmError: it is no such file.
    """
    if file is None or not file.exists():
        return set()
    text = file.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ArmError(f"--output {file}: its last line is cut off. Delete that line; the rest is kept.")
    try:
        found = {json.loads(line)["id"] for line in text.splitlines()}
    except (ValueError, TypeError, KeyError) as error:
        raise ArmError(f"--output {file} is there, and is no file of answers. Choose another.") from error
    return found


def _named(words: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not name or "@" in name or "." in name:
            raise ArmError(f"{word!r}: vectors are given as NAME=FOLDER, the name without '@' and '.'.")
        if name in found:
            raise ArmError(f"{name!r} is given twice.")
        found[name] = Path(folder)
    return found


if __name__ == "__main__":
    sys.exit(main())
