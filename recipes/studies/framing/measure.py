"""What a vector, a monitor and the text alone tell of prompts that they were not made from, beside random directions.

Shapes: B rows of a batch, T tokens, N rows, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model
from sklearn.metrics import roc_auc_score
from torch import Tensor

from steertune.adapters import SteeringVectorConfig, directions
from steertune.adapters.analysis.activations import collect
from steertune.adapters.analysis.controls import random_directions
from steertune.adapters.directions import Direction
from steertune.adapters.monitors import Monitor, pooling
from steertune.recipes.lab.detection import auroc
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.generation import generate, plain, prompt_ids
from steertune.recipes.lab.intervals import Interval, interval
from steertune.recipes.lab.monitoring import Settings, Task, fit_monitors, scores_of
from steertune.recipes.lab.observe import HeldOut, neutral, neutral_rows
from steertune.recipes.lab.text_baseline import text_scores
from steertune.recipes.studies.framing.prompts import Framings, Part, Rows
from steertune.trainers import scaled

RATE = 0.1
"""False-positive rate of the monitor; 16 innocent rows resolve no less than 1 in 17."""
METHODS = ["lda", "mean_difference"]
_BATCH = 8
_NEUTRAL = 8  # rows of neutral text
_RANDOM = 19


@dataclass(frozen=True)
class Bench:
    """The model with the prompts.

    Attributes:
        model: The base model.
        tokenizer: Its tokenizer.
        framings: The prompts.
        new_tokens: Of the answers that the monitor reads.
    """

    model: Any
    tokenizer: Any
    framings: Framings
    new_tokens: int

    def answered(self, part: Part) -> Dataset:
        """Every prompt of a part with what the model answers greedily."""
        rows = Rows.of(part)
        answers: list[str] = []
        for i in range(0, len(rows.prompts), _BATCH):
            answers += generate(self.model, self.tokenizer, rows.prompts[i : i + _BATCH], self.new_tokens)
        # an answer without a token could not be read
        return readable(Dataset.from_list(rows.with_answers([answer or "." for answer in answers])), self.tokenizer)

    def first_tokens(self) -> list[list[int]]:
        """The tokens that each of the two words can begin with, capitalised or not.

        Raises:
            ArmError: the tokenizer does not know one of them, or both begin with the same token.
        """
        first, second = (
            {self.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in (word, word.capitalize())}
            - {self.tokenizer.unk_token_id}
            for word in self.framings.words
        )
        if first & second or not first or not second:
            raise ArmError(f"words={self.framings.words} do not begin with two different tokens. Choose two others.")
        return [sorted(first), sorted(second)]


def direction_of(bench: Bench, part: Part, layers: Sequence[int]) -> Direction:
    """The mean difference of the last token of the prompts: evaluations minus the others."""
    ids = _last_tokens(bench.tokenizer, Rows.of(part).prompts)
    return directions.compute("mean_difference", bench.model, ids, [*layers], pool="last")


def monitor_of(bench: Bench, layers: Sequence[int]) -> Monitor:
    """A monitor of what the model itself answers to the training prompts, at the layer that cross-fitting chooses.

    Raises:
        MonitorError: there are too few pairs.
    """
    rows, tested = bench.answered(bench.framings.training), np.array(Rows.of(bench.framings.training).tested)
    settings = Settings(RATE, layers, METHODS, [pooling.get("mean")])
    return fit_monitors(Task(bench.model, bench.tokenizer, rows, tested, settings))[0][0]


def steered(model: Any, direction: Direction, name: str = "default") -> PeftModel:
    """The model with the direction as its vector, at strength 1."""
    made = get_peft_model(model, SteeringVectorConfig(layers=sorted(direction.vectors)), adapter_name=name)
    direction.write(made, name)
    return made.eval()


def random_of(direction: Direction, seed: int) -> Direction:
    """As long a vector at every layer, in a direction that means nothing."""
    layers, vectors = zip(*direction.vectors.items(), strict=True)
    made = dict(zip(layers, random_directions(vectors, seed), strict=True))
    return Direction("random", made, direction.residual_norms, direction.site, direction.pool, 0, "")


def reading(bench: Bench, part: Part, readers: Mapping[str, Direction], monitor: Monitor) -> dict[str, str]:
    """Area under the ROC curve of everything that could tell the evaluations among the prompts of a part.

    Args:
        bench: The model, without a vector.
        part: Prompts that nothing was fitted on.
        readers: Directions of the same layers by name, read at the last layer and the last token of a prompt.
        monitor: It reads the base model's answers.
    """
    rows, training = Rows.of(part), Rows.of(bench.framings.training)
    areas: dict[str, str] = {}
    layer = max(layer for direction in readers.values() for layer in direction.vectors)
    states_ND = _states(bench, rows, layer)
    for name, direction in readers.items():
        areas[name] = _area(states_ND @ direction.vectors[layer], rows)
    scores = scores_of([monitor], bench.model, bench.tokenizer, bench.answered(part))
    fitted_on, texts = [plain(prompt) for prompt in training.prompts], [plain(prompt) for prompt in rows.prompts]
    areas["the monitor, answers of the base model"] = _area([score for [score] in scores], rows)
    areas["TF-IDF of the prompts' words"] = _area(text_scores("words", fitted_on, training.tested, texts), rows)
    areas["what the base model says when asked"] = _area(log_odds(bench, bench.model, part), rows)
    drawn = [random_directions([states_ND[0]], seed)[0] for seed in range(_RANDOM)]
    by_chance = [abs(roc_auc_score(rows.tested, states_ND @ random_D) - 0.5) + 0.5 for random_D in drawn]
    areas[f"{_RANDOM} random directions, either sign: median, best"] = (
        f"{np.median(by_chance):.3f}, {max(by_chance):.3f}"
    )
    return areas


@dataclass(frozen=True)
class Unsteered:
    """What the base model does, which steering is compared with.

    Attributes:
        part: The prompts.
        log_odds_N: Of its answers to the question.
        neutral: Neutral text with its log-probabilities.
    """

    part: Part
    log_odds_N: NDArray[np.float64]
    neutral: HeldOut

    @classmethod
    def of(cls, bench: Bench, part: Part) -> Unsteered:
        """Measure it; the model has no vector yet."""
        rows = neutral_rows(bench.tokenizer, count=_NEUTRAL)
        held_out = HeldOut(bench.model, bench.tokenizer, Dataset.from_list([]), rows)
        held_out.base_logps("neutral")
        return cls(part, log_odds(bench, bench.model, part), held_out)


def control(bench: Bench, model: PeftModel, strength: float, base: Unsteered) -> tuple[Interval, float]:
    """What steering changes about the answer to the question, and about neutral text.

    Returns:
        The change of log p(first word) - log p(second word) in nats, and the mean KL to the base model on neutral
        answers in nats a token.
    """
    with scaled(model, strength):
        steered_N = log_odds(bench, model, base.part)
    seen = neutral(model, base.neutral, {"": strength})[""]
    return interval(steered_N - base.log_odds_N), sum(seen["neutral_kl"]) / sum(seen["neutral_tokens"])


@torch.no_grad()
def log_odds(bench: Bench, model: Any, part: Part) -> NDArray[np.float64]:
    """log p(first word) - log p(second word) of the next token behind every prompt with its question, `(N,)`: the mean
    over both orders of the words."""
    both = []
    for question in bench.framings.questions():
        ids = prompt_ids(bench.tokenizer, Rows.of(part, question).prompts)
        odds: list[Tensor] = []
        for i in range(0, len(ids), _BATCH):
            inputs, last_B = _right_padded(ids[i : i + _BATCH])
            logits_BTV = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
            logits_BV = logits_BTV[torch.arange(len(last_B)), last_B].float().cpu()
            first_B, second_B = (logits_BV[:, begin].logsumexp(dim=-1) for begin in bench.first_tokens())
            odds.append(first_B - second_B)
        both.append(torch.cat(odds).double().numpy())
    return np.mean(both, axis=0)


def _area(scores: Any, rows: Rows) -> str:
    area = auroc(np.asarray(scores), rows.tested)
    return f"{area.estimate:.3f} [{area.low:.3f}, {area.high:.3f}]"


def _states(bench: Bench, rows: Rows, layer: int) -> Tensor:
    """States of the last token of every prompt, `(N, D)`."""
    activations = collect(bench.model, _last_tokens(bench.tokenizer, rows.prompts), [layer], pool="last")
    return torch.cat([activations.chosen[layer], activations.rejected[layer]])


def _last_tokens(tokenizer: Any, prompts: Sequence[Any]) -> list[dict[str, Tensor]]:
    """Prompts as batches of pairs, whose last tokens are marked; the first half of the prompts are the chosen ones."""
    half = len(prompts) // 2
    ids = prompt_ids(tokenizer, prompts)
    made = []
    for i in range(0, half, _BATCH):
        inputs, last_B = _right_padded([*ids[i : min(i + _BATCH, half)], *ids[half + i : half + i + _BATCH]])
        last_BT = torch.zeros_like(inputs["input_ids"]).scatter(1, last_B[:, None], 1)
        made.append({**inputs, "completion_mask": last_BT})
    return made


def _right_padded(ids: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Rows as one batch, `(B, T)`, and the place of the last token of each, `(B,)`."""
    width = max(map(len, ids))
    real_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    ids_BT = torch.tensor([[*row] + [0] * (width - len(row)) for row in ids])
    return {"input_ids": ids_BT, "attention_mask": real_BT}, real_BT.sum(dim=1) - 1
