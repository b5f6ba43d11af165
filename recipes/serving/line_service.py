"""Answer JSON lines with JSON lines, and continue a file of answers where it stopped."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from steertune.recipes.lab.files import ArmError, reasons, shown, without_repeats
from steertune.recipes.serving.line_requests import Request, Server
from steertune.recipes.serving.lines import LONGEST_LINE, Lines
from steertune.recipes.serving.remedies import Answer

_BATCHES = 4  # batches read at a time, so that a short answer does not wait for the longest of its batch


def serve_lines(server: Server, lines: Lines, output: IO[str], done: set[Any]) -> int:
    """Answer all lines, some batches at a time; a refused request gets an `error` instead of an answer."""
    refused, ids = 0, set()
    for part in lines.parts(_BATCHES * server.engine.batch):
        good: list[tuple[Request, dict[str, Any]]] = []
        replies: list[dict[str, Any]] = []
        for number, line in part:
            request, error = _read(server, line, number)
            if request.id in done:
                continue
            if request.id in ids and error is None:
                error = f"id={shown(request.id)} is taken by an earlier request. Default ids are line numbers."
            ids.add(request.id)
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
        output.writelines(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies)
        output.flush()
    return 1 if refused else 0


def _read(server: Server, line: bytes | None, number: int) -> tuple[Request, str | None]:
    """The request of a line, or the reason why it is refused."""
    empty = Request(prompt="-", id=number)
    if line is None:
        return empty, f"Line {number + 1} is longer than {LONGEST_LINE} bytes. Send shorter prompts."
    try:
        text = line.decode()
        json.loads(text, object_pairs_hook=without_repeats)
        request = Request.model_validate_json(text)
    except UnicodeDecodeError as error:
        return empty, f"Line {number + 1} is not UTF-8 (byte {error.start}). Write requests in UTF-8."
    except ValidationError as error:
        return empty, reasons(error)
    except (ValueError, RecursionError) as error:
        return empty, f"Line {number + 1} is not a JSON object: {error}"
    request = request.model_copy(update={"id": number if request.id is None else request.id})
    try:
        server.check(request)
    except ArmError as error:
        return request, str(error)
    return request, None


def check_files(input: Path | None, output: Path | None) -> set[Any]:
    """Refuse files that cannot be read or written; return the ids in the file of answers.

    Raises:
        ArmError: the file does not exist, or the answers would overwrite something else.
    """
    if input is not None and not input.is_file():
        raise ArmError(f"--input {input}: there is no such file.")
    if output is None:
        return set()
    if not output.absolute().parent.is_dir():
        raise ArmError(f"--output {output}: there is no folder {output.parent}. Create it, or choose another file.")
    if input is not None and output.exists() and output.samefile(input):
        raise ArmError(f"--output {output} is the file of requests. Choose another file.")
    return answered(output)


def answered(file: Path) -> set[Any]:
    """Ids in a file of answers. A last line that was cut off, by a full disk or a kill, is removed.

    Raises: ArmError: it is not a file of answers.
    """
    if not file.exists():
        return set()
    if not file.is_file():
        raise ArmError(f"--output {file} is not a file. Choose another.")
    whole, _, rest = file.read_bytes().rpartition(b"\n")
    try:
        ids = {json.loads(line)["id"] for line in whole.splitlines()}
        if rest and not rest.startswith(b'{"id": '):
            raise ValueError("its last line is not an answer")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArmError(f"--output {file} exists and is not a file of answers. Choose another.") from error
    if rest:
        print(
            f"{file}: the last line was cut off. It was removed, and its request is answered again.", file=sys.stderr
        )
        os.truncate(file, len(whole) + 1 if whole else 0)
    return ids
