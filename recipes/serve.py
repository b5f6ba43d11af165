"""Answer requests, each with its own vector and strength, in mixed batches.

    steertune serve careful=runs/careful/adapter warm=runs/warm/adapter --input requests.jsonl --output answers.jsonl
    echo '{"prompt": "Shall I quit?", "vector": "careful", "strength": 1.5}' | steertune serve careful=my-vector

A request is a line of JSON: `prompt` (text or messages), and if wanted `vector` (a name; without one the base model
answers), `strength` (1), `new_tokens` (60), `temperature` (0: greedy), `seed` (0) and `id` (the line's number, from
0). The answer is a line with `id` and `answer`, in the order of the requests. What a request gets does not depend on
what else is in its batch, sampling included (within rounding, which in 16 bits can change a word). A file of answers
is continued: requests whose `id` stands in it are not answered again.

A request that cannot be answered gets a line with `id` and `error`, and the others their answers: a line that is no
request or no UTF-8, or is longer than a megabyte; more tokens than `--longest` or than the model reads; a strength
at which the model computes NaN or infinity; an answer that is not there after `--seconds`.

With `--monitor FOLDER` every answer is scored while it is generated: its line also has `score` and `flagged`. A
flagged answer can be replaced: `--resample 4` samples it four times again and gives the least suspicious of all,
`--steer careful@1.5` answers again with a vector (the probe decides, the vector acts). Such a line has `first`, the
answer that was flagged, with its score.

In Python: `Server(model, tokenizer).answers([Request(prompt="Shall I quit?", vector="careful", strength=1.5)])`.
"""

from __future__ import annotations

import codecs
import json
import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Annotated, Any

import torch
from peft import PeftModel
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from steertune.adapters import monitors
from steertune.adapters.layer import BASE_ROW, check_adapter_name
from steertune.adapters.monitors import LiveScores, Monitor
from steertune.recipes.lab.command_line import command
from steertune.recipes.lab.data import adapter_config, load_steered
from steertune.recipes.lab.files import ArmError, nearest, reasons, shown, without_repeats
from steertune.recipes.lab.forms import has_template
from steertune.recipes.lab.generation import broken_rows, check_strength, ends_of, left_padded, prompt_ids
from steertune.recipes.lab.options import Argument, Base, Count, Device, DType, Option, Threads
from steertune.recipes.lab.processes import begin, default_device
from steertune.recipes.lab.progress import Bar, progress
from steertune.recipes.lab.remedies import Answer, Remedy, check_monitor, remedy_of
from steertune.trainers import context_length

_BATCH = 8
_LONGEST = 1024
_SECONDS = 600
_LONGEST_LINE = 2**20  # bytes


@command
def main(
    vectors: Annotated[list[str], Argument(metavar="NAME=FOLDER", help="adapters, and what requests call them")],
    input: Annotated[Path | None, Option(help="a file of requests (standard input)")] = None,
    output: Annotated[Path | None, Option(help="a file of answers (standard output)")] = None,
    model: Base = None,
    dtype: DType = "float32",
    device: Device = None,
    batch: Annotated[int, Count("requests at a time")] = _BATCH,
    longest: Annotated[int, Count("largest `new_tokens` of a request")] = _LONGEST,
    seconds: Annotated[int, Count("time for one batch of answers")] = _SECONDS,
    monitor: Annotated[Path | None, Option(help="folder of a monitor that scores every answer")] = None,
    resample: Annotated[int | None, Count("times that a flagged answer is sampled again")] = None,
    steer: Annotated[
        str | None, Option(help="vector with which a flagged request is answered again", metavar="NAME@STRENGTH")
    ] = None,
    threads: Threads = None,
) -> int:
    """Answer the requests; the exit code is 1 when one was refused."""
    folders = _named(vectors)
    done = _check_files(input, output)
    remedy = remedy_of(resample, steer, [*folders])
    check_monitor(monitor, remedy)
    begin(threads, only_one=True)
    loaded, tokenizer = load_vectors(folders, model, dtype)
    reader = None if monitor is None else monitors.load(monitor, loaded, tokenizer)
    server = Server(loaded.to(device or default_device()), tokenizer, batch, longest, seconds, reader, remedy)
    with (
        nullcontext(sys.stdin.fileno()) if input is None else _opened(input) as source,
        nullcontext(sys.stdout) if output is None else output.open("a", encoding="utf-8") as answers,
        progress("Requests", total=input.stat().st_size if input else 1, show=input is not None) as bar,
    ):
        return _serve(server, Lines(source, bar), answers, done)


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
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)
    id: int | str | None = None


class Server:
    """Answers of one model with several steering vectors.

    Args:
        model: With the vectors as adapters (see `load_vectors`).
        tokenizer: Its tokenizer.
        batch: Requests at a time.
        longest: Largest `new_tokens` of a request.
        seconds: Time for one batch of answers.
        monitor: Scores every answer; None: answers have no score.
        remedy: What becomes of answers that it flags; None: nothing.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: Any,
        batch: int = _BATCH,
        longest: int = _LONGEST,
        seconds: float = _SECONDS,
        monitor: Monitor | None = None,
        remedy: Remedy | None = None,
    ) -> None:
        self.model, self.tokenizer, self.batch = model.eval(), tokenizer, batch
        self.longest, self.seconds = longest, seconds
        self.monitor, self.remedy = monitor, remedy

    def check(self, request: Request) -> None:
        """Raise an ArmError for what cannot be answered."""
        if request.new_tokens > self.longest:
            raise ArmError(f"new_tokens={shown(request.new_tokens)}: at most {self.longest} are answered (--longest).")
        known = sorted(self.model.peft_config)
        if request.vector is not None and request.vector not in known:
            raise ArmError(f"vector={shown(request.vector)} is none of {known}.{nearest(request.vector, known)}")
        if not isinstance(request.prompt, str) and not has_template(self.tokenizer):
            raise ArmError("prompt is a list of messages, and the tokenizer has no chat template: give text.")
        if request.vector is not None:
            check_strength(self.model, request.strength, request.vector)
        if isinstance(request.prompt, list) and not all({"role", "content"} <= {*part} for part in request.prompt):
            raise ArmError("prompt: every message needs a role and content.")
        try:
            prompt = self._ids(request)
        except Exception as error:  # a chat template is a program, and refuses conversations with errors of its own
            raise ArmError(f"The prompt cannot be read: {type(error).__name__}: {error}") from error
        if not prompt:
            raise ArmError("The prompt has no tokens: there is nothing to answer.")
        context = context_length(self.model.config, self.tokenizer)
        tokens = len(prompt) + request.new_tokens
        if context is not None and tokens > context:
            raise ArmError(f"The prompt and its answer take {tokens} tokens, the model reads {context}.")

    def answers(self, requests: Sequence[Request]) -> list[str]:
        """One answer a request, in their order.

        Raises:
            ArmError: a request that cannot be answered.
        """
        for request in requests:
            self.check(request)
        replies = self.replies(requests)
        for reply in replies:
            if isinstance(reply, ArmError):
                raise reply
        return [str(reply) for reply in replies]

    def replies(self, requests: Sequence[Request]) -> list[str | ArmError]:
        """The same of requests that were checked, with the error of each that has no answer. Answers that the monitor
        flags are replaced, if there is a remedy."""
        replies = self._replies(requests)
        flagged = [i for i, reply in enumerate(replies) if isinstance(reply, Answer) and reply.flagged]
        if self.remedy is None or not flagged:
            return replies
        for changes in self.remedy.changes:
            again = [requests[i].model_copy(update=changes(requests[i])) for i in flagged]
            for i, other in zip(flagged, self._replies(again), strict=True):
                replies[i] = self.remedy.choose(replies[i], other)
        return replies

    def _replies(self, requests: Sequence[Request]) -> list[str | ArmError]:
        """What every request is answered at first."""
        ids = [self._ids(request) for request in requests]
        found: list[str | ArmError] = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(ids[i]))  # prompts of like length: little padding
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            for row, answer in zip(
                rows, self._batch([requests[i] for i in rows], [ids[i] for i in rows]), strict=True
            ):
                found[row] = answer
        return found

    def _ids(self, request: Request) -> list[int]:
        return prompt_ids(self.tokenizer, [request.prompt])[0]

    def _batch(self, requests: Sequence[Request], ids: Sequence[list[int]]) -> list[str | ArmError]:
        """The replies of one batch; if it fails as a whole, each request is answered alone."""
        try:
            return self._generated(requests, ids)
        except (ValueError, RuntimeError, IndexError) as error:  # also out of memory
            if len(requests) == 1:
                return [ArmError(f"It cannot be answered: {type(error).__name__}: {error}")]
        return [self._batch([request], [row])[0] for request, row in zip(requests, ids, strict=True)]

    @torch.no_grad()
    def _generated(self, requests: Sequence[Request], ids: Sequence[list[int]]) -> list[str | ArmError]:
        inputs, filler = left_padded(self.tokenizer, ids)
        width = inputs["input_ids"].shape[1]
        sampled, lengths = _Sampled(requests, filler), _Lengths(requests, width, filler, self.seconds)
        with LiveScores([] if self.monitor is None else [self.monitor], self.model, width) as live:
            out: Any = self.model.generate(
                **{name: values.to(self.model.device) for name, values in inputs.items()},
                adapter_names=[BASE_ROW if r.vector is None else f"{r.vector}@{r.strength!r}" for r in requests],
                max_new_tokens=max(r.new_tokens for r in requests),
                do_sample=False,
                pad_token_id=filler,
                logits_processor=LogitsProcessorList([sampled]),
                stopping_criteria=StoppingCriteriaList([lengths]),
            )
        new = [row[width : width + r.new_tokens] for row, r in zip(out, requests, strict=True)]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        replies: list[str | ArmError] = [text.strip() for text in texts]
        if self.monitor is not None:
            ends = ends_of(self.model)
            for row, text in enumerate(texts):
                # the last token of an answer that is cut off is read only if others of the batch go on: leave it out
                ids = new[row].tolist()
                tokens = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
                replies[row] = Answer.scored(text.strip(), self.monitor, live.scores(row, tokens)[0])
        for row in lengths.late:
            replies[row] = ArmError(f"The answer was not there after {self.seconds:g} seconds (--seconds).")
        for row in sampled.broken:
            replies[row] = ArmError(f"strength={requests[row].strength:g}: the model's logits are NaN or infinite.")
        return replies


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
    noise of every row comes from a seed of its own.

    Rows whose logits are not finite end at once; they are in `broken`."""

    def __init__(self, requests: Sequence[Request], end: int) -> None:
        self.broken: set[int] = set()
        self._end = end
        self._rows = [(i, r.temperature) for i, r in enumerate(requests) if r.temperature > 0]
        self._noise = {i: torch.Generator().manual_seed(requests[i].seed) for i, _ in self._rows}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        broken = broken_rows(scores)
        self.broken.update(broken.nonzero().flatten().tolist())
        scores[broken] = torch.zeros_like(scores[0]).index_fill(0, torch.tensor(self._end, device=scores.device), 1.0)
        for row, temperature in self._rows:
            uniform = torch.rand(scores.shape[1], generator=self._noise[row], dtype=torch.float64)
            gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
            scores[row] = (scores[row].double() / temperature + gumbel.to(scores.device)).to(scores.dtype)
        return scores


class _Lengths(StoppingCriteria):
    """Every row ends at its own length, and all of them when the time is over; rows that had not ended are `late`."""

    def __init__(self, requests: Sequence[Request], width: int, end: int, seconds: float) -> None:
        self.late: list[int] = []
        self._width, self._end, self._over = width, end, time.monotonic() + seconds
        self._ends = torch.tensor([width + r.new_tokens for r in requests])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = input_ids.shape[1] >= self._ends
        if time.monotonic() > self._over and not self.late:
            ended = done | (input_ids[:, self._width :] == self._end).any(dim=1).cpu()
            self.late = (~ended).nonzero().flatten().tolist()
            return torch.ones_like(done).to(input_ids.device)
        return done.to(input_ids.device)


class Lines:
    """Lines of a file or pipe, of bounded length, as bytes; those that are there together come as one part.

    Args:
        source: A file descriptor.
        bar: Moved by every byte that is read.
        longest: Bytes of a line; of a longer one the rest is thrown away.
    """

    def __init__(self, source: int, bar: Bar, longest: int = _LONGEST_LINE) -> None:
        self.source, self.bar, self.longest = source, bar, longest
        self.number = 0
        self._buffer, self._ended, self._cut = b"", False, False

    def parts(self, size: int) -> Iterator[list[tuple[int, bytes | None]]]:
        """Numbers and contents of lines that say something, `size` at a time, or fewer if no more are there yet; None
        for a line that is too long."""
        while not self._ended or self._buffer:
            part: list[tuple[int, bytes | None]] = []
            while len(part) < size and (line := self._next(wait=not part)) is not None:
                too_long, content = line
                if too_long or content.strip():
                    part.append((self.number, None if too_long else content))
                self.number += 1
            if part:
                yield part

    def _next(self, wait: bool) -> tuple[bool, bytes] | None:
        """Whether the next line is too long, and what it holds; None if it is not there yet, or the end is reached."""
        while b"\n" not in self._buffer and not self._ended:
            if not wait and not _is_ready(self.source):
                return None
            self._read()
        if not self._buffer:
            return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        too_long, self._cut = self._cut or len(line) > self.longest, False
        return too_long, line.removeprefix(codecs.BOM_UTF8) if self.number == 0 else line

    def _read(self) -> None:
        chunk = os.read(self.source, 2**16)
        self._ended = not chunk
        self.bar.advance(len(chunk))
        self._buffer += chunk
        if b"\n" not in self._buffer and len(self._buffer) > self.longest:
            self._buffer, self._cut = b"x", True  # something stands for the line until its end comes


def _is_ready(source: int) -> bool:
    """Whether reading would not wait. Windows does not say it of pipes; there, whole batches are waited for."""
    try:
        return bool(select.select([source], [], [], 0)[0])
    except OSError:
        return True


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    """The descriptor of a file that is read."""
    with file.open("rb") as opened:
        yield opened.fileno()


def _serve(server: Server, lines: Lines, said: IO[str], done: set[Any]) -> int:
    """Answer line after line, some batches at a time; a refused request has an `error` in place of an answer."""
    refused, seen = 0, set()
    for part in lines.parts(server.batch):
        good: list[tuple[Request, dict[str, Any]]] = []
        replies: list[dict[str, Any]] = []
        for number, line in part:
            request, error = _read(server, line, number)
            if request.id in done:
                continue
            if request.id in seen and error is None:
                error = f"id={shown(request.id)} was asked before. A request without an id has its line's number."
            seen.add(request.id)
            replies.append({"id": request.id} | ({} if error is None else {"error": error}))
            if error is None:
                good.append((request, replies[-1]))
        answers = server.replies([request for request, _ in good])
        for (_, reply), answer in zip(good, answers, strict=True):
            if isinstance(answer, ArmError):
                reply["error"] = str(answer)
            else:
                reply |= {"answer": str(answer), **(answer.details() if isinstance(answer, Answer) else {})}
        refused += sum("error" in reply for reply in replies)
        said.writelines(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies)
        said.flush()
    return 1 if refused else 0


def _read(server: Server, line: bytes | None, number: int) -> tuple[Request, str | None]:
    """The request of a line; and why it is refused, if it is."""
    empty = Request(prompt="-", id=number)
    if line is None:
        return empty, f"Line {number + 1} is longer than {_LONGEST_LINE} bytes. Send shorter prompts."
    try:
        text = line.decode()
        json.loads(text, object_pairs_hook=without_repeats)
        request = Request.model_validate_json(text)
    except UnicodeDecodeError as error:
        return empty, f"Line {number + 1} is no UTF-8 (byte {error.start}). Write requests in UTF-8."
    except ValidationError as error:
        return empty, reasons(error)
    except (ValueError, RecursionError) as error:
        return empty, f"Line {number + 1} is no JSON object: {error}"
    request = request.model_copy(update={"id": number if request.id is None else request.id})
    try:
        server.check(request)
    except ArmError as error:
        return request, str(error)
    return request, None


def _check_files(input: Path | None, output: Path | None) -> set[Any]:
    """Refuse files that cannot be read or written; return the ids that the file of answers holds.

    Raises:
        ArmError: the file does not exist, or the answers would be written over something else.
    """
    if input is not None and not input.is_file():
        raise ArmError(f"--input {input}: there is no such file.")
    if output is None:
        return set()
    if not output.absolute().parent.is_dir():
        raise ArmError(f"--output {output}: there is no folder {output.parent}. Make it, or choose another file.")
    if input is not None and output.exists() and output.samefile(input):
        raise ArmError(f"--output {output} is the file of requests. Choose another file.")
    return _answered(output)


def _answered(file: Path) -> set[Any]:
    """Ids that a file of answers holds. A last line that is cut off, as a full disk or a kill leaves it, is removed.

    Raises:
        ArmError: it is no such file.
    """
    if not file.exists():
        return set()
    if not file.is_file():
        raise ArmError(f"--output {file} is no file. Choose another.")
    whole, _, rest = file.read_bytes().rpartition(b"\n")
    try:
        ids = {json.loads(line)["id"] for line in whole.splitlines()}
        if rest and not rest.startswith(b'{"id": '):
            raise ValueError("its last line is no answer")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArmError(f"--output {file} is there, and is no file of answers. Choose another.") from error
    if rest:
        print(f"{file}: its last line is cut off. It is removed, and answered again.", file=sys.stderr)
        os.truncate(file, len(whole) + 1 if whole else 0)
    return ids


def _named(words: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not name or not folder or "@" in name or "." in name:
            raise ArmError(f"{shown(word)}: vectors are given as NAME=FOLDER, the name without '@' and '.'.")
        check_adapter_name(name)
        if name in found:
            raise ArmError(f"{name!r} is given twice.")
        found[name] = Path(folder)
    return found


if __name__ == "__main__":
    sys.exit(main())
