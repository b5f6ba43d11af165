"""Answer requests, each with its own vectors and strengths, in mixed batches: over HTTP, or line by line.

    steertune serve careful=runs/careful/adapter warm=runs/warm/adapter --port 8000
    steertune serve embedded --port 8000                       # the twelve vectors that come with the embedded model
    steertune serve careful=runs/careful/adapter --input requests.jsonl --output answers.jsonl
    echo '{"prompt": "Shall I quit?", "vector": "careful", "strength": 1.5}' | steertune serve careful=my-vector

With `--port` it serves OpenAI's chat completions and completions; a model name such as `base+careful@1.5` selects the
vectors. It listens on this machine only unless `--host` is set, and requires the key in the environment variable
STEERTUNE_API_KEY if that is set. See the page "Serve" of the documentation.

Without `--port`, a request is a line of JSON: `prompt` (text or messages), and optionally `vector` (a name; without
one the base model answers), `strength` (1), `steering` (further vectors, as over HTTP), `new_tokens` (60),
`temperature` (0: greedy), `seed` (0) and `id` (the line's number, from 0). The answer is a line with `id` and
`answer`, in the order of the requests. An existing file of answers is continued: requests whose `id` is in it are
skipped. A request that cannot be answered gets a line with `id` and `error`; the others are answered.

With `--monitor [NAME=]FOLDER ...` and `--port`, a request can name monitors that score its answer, token by token, and
a gate that acts on what they flag. Without `--port` there can be only one monitor, and every line also has `score` and
`flagged`, computed while the answer is generated. A flagged answer can be replaced: `--resample 4` samples it four
more times and returns the least suspicious answer, `--steer careful@1.5` answers again with a vector (the probe
decides, the vector acts). Such a line has `first`, the answer that was flagged.

An answer does not depend on the rest of its batch, sampling included (within rounding, which in 16 bits can change a
word). In Python: `Server(*load_vectors({"careful": folder})).answers([Request(prompt="Shall I quit?",
vector="careful", strength=1.5)])`.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from steertune.adapters import monitors
from steertune.recipes.lab.command_line import command
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.options import Argument, Base, Count, Device, DType, Option, Threads
from steertune.recipes.lab.processes import begin, device_of
from steertune.recipes.lab.progress import progress
from steertune.recipes.serving.defaults import BATCH, LONGEST, LOOPBACK, QUEUE, SECONDS
from steertune.recipes.serving.http import HttpServer, listen, serve_http
from steertune.recipes.serving.line_requests import Request, Server
from steertune.recipes.serving.line_service import check_files, serve_lines
from steertune.recipes.serving.lines import Lines, opened
from steertune.recipes.serving.loading import load_vectors, named_folders
from steertune.recipes.serving.remedies import check_monitors, remedy_of

__all__ = ["HttpServer", "Request", "Server", "load_vectors", "main"]

KEY = "STEERTUNE_API_KEY"


@command
def main(
    vectors: Annotated[
        list[str] | None,
        Argument(metavar="[NAME=FOLDER]...", help="adapters and their names in requests, or embedded[/NAME]"),
    ] = None,
    port: Annotated[int | None, Option(min=0, max=65535, help="serve HTTP on this port (0: a free one)")] = None,
    host: Annotated[str, Option(help="address that --port listens on")] = LOOPBACK,
    queue: Annotated[int, Count("with --port, how many answers can wait; more are refused")] = QUEUE,
    vectors_in: Annotated[Path | None, Option(help="folder of adapters that requests to --port can load")] = None,
    input: Annotated[Path | None, Option(help="a file of requests (standard input)")] = None,
    output: Annotated[Path | None, Option(help="a file of answers (standard output)")] = None,
    model: Base = None,
    dtype: DType = "float32",
    device: Device = None,
    batch: Annotated[int, Count("answers generated at the same time")] = BATCH,
    longest: Annotated[int, Count("tokens of the longest answer that a request can ask for")] = LONGEST,
    seconds: Annotated[int, Count("time limit for a request, in seconds")] = SECONDS,
    monitor: Annotated[
        list[str] | None,
        Option(help="monitors that score answers; only one without --port", metavar="[NAME=]FOLDER ..."),
    ] = None,
    resample: Annotated[int | None, Count("times that a flagged answer is sampled again")] = None,
    steer: Annotated[
        str | None, Option(help="vector for answering a flagged request again", metavar="NAME@STRENGTH")
    ] = None,
    threads: Threads = None,
) -> int:
    """Answer the requests; the exit code is 1 if a line was refused."""
    folders = named_folders(vectors or [])
    done = check_files(input, output) if port is None else set()
    if port is not None and (input is not None or output is not None):
        raise ArmError("--port serves HTTP and cannot be combined with --input or --output. Leave them out.")
    if vectors_in is not None and not vectors_in.is_dir():
        raise ArmError(f"--vectors-in {vectors_in}: the folder does not exist.")
    remedy = remedy_of(resample, steer, [*folders])
    readers = named_folders(monitor or [], name_by_folder=True)
    check_monitors(readers, remedy)
    if port is not None and remedy is not None:
        raise ArmError("--resample and --steer only work without --port, where every request has its own gate.")
    if port is None and len(readers) > 1:
        raise ArmError(f"--monitor names {len(readers)} monitors, but lines are scored by one. Give one, or --port.")
    begin(threads, only_one=True)
    where = device_of(device)
    if port is not None:
        with listen(host, port) as socket:
            loaded, tokenizer = load_vectors(folders, model, dtype, where)
            limits = {"batch": batch, "longest": longest, "seconds": seconds, "queue": queue}
            read = {name: monitors.load(folder, loaded.model, tokenizer) for name, folder in readers.items()}
            key, settings = os.environ.get(KEY), {**limits, "folder": vectors_in}
            return serve_http(loaded, tokenizer, socket, host, key, read, settings)
    loaded, tokenizer = load_vectors(folders, model, dtype, where)
    reader = next((monitors.load(folder, loaded.model, tokenizer) for folder in readers.values()), None)
    server = Server(loaded, tokenizer, batch, longest, seconds, reader, remedy)
    with (
        nullcontext(sys.stdin.fileno()) if input is None else opened(input) as source,
        nullcontext(sys.stdout) if output is None else output.open("a", encoding="utf-8") as answers,
        progress("Requests", total=input.stat().st_size if input else 1, show=input is not None) as bar,
    ):
        return serve_lines(server, Lines(source, bar), answers, done)


if __name__ == "__main__":
    sys.exit(main())
