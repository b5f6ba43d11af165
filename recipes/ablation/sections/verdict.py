"""The first screen: the question, the answer, the chart that shows it, what it costs, and how the tasks differ."""

from __future__ import annotations

from steertune.recipes.ablation import charts, claims
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.looks import in_words
from steertune.recipes.ablation.sections import OTHER_ROWS, ROWS, emphasised, numbers, section
from steertune.recipes.lab.pages import Block, Figure, Section, Text, prose, table_of

SIDES = {"for": "for", "against": "against", "undecided": "neither for nor against"}


@section(place=0)
def verdict(findings: Findings) -> Section:
    """The answer to the claim."""
    lines = [Text("  \n".join(emphasised(sentence, findings) for sentence in findings.answer))]
    blocks = [*_question(findings), *lines, *_tasks(findings), *_cost(findings), _extent(findings)]
    title = f"The result counts {SIDES[findings.verdict.side]} the hypothesis"
    return Section(title if findings.claimed else f"A look at another measure: {findings.claim.label}", blocks)


def _question(findings: Findings) -> list[Block]:
    card, claim = findings.tables.card, findings.tables.claim
    assert card is not None and claim is not None  # a grid without them is refused when it is read
    blocks: list[Block] = [Text(f"**{prose(card.problem)}** Hypothesis: {prose(card.hypothesis)}")]
    if looks := in_words(findings.grid, claim.alpha):
        blocks.append(Text(looks))
    if not findings.claimed:
        blocks.append(
            Text(
                f"The claim is about {claim.label}; what follows was not claimed before the cells were run, and "
                "counts neither for nor against the hypothesis."
            )
        )
    return blocks


def _tasks(findings: Findings) -> list[Block]:
    """How the difference of the claim varies from task to task."""
    claim, tasks = findings.claim, claims.by_task(findings.ran, findings.claim)
    if not tasks:
        return []
    ahead, line = f"{claim.better} minus {claim.than}", claim.margin
    if claim.recovers is not None:
        ahead, line = f"gain of {claim.better} minus {claim.recovers:g} of that of {claim.than}", 0.0
    intervals = {"all tasks": claims.ahead(findings.paired, claim).shown}
    intervals |= {task.name: task.ahead.crossed for task in tasks}
    drawing = charts.intervals(intervals, f"{claim.label}:\n{ahead}", line=line, largest_first=False)
    rows = []
    for task in tasks:
        estimate, _, these_tasks, these_rows, *_ = numbers(task.ahead)
        means = [f"{mean:.3f}" for mean in (task.base, task.than, task.better)]
        rows.append([task.name, *means, estimate, these_tasks, these_rows])
    compared = "difference" if claim.recovers is None else ahead
    header = ["task", claims.BASE, claim.than, claim.better, compared, OTHER_ROWS, ROWS]
    alt = f"{ahead}, over all tasks and in each"
    return [Figure(drawing, "verdict", alt), Text("**How the tasks differ.**"), table_of(header, rows, "tasks")]


def _cost(findings: Findings) -> list[Block]:
    """What the two arms of the claim cost, in a sentence."""
    parts = []
    for arm in (findings.claim.better, findings.claim.than):
        of_arm = findings.ran[findings.ran["arm"] == arm]
        if of_arm.empty or "train_seconds" not in of_arm:
            continue
        prompt = of_arm["prompt_tokens"].mean() if "prompt_tokens" in of_arm else 0
        added = f", and adds {prompt:.0f} tokens to every request" if prompt > 0 else ""
        train, tuning, memory = of_arm[["train_seconds", "tuning_seconds", "peak_memory_gb"]].mean()
        parts.append(
            f"{emphasised(arm, findings)} trains {of_arm['parameters'].mean():,.0f} numbers in {train:.1f} s "
            f"({tuning:.1f} s of tuning before, {memory:.2f} GB at the peak){added}"
        )
    return [Text(f"**What it costs.** {'; '.join(parts)}.")] if parts else []


def _extent(findings: Findings) -> Text:
    cells = findings.cells
    done = len(cells) - int((cells["status"] == "failed").sum())
    sizes = sorted(int(n) for n in cells["examples"].unique())
    means = f" Scores are means over n = {', '.join(map(str, sizes))}." if len(sizes) > 1 else ""
    taken = int((cells["taken_over"] == True).sum()) if "taken_over" in cells else 0  # noqa: E712  None: it was not
    reused = f" {taken} of them were taken from other grids, which ran before this card was written." if taken else ""
    return Text(
        f"{done} of {len(findings.grid['cells'])} cells, {_count(cells['task'].nunique(), 'task')}, "
        f"{_count(cells['seed'].nunique(), 'seed')}.{reused}{means} {prose(' '.join(findings.grid['notes']))}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
