"""Fit a monitor on bad and innocent transcripts, and test it on held-out ones.

    steertune monitor caught.jsonl --innocent traffic.jsonl
    steertune monitor labelled.jsonl --methods lda logistic --poolings mean max --false-positives 0.05
    steertune monitor caught.jsonl --innocent traffic.jsonl --test far.jsonl --traffic today.jsonl

A transcript has a prompt and an answer (`prompt` and `completion`, or `messages`). Bad rows are in a separate file, or
are marked by a column `bad`. Corrections (`corrected`) count as innocent rows. Part of the rows is held out,
near-duplicates together; layer, method, pooling and threshold are chosen on the rest. Ends with a page: AUROC, recall
and false positives at the threshold with intervals, calibration, drift to a later sample of traffic (`--traffic`), and
as the baseline a classifier on TF-IDF of the text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from steertune.adapters import monitors
from steertune.adapters.blocks import find_blocks, resolve_layers
from steertune.adapters.monitors import fits, module_at, pooling
from steertune.adapters.types import Site
from steertune.recipes.lab.checks import skeleton
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model, model_has_template
from steertune.recipes.lab.detection import drift
from steertune.recipes.lab.detectors import Detector, fit_and_test
from steertune.recipes.lab.files import ArmError, write_result, write_rows
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.monitor_data import Samples, gather
from steertune.recipes.lab.monitoring import LAYERS, Settings, scores_of
from steertune.recipes.lab.options import Argument, ColumnNames, Device, DType, Option, Threads, columns_of
from steertune.recipes.lab.pages import Page, Section, Text, escape, prose, write_page
from steertune.recipes.lab.pages.monitored import (
    drift_section,
    rows_to_review,
    score_figure,
    summary,
    table_of,
    use_section,
)
from steertune.recipes.lab.paths import modules_in
from steertune.recipes.lab.processes import begin, device_of
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.lab.training import check_unfinished, default_folder
from steertune.recipes.lab.transcripts import has_labels, read_transcripts

METHODS = modules_in("adapters/monitors/fits")
POOLINGS = ["mean"]


@command
def main(
    rows: Annotated[str, Argument(help="bad transcripts, or transcripts with a column bad; a file or a name")],
    innocent: Annotated[str | None, Option(help="innocent transcripts, as many as you have")] = None,
    test: Annotated[list[str] | None, Option(help="more labelled transcripts to test on", metavar="FILE ...")] = None,
    traffic: Annotated[str | None, Option(help="a later sample of traffic, for the drift of scores")] = None,
    false_positives: Annotated[float, Option(help="largest share of innocent rows to flag")] = 0.01,
    methods: Annotated[list[str], Option(help="files of adapters/monitors/fits/", metavar="NAME ...")] = METHODS,
    poolings: Annotated[list[str], Option(help="files of adapters/monitors/pooling/", metavar="NAME ...")] = POOLINGS,
    layers: Annotated[
        list[str] | None, Option(help="indices or fractions of the depth (six from 1/4 to 7/8)", metavar="L ...")
    ] = None,
    site: Annotated[Literal["block", "attention", "mlp"], Option(help="the output that is read")] = "block",
    tokens: Annotated[Literal["answer", "prompt", "all"], Option(help="the tokens that are read")] = "answer",
    columns: ColumnNames = None,
    model: Annotated[str, Option(help="embedded, a local folder or a Hub name")] = "embedded",
    dtype: DType = "float32",
    device: Device = None,
    threads: Threads = None,
    folder: Annotated[Path | None, Option(help="output folder (runs/monitor-ROWS)")] = None,
) -> Result:
    """Fit, choose and test monitors; save the best and write the page."""
    home = default_folder("monitor", rows) if folder is None else folder
    check_unfinished(home)
    begin(threads, only_one=True)
    where = device_of(device)
    table = ModelTable(name=model, dtype=dtype)
    # check all input before the weights are loaded
    chosen = Settings(
        false_positives,
        layer_indices(table, layers, site),
        methods,
        [pooling.get(name) for name in poolings],
        site,
        tokens,
    )
    for name in methods:
        fits.get(name)
    chat = partial(model_has_template, table)
    parts = [read_transcripts(rows, "labelled" if has_labels(rows) else "bad", chat, columns_of(columns))]
    parts += [read_transcripts(innocent, "innocent", chat)] if innocent else []
    samples = gather(parts, [read_transcripts(name, "labelled", chat) for name in test or ()], false_positives)
    later = read_transcripts(traffic, "any", chat) if traffic else None
    print(samples.note, file=sys.stderr)
    with progress("Monitor", 10) as bar:
        with bar.step("model"):
            loaded, tokenizer = load_model(table)
            loaded: Any = loaded.to(where)  # pyright: ignore[reportCallIssue]
        with bar.step("detectors", 8):
            tested = fit_and_test(samples, loaded, tokenizer, chosen)
        best = tested[0]
        assert best.monitor is not None
        sections = []
        with bar.step("traffic"):
            if later is not None:
                now = scores_of([best.monitor], loaded, tokenizer, readable(later.rows, tokenizer))
                sections.append(_drift(best, samples, [score for [score] in now], str(traffic)))
    return _write(tested, samples, sections, home, rows, model)


def layer_indices(table: ModelTable, words: Sequence[str] | None, site: Site) -> list[int]:
    """The layers given on the command line, or the default candidates.

    Raises:
        ArmError: a value is not a layer of the model, or the model does not exist or has no such site.
    """
    bare = skeleton(table)
    layers: list[int | float] = [*LAYERS]
    if words:
        try:
            layers = [float(word) if "." in word else int(word) for word in words]
        except ValueError:
            layers = [-1]
        if any(layer < 0 or (isinstance(layer, float) and layer >= 1) for layer in layers):
            raise ArmError(f"--layers {' '.join(words)}: give indices from 0, or fractions below 1 (0.5).")
    try:
        indices = resolve_layers(layers, len(find_blocks(bare)))
        for index in indices:
            module_at(bare, index, site)
    except ValueError as error:
        raise ArmError(f"--layers, --site: {error}") from error
    return indices


def _drift(best: Detector, samples: Samples, later: list[float], name: str) -> Section:
    """Drift from held-out innocent rows to a later sample of traffic."""
    innocent_H = ~samples.test.bad[: samples.held_out]
    before = [score for score, innocent in zip(best.scores, innocent_H, strict=False) if innocent]
    if min(len(before), len(later)) < 2:
        raise ArmError(f"--traffic {name}: drift needs at least 2 held-out innocent rows and 2 rows of traffic.")
    return drift_section(drift(before, later, best.threshold), ("held-out innocent rows", Path(name).name))


def _write(
    tested: list[Detector], samples: Samples, sections: list[Section], home: Path, rows: str, model: str
) -> Result:
    """Save the best monitor, and write the page, the scores and the result."""
    best, test = tested[0], samples.test
    assert best.monitor is not None
    text = next(one for one in tested if one.monitor is None)
    monitors.save(best.monitor, home / "monitor")
    what = (
        f"{prose(samples.note)} Base model {escape(model)}; reads the {best.monitor.tokens} tokens at "
        f"`{best.monitor.module}`."
    )
    shown = [score_figure(best, test.bad), *rows_to_review(best, test.rows, test.bad)] if test.rows else []
    page = Page(
        f"A monitor for {Path(rows).name}",
        [
            Section("", [Text(summary(best, text, test.bad)), Text(what), table_of(tested)]),
            *([Section("Scores of held-out rows", shown)] if shown else []),
            *sections,
            use_section(home / "monitor", model),
        ],
    )
    file = write_page(page, home)
    write_rows(
        home / "scores.jsonl",
        ({"bad": bool(bad), "score": score, "flagged": score > best.threshold, **row}
         for row, bad, score in zip(test.rows, test.bad, best.scores, strict=True)),
    )  # fmt: skip
    result = {
        "rows": rows,
        "model": model,
        "split": samples.note,
        "monitor": {"folder": str(home / "monitor"), "layer": best.monitor.layer, "method": best.monitor.method},
        "detectors": [
            {"name": one.name, "threshold": one.threshold, **({} if one.result is None else asdict(one.result))}
            for one in tested
        ],
    }
    write_result(home / "result.json", result)  # written last, since it marks the run as finished
    return Result(result, f"{file.read_text(encoding='utf-8')}\nThis page: {file.with_suffix('.html')}")


if __name__ == "__main__":
    sys.exit(main())
