"""Evaluation awareness from 16 prompt pairs: a vector, a monitor and controls, for evaluations with Inspect.

    steertune awareness --folder runs/awareness
    inspect eval recipes/studies/framing/inspect_task.py --model steertune/base+tested -M strength=-4 \\
        -M vectors=tested=runs/awareness/tested -M monitors=tested=runs/awareness/monitor

A pair is one request as part of an evaluation and from a user. The vector is the mean difference of the last token;
the monitor reads the base model's answers, below the vector. Both are measured on other requests in other words, once
as the two kinds usually sound and once with their tones exchanged, beside random directions of the same length and
the words alone. The prompts are in `framing/prompts.toml`; `--prompts` takes your own file with the same tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from datasets import Dataset

from steertune.adapters import monitors
from steertune.adapters.description import write_description
from steertune.adapters.directions import Direction
from steertune.adapters.saved import write_checksums
from steertune.recipes.lab import trained_on
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import write_result, write_whole
from steertune.recipes.lab.options import Count, Option, Threads
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import Bar, progress
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.lab.trained_on import TrainedOn
from steertune.recipes.lab.training import check_unfinished
from steertune.recipes.monitor import layer_indices
from steertune.recipes.studies.framing.measure import (
    Context,
    Unsteered,
    control,
    direction_of,
    monitor_of,
    random_of,
    reading,
    steered,
)
from steertune.recipes.studies.framing.prompts import FILE, Rows, read_framings

PARTS = ("held_out", "crossed")
LAYERS = ["0.5"]
BELOW = ["0.3", "0.4"]
STRENGTHS = [-4.0, 4.0]


@command
def main(
    prompts: Annotated[Path, Option(help="a file of framings")] = FILE,
    layers: Annotated[list[str], Option(help="of the vector: indices or fractions", metavar="L ...")] = LAYERS,
    monitor_layers: Annotated[list[str], Option(help="candidates for the monitor's layer", metavar="L ...")] = BELOW,
    strengths: Annotated[list[float], Option(help="of the vector and its controls", metavar="S ...")] = STRENGTHS,
    controls: Annotated[int, Count("random directions to steer with")] = 3,
    new_tokens: Annotated[int, Count("of the answers that the monitor reads")] = 12,
    model: Annotated[str, Option(help="embedded, a local folder or a Hub name")] = "embedded",
    threads: Threads = None,
    folder: Annotated[Path, Option(help="where vectors, monitor and table are written")] = Path("runs/awareness"),
) -> Result:
    """Make the vector, random ones and the monitor, and measure them on held-out prompts."""
    framings = read_framings(prompts)
    check_unfinished(folder)
    begin(threads, only_one=True)
    table = ModelTable(name=model)
    places, candidates = (layer_indices(table, given, "block") for given in (layers, monitor_layers))
    with progress("Evaluation awareness", 10) as bar:
        with bar.step("model"):
            context = Context(*load_model(table), framings, new_tokens)
            context.first_tokens()
        with bar.step("vector"):
            vector = direction_of(context, framings.training, places)
            naive = direction_of(context, framings.naive_training, places)
        with bar.step("monitor", 2):
            monitor = monitor_of(context, candidates)
            monitors.save(monitor, folder / "monitor")
        with bar.step("reading", 2):
            readers = {"direction of the naive pairs": naive, "direction of the balanced pairs (the vector)": vector}
            areas = {part: reading(context, getattr(framings, part), readers, monitor) for part in PARTS}
        with bar.step("control", 4):
            vectors = {"tested": vector} | {f"random_{i}": random_of(vector, i) for i in range(controls)}
            changes = _steer(context, vectors, strengths, folder)
    result = {
        "pairs": len(framings.training.requests),
        "words": framings.words,
        "layers": places,
        "length": vector.norms,
        "monitor": {"layer": monitor.layer, "method": monitor.method},
        "reading": areas,
        "control": changes,
    }
    page = _page(result, strengths)
    write_whole(folder / "table.md", page)
    write_result(folder / "result.json", result)  # written last, since it marks the run as finished
    return Result(result, page)


def _steer(context: Context, vectors: dict[str, Direction], strengths: Sequence[float], folder: Path) -> list[Any]:
    """Save every vector as an adapter, and measure its effect: one record per vector and strength."""
    rows, records = Rows.of(context.framings.training), []
    trained = Dataset.from_list([{"prompt": prompt} for prompt in rows.prompts])
    base, bar = Unsteered.of(context, context.framings.held_out), Bar(len(vectors))
    for name, direction in vectors.items():
        with bar.step(name):
            model = steered(context.model, direction)
            model.save_pretrained(str(folder / name))
            trained_on.write(folder / name, [TrainedOn.of(trained, "prompt")])
            write_description(folder / name)
            write_checksums(folder / name)
            for strength in strengths:
                shift, kl = control(context, model, strength, base)
                records.append({"vector": name, "strength": strength, "shift": shift.estimate,
                                "low": shift.low, "high": shift.high, "kl": kl})  # fmt: skip
            model.unload()
    return records


def _page(result: dict[str, Any], strengths: Sequence[float]) -> str:
    """Both tables as Markdown."""
    monitor, areas = result["monitor"], result["reading"]
    lines = [
        f"# Evaluation awareness from {result['pairs']} prompt pairs",
        "",
        f"Vector at layer {', '.join(map(str, result['layers']))}, monitor ({monitor['method']}) at layer "
        f"{monitor['layer']}. Area under the ROC curve for telling evaluations from other prompts; 0.5 is chance, "
        "and below it most are taken for the other kind:",
        "",
        "| what tells them apart | held-out prompts | tones exchanged |",
        "|---|---|---|",
        *(f"| {name} | {' | '.join(areas[part][name] for part in PARTS)} |" for name in areas[PARTS[0]]),
        "",
        "Change of log p({}) - log p({}) when the model is asked about held-out prompts, in nats, and what it costs "
        "on neutral text:".format(*result["words"]),
        "",
        "| vector | strength | change | KL, nats per token |",
        "|---|---|---|---|",
    ]
    for strength in strengths:
        for one in (record for record in result["control"] if record["strength"] == strength):
            change = f"{one['shift']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
            lines.append(f"| `{one['vector']}` | {strength:g} | {change} | {one['kl']:.3f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
