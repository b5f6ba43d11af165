"""Score transcripts with a saved monitor: flagged answers, their tokens, and the drift of scores.

    steertune watch runs/monitor-caught/monitor traffic.jsonl
    steertune watch my-monitor traffic.jsonl --adapter my-vector --strength 1.5    # read the steered model
    steertune watch my-monitor today.jsonl --against last_week.jsonl --output scores.jsonl --each-token

A transcript has a prompt and an answer, as in `steertune monitor`. The base model and tokenizer must be those that the
monitor was made for. With `--output`, every row becomes a line of JSON: its number, score,
probability (at the share of bad rows that the monitor was fitted on), whether it is flagged, and with `--each-token`
the score of every token that was read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from steertune.adapters import monitors
from steertune.adapters.monitors import Monitor, token_scores
from steertune.recipes.lab.adapted import adapted, base_table
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model, model_has_template
from steertune.recipes.lab.detection import Drift, drift, share
from steertune.recipes.lab.files import ArmError, write_whole
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.generation import check_context, check_strength
from steertune.recipes.lab.monitoring import read_batches
from steertune.recipes.lab.options import Argument, Base, ColumnNames, Device, DType, Option, Threads, columns_of
from steertune.recipes.lab.processes import begin, device_of
from steertune.recipes.lab.progress import progress, track
from steertune.recipes.lab.similarity import text_of
from steertune.recipes.lab.transcripts import Transcripts, read_transcripts
from steertune.trainers import scalable, scaled

_LISTED = 10
_LONGEST = 100  # characters of a listed answer


@command
def main(
    folder: Annotated[Path, Argument(help="folder of a monitor")],
    rows: Annotated[str, Argument(help="transcripts to score: a file or a name")],
    against: Annotated[str | None, Option(help="an earlier sample of traffic, for the drift of scores")] = None,
    adapter: Annotated[Path | None, Option(help="an adapter to run the model with")] = None,
    strength: Annotated[float, Option(help="strength of the adapter")] = 1.0,
    output: Annotated[Path | None, Option(help="file for JSON lines, one for each row")] = None,
    each_token: Annotated[bool, Option("--each-token", help="also write the score of every token")] = False,
    columns: ColumnNames = None,
    model: Base = None,
    dtype: DType = "float32",
    device: Device = None,
    threads: Threads = None,
) -> Result:
    """Score the rows and list those with the highest scores."""
    begin(threads, only_one=True)
    where = device_of(device)
    if output is not None and not output.absolute().parent.is_dir():
        raise ArmError(f"--output {output}: there is no folder {output.parent}. Create it, or choose another file.")
    if each_token and output is None:
        raise ArmError("--each-token writes to a file: add --output FILE.")
    saved = monitors.read(folder)
    threshold = saved.threshold
    if threshold is None:
        raise ArmError(f"{folder} has no threshold, so it flags nothing. Fit a monitor with `steertune monitor`.")
    table = base_table(saved.base_name, model, dtype)
    chat = partial(model_has_template, table)
    now = read_transcripts(rows, "any", chat, columns_of(columns))
    before = read_transcripts(against, "any", chat, columns_of(columns)) if against else None
    loaded: Any
    with progress("Scores"):
        loaded, tokenizer = load_model(table)
        monitor = monitors.load(folder, loaded, tokenizer)
        loaded = adapted(loaded, adapter).to(where)
        if strength != 1 and not scalable(loaded):
            raise ArmError(f"--strength {strength:g} needs a vector or a LoRA. Give one with --adapter.")
        check_strength(loaded, strength)
        with scaled(loaded, strength):
            scored = _score(monitor, loaded, tokenizer, now)
            earlier = [] if before is None else _score(monitor, loaded, tokenizer, before)
    moved = None
    if before is not None:
        moved = drift([row["score"] for row in earlier], [row["score"] for row in scored], threshold.value)
    if output is not None:
        shown = scored if each_token else [{k: v for k, v in row.items() if k != "tokens"} for row in scored]
        write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown))
    return _result(monitor, scored, now, moved)


def _score(monitor: Monitor, model: Any, tokenizer: Any, transcripts: Transcripts) -> list[dict[str, Any]]:
    """One record for every row."""
    rows = readable(transcripts.rows, tokenizer)
    check_context(model, tokenizer, rows, 0, "The rows to score", "Shorten or remove such rows.")
    batches = read_batches(tokenizer, rows)
    ids = [row for batch in batches for row in read_ids(batch, monitor)]
    records = []
    for i, [scores_T] in enumerate(token_scores([monitor], model, track(batches, "batch"))):
        score = monitor.pool(scores_T)
        chance = None if monitor.calibration is None else monitor.calibration(score)
        words = [tokenizer.decode([token]) for token in ids[i]]
        tokens = [[word, round(value, 4)] for word, value in zip(words, scores_T.tolist(), strict=True)]
        records.append(
            {"row": i, "score": score, "probability": chance, "flagged": monitor.flags(score), "tokens": tokens}
        )
    return records


def _result(monitor: Monitor, scored: list[dict[str, Any]], rows: Transcripts, moved: Drift | None) -> Result:
    assert monitor.threshold is not None
    flagged = share([row["flagged"] for row in scored])
    count = sum(row["flagged"] for row in scored)
    data: dict[str, Any] = {
        "rows": len(scored),
        "flagged": count,
        "share": asdict(flagged),
        "threshold": asdict(monitor.threshold),
        "scores": [row["score"] for row in scored],
    }
    lines = [
        f"{count} of {len(scored)} answers are flagged ({flagged.estimate:.1%}, 95 % interval {flagged.low:.1%} to "
        f"{flagged.high:.1%}); of innocent ones {monitor.threshold.false_positive_rate:g} at most would be."
    ]
    if moved is not None:
        data["drift"] = asdict(moved)
        lines.append(
            f"Against the earlier sample the mean score moved by {moved.shift:+.2f} standard deviations; largest gap "
            f"of the distributions {moved.distance:.3f} (p = {moved.p:.2g})."
        )
    highest = sorted(scored, key=lambda row: -row["score"])[:_LISTED]
    lines += ["", "Highest scores:"] + [_line(row, rows) for row in highest]
    return Result(data, "\n".join(lines))


def _line(record: dict[str, Any], rows: Transcripts) -> str:
    answer = " ".join(text_of(rows.rows[record["row"]]["completion"]).split())
    top = sorted(record["tokens"], key=lambda token: -token[1])[:3]
    words = ", ".join(f"{word!r} {score:+.1f}" for word, score in top)
    mark = "flagged" if record["flagged"] else "       "
    return f"  {record['score']:+7.2f} {mark} {rows.place(record['row'])}: {answer[:_LONGEST]!r} (tokens {words})"


def read_ids(batch: dict[str, Any], monitor: Monitor) -> Sequence[list[int]]:
    """The ids of the tokens that a monitor reads, for every row of a batch."""
    mask_BT = monitors.read_mask(batch, monitor.tokens)
    return [ids_T[mask_T].tolist() for ids_T, mask_T in zip(batch["input_ids"].cpu(), mask_BT, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
