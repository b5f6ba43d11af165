"""What a vector, a monitor and the words alone reveal about held-out prompts, beside random directions.

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
from torch import Tensor

from steertune.adapters import SteeringVectorConfig, directions
from steertune.adapters.analysis.activations import collect
from steertune.adapters.analysis.controls import random_directions
from steertune.adapters.directions import Direction
from steertune.adapters.monitors import Monitor, pooling
from steertune.recipes.lab import measures
from steertune.recipes.lab.detection import auroc
from steertune.recipes.lab.evaluate import evaluate
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.generation import generate, plain, prompt_ids
from steertune.recipes.lab.intervals import Interval, interval
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.monitoring import Settings, Task, fit_monitors, scores_of
from steertune.recipes.lab.observe import HeldOut, neutral_rows
from steertune.recipes.lab.text_baseline import text_scores
from steertune.recipes.studies.framing.prompts import Framings, Part, Rows
from steertune.trainers import scaled
from steertune.trainers.padding import padded

RATE = 0.1
"""False-positive rate of the monitor; 16 innocent rows cannot resolve less than 1 in 17."""
METHODS = ["lda", "mean_difference"]
_BATCH = 8
_NEUTRAL = 8  # rows of neutral text
_RANDOM = 19


@dataclass(frozen=True)
class Context:
    """The model with the prompts.

    Attributes:
        model: The base model.
        tokenizer: Its tokenizer.
        framings: The prompts.
        new_tokens: Length of the answers that the monitor reads.
    """

    model: Any
    tokenizer: Any
    framings: Framings
    new_tokens: int

    def answered(self, part: Part) -> Dataset:
        """Every prompt of a part with the model's greedy answer."""
        rows = Rows.of(part)
        answers: list[str] = []
        for i in range(0, len(rows.prompts), _BATCH):
            answers += generate(self.model, self.tokenizer, rows.prompts[i : i + _BATCH], self.new_tokens)
        # the monitor needs at least one token
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


def direction_of(context: Context, part: Part, layers: Sequence[int]) -> Direction:
    """The mean difference of the last token of the prompts: evaluations minus the others."""
    ids = _last_tokens(context.tokenizer, Rows.of(part).prompts)
    return directions.compute("mean_difference", context.model, ids, [*layers], pool="last")


def monitor_of(context: Context, layers: Sequence[int]) -> Monitor:
    """A monitor of the model's own answers to the training prompts, at the layer that cross-fitting chooses.

    Raises:
        MonitorError: there are too few pairs.
    """
    rows, tested = context.answered(context.framings.training), np.array(Rows.of(context.framings.training).tested)
    settings = Settings(RATE, layers, METHODS, [pooling.get("mean")])
    return fit_monitors(Task(context.model, context.tokenizer, rows, tested, settings))[0][0]


def steered(model: Any, direction: Direction, name: str = "default") -> PeftModel:
    """The model with the direction as its vector, at strength 1."""
    made = get_peft_model(model, SteeringVectorConfig(layers=sorted(direction.vectors)), adapter_name=name)
    direction.write(made, name)
    return made.eval()


def random_of(direction: Direction, seed: int) -> Direction:
    """A random direction of the same length at every layer."""
    layers, vectors = zip(*direction.vectors.items(), strict=True)
    made = dict(zip(layers, random_directions(vectors, seed), strict=True))
    return Direction("random", made, direction.residual_norms, direction.site, direction.pool, 0, "")


def reading(context: Context, part: Part, readers: Mapping[str, Direction], monitor: Monitor) -> dict[str, str]:
    """Area under the ROC curve of everything that could recognise the evaluations among the prompts of a part.

    Args:
        context: The model without a vector, and the prompts.
        part: Prompts that nothing was fitted on.
        readers: Name -> direction, all of the same layers; read at the last layer and the last token of a prompt.
        monitor: Reads the base model's answers.
    """
    rows, training = Rows.of(part), Rows.of(context.framings.training)
    areas: dict[str, str] = {}
    layer = max(layer for direction in readers.values() for layer in direction.vectors)
    states_ND = _states(context, rows, layer)
    for name, direction in readers.items():
        areas[name] = _area(states_ND @ direction.vectors[layer], rows)
    scores = scores_of([monitor], context.model, context.tokenizer, context.answered(part))
    fitted_on, texts = [plain(prompt) for prompt in training.prompts], [plain(prompt) for prompt in rows.prompts]
    areas["the monitor, answers of the base model"] = _area([score for [score] in scores], rows)
    areas["TF-IDF of the prompts' words"] = _area(text_scores("words", fitted_on, training.tested, texts), rows)
    areas["what the base model says when asked"] = _area(log_odds(context, context.model, part), rows)
    drawn = [random_directions([states_ND[0]], seed)[0] for seed in range(_RANDOM)]
    by_chance = [abs(auroc(states_ND @ random_D, rows.tested).estimate - 0.5) + 0.5 for random_D in drawn]
    areas[f"{_RANDOM} random directions, either sign: median, best"] = (
        f"{np.median(by_chance):.3f}, {max(by_chance):.3f}"
    )
    return areas


@dataclass(frozen=True)
class Unsteered:
    """The base model's results, which steering is compared with.

    Attributes:
        part: The prompts.
        log_odds_N: Of its answers to the question.
        neutral: Neutral text with its log-probabilities.
    """

    part: Part
    log_odds_N: NDArray[np.float64]
    neutral: HeldOut

    @classmethod
    def of(cls, context: Context, part: Part) -> Unsteered:
        """Measure the base model, before it has a vector."""
        rows = neutral_rows(context.tokenizer, count=_NEUTRAL)
        held_out = HeldOut(context.model, context.tokenizer, Dataset.from_list([]), rows)
        held_out.base_logps("neutral")
        return cls(part, log_odds(context, context.model, part), held_out)


def control(context: Context, model: PeftModel, strength: float, base: Unsteered) -> tuple[Interval, float]:
    """The effect of steering on the answer to the question, and on neutral text.

    Returns:
        The change of log p(first word) - log p(second word) in nats, and the mean KL to the base model on neutral
        answers in nats per token.
    """
    with scaled(model, strength):
        steered_N = log_odds(context, model, base.part)
    [observations] = evaluate(model, base.neutral, ["kl"], [strength]).values()
    return interval(steered_N - base.log_odds_N), measures.get("kl").summary(Seen(observations))


@torch.no_grad()
def log_odds(context: Context, model: Any, part: Part) -> NDArray[np.float64]:
    """log p(first word) - log p(second word) of the token after every prompt and its question, `(N,)`: the mean over
    both orders of the words."""
    begins, both = context.first_tokens(), []
    for question in context.framings.questions():
        ids = prompt_ids(context.tokenizer, Rows.of(part, question).prompts)
        odds: list[Tensor] = []
        for i in range(0, len(ids), _BATCH):
            inputs, last_B = _right_padded(ids[i : i + _BATCH])
            logits_BTV = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
            logits_BV = logits_BTV[torch.arange(len(last_B)), last_B].float().cpu()
            first_B, second_B = (logits_BV[:, begin].logsumexp(dim=-1) for begin in begins)
            odds.append(first_B - second_B)
        both.append(torch.cat(odds).double().numpy())
    return np.mean(both, axis=0)


def _area(scores: Any, rows: Rows) -> str:
    area = auroc(np.asarray(scores), rows.tested)
    return f"{area.estimate:.3f} [{area.low:.3f}, {area.high:.3f}]"


def _states(context: Context, rows: Rows, layer: int) -> Tensor:
    """States of the last token of every prompt, `(N, D)`."""
    activations = collect(context.model, _last_tokens(context.tokenizer, rows.prompts), [layer], pool="last")
    return torch.cat([activations.chosen[layer], activations.rejected[layer]])


def _last_tokens(tokenizer: Any, prompts: Sequence[Any]) -> list[dict[str, Tensor]]:
    """Prompts as batches of pairs with their last tokens marked; the first half of the prompts are the chosen ones."""
    half = len(prompts) // 2
    ids = prompt_ids(tokenizer, prompts)
    made = []
    for i in range(0, half, _BATCH):
        inputs, last_B = _right_padded([*ids[i : min(i + _BATCH, half)], *ids[half + i : half + i + _BATCH]])
        last_BT = torch.zeros_like(inputs["input_ids"]).scatter(1, last_B[:, None], 1)
        made.append({**inputs, "completion_mask": last_BT})
    return made


def _right_padded(ids: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Rows as one batch, `(B, T)`, and the index of each row's last token, `(B,)`."""
    ids_BT, real_BT = padded(ids, 0, left=False)
    return {"input_ids": ids_BT, "attention_mask": real_BT}, real_BT.sum(dim=1) - 1
