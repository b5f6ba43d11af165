"""Observations of a model on held-out examples: one function for each kind of example, shared by all measures.

    pairs     log-probability (nats) and tokens of the chosen and of the rejected answer
    neutral   KL to the base model (summed, and its 95th percentile over the tokens), negative log-likelihood (nats,
              summed) and tokens of neutral answers
    answers   generated answers to the first test prompts, whether each was cut off, and the scorer's judgement of it
    prompted  KL of the prompted base model to the model on each of its answers (summed), and their tokens
    questions log-probabilities of the right and of wrong ends of common-knowledge sentences

Shapes: B rows of a batch, T labelled tokens of a row, N of all rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from steertune.losses import Outputs
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.files import ArmError, read_jsonl
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.generation import generate_and_look, plain
from steertune.recipes.lab.likelihood import NEUTRAL_BATCH, likelihoods, neutral_logps
from steertune.recipes.lab.paths import TASKS
from steertune.recipes.lab.progress import track
from steertune.recipes.lab.scorers import Scorer
from steertune.trainers import FrozenPrefix, ModelAt, View, context_length, scaled, tokenise
from steertune.trainers.views import Views

NEUTRAL = TASKS / "neutral.jsonl"
QUESTIONS = TASKS / "capability.jsonl"
_TAIL = 0.95
_TOKENS = 8  # few enough that their distributions stay in a processor's cache

Observations = dict[str, list[Any]]
Strengths = Mapping[str, float]
"""Label -> strength."""
Show = Callable[[Dataset], Dataset]
"""Maps rows to the rows that a model reads instead, such as the same prompts with an instruction."""


@dataclass(frozen=True)
class Prompted:
    """A prompt that a model can learn to do without.

    Attributes:
        view: Puts the prompt in front of rows.
        answers: Prompts, with the base model's answers to them when it reads the prompt first.
    """

    view: View
    answers: Dataset


@dataclass
class HeldOut:
    """The examples that models are measured on, and what these measurements share.

    Args:
        pairs: Test rows: preference pairs, or prompts alone.
        neutral: Prompts and completions unrelated to the behaviour, on which side effects are reported.
        asked: Rows whose prompts are answered instead of the test rows' prompts; None: the test rows.
        matching: Further neutral rows, on which strengths are matched; None: they are not matched.
        questions: How many of the common-knowledge sentences to use.
        instruction: An instruction that asks for the behaviour; "" if there is none.
        undo: Removes the behaviour from a text; None: no rule can.
        generations: How many of the prompts are answered, from the first.
        neutral_generations: How many of the neutral prompts are answered, from the first.
        new_tokens: Maximum length of a generated answer.
        scorer: Judges the answers; None: they are not judged.
        prompted: The prompt that is distilled, and the base model's answers with it; None: no prompt is.
        prefix: Caches what the layers below an adapter compute; None: nothing is cached.
        batch_size: Rows in one forward pass.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    pairs: Dataset
    neutral: Dataset
    generations: int = 0
    neutral_generations: int = 0
    new_tokens: int = 32
    scorer: Scorer | None = None
    prompted: Prompted | None = None
    prefix: FrozenPrefix | None = None
    batch_size: int = 8
    asked: Dataset | None = None
    matching: Dataset | None = None
    questions: int = 0
    instruction: str = ""
    undo: Callable[[str], str] | None = None
    shared: dict[str, Any] = field(default_factory=dict, repr=False)
    """Cached results of the base model."""
    neutral_logps: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)
    """Log-probabilities of neutral answers under the base model, which several `HeldOut` can share."""
    plain: HeldOut | None = None
    """The examples without the prompt, if it is in front of these."""

    def behind(self, show: Show) -> HeldOut:
        """The same examples with something else in front of every prompt."""
        asked = None if self.asked is None else show(self.asked)
        return replace(self, pairs=show(self.pairs), neutral=show(self.neutral), asked=asked, plain=self.plain or self)

    def without_answers(self) -> HeldOut:
        """The same examples, but without generated answers."""
        return replace(self, generations=0, neutral_generations=0, scorer=None)

    @cached_property
    def prompts(self) -> list[Any]:
        """The prompts to answer; empty ones are skipped."""
        return prompts_in(self.pairs if self.asked is None else self.asked)[: self.generations]

    @property
    def has_pairs(self) -> bool:
        """Whether the test rows are preference pairs."""
        return len(self.pairs) > 0 and {"chosen", "rejected"} <= set(self.pairs.column_names)

    def base_logps(self, rows: Literal["neutral", "matching"]) -> list[Tensor]:
        """Per neutral row, the base model's log-probabilities, `(T, V)`. Computed once."""
        # the base never sees the prompt that other models are measured with, so the plain rows serve all of them
        if rows not in self.neutral_logps:
            data = getattr(self if self.plain is None else self.plain, rows)
            with self.remember(self.model):
                self.neutral_logps[rows] = [logps for logps, _ in neutral_logps(self.model, self.tokenizer, data)]
        return self.neutral_logps[rows]

    @contextmanager
    def remember(self, model: Any) -> Iterator[None]:
        """Use the cached prefix for forward passes inside, if `model` shares the base's weights.

        Entering reads the weights below the adapter; nested contexts for the same model cost nothing.
        """
        # a model with weights of its own (full finetuning, a merged adapter) computes other states below the adapter
        shares_weights = model is self.model or isinstance(model, PeftModel)
        outer = self.shared.get("remembered")
        if self.prefix is None or not shares_weights or outer is model:
            yield
            return
        # only labelled tokens need logits; the head of a large vocabulary costs as much as several blocks
        with self.prefix.on(model, labels_only=True):
            self.shared["remembered"] = model
            try:
                yield
            finally:
                self.shared["remembered"] = outer

    def pack_base(self) -> AbstractContextManager[None]:
        """Skip padding in forward passes of the base model inside, and cache nothing, as rows come only once."""
        # inside `remember` of the base itself the cached prefix is in place already
        if self.prefix is None or self.shared.get("remembered") is self.model:
            return nullcontext()
        return self.prefix.on(self.model, labels_only=True, keep=False)


def behind(view: View, rows: Dataset) -> Dataset:
    """Rows with what a view puts in front of their prompts."""
    return Dataset.from_list([dict(row) for row in view(rows.to_list())])


def prompts_in(rows: Dataset) -> list[Any]:
    """The prompts of rows, without empty ones."""
    return [prompt for prompt in rows["prompt"] if prompt] if "prompt" in rows.column_names else []


@torch.no_grad()
def pairs(model: Any, held_out: HeldOut, strengths: Strengths) -> dict[str, Observations]:
    """Log-probabilities and tokens of both answers of every test pair, at every strength."""
    if not held_out.has_pairs:
        return {}
    names = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")
    observed: dict[str, Observations] = {label: {name: [] for name in names} for label in strengths}
    # a batch of B pairs has 2 B rows: the chosen answers, then the rejected ones
    for batch in batches(held_out.tokenizer, held_out.pairs, max(1, held_out.batch_size // 2)):
        # one batch at all strengths, so that what is below the adapter is computed once
        at = ModelAt(model, model, batch.to(model.device))
        for label, strength in strengths.items():
            outputs = at(strength)
            for side in ("chosen", "rejected"):
                answers = getattr(outputs, side)
                observed[label][f"{side}_logp"] += answers.logps.tolist()
                observed[label][f"{side}_tokens"] += answers.mask.sum(dim=1).tolist()
    return observed


def neutral(model: Any, held_out: HeldOut, strengths: Strengths) -> dict[str, Observations]:
    """KL to the base model and likelihood of every neutral answer, at every strength."""
    observed = {}
    for label, strength in strengths.items():
        with scaled(model, strength):
            logps = neutral_logps(model, held_out.tokenizer, held_out.neutral)
        observed[label] = against_base(logps, held_out.base_logps("neutral"))
    return observed


def answers(model: Any, held_out: HeldOut, strengths: Strengths) -> dict[str, Observations]:
    """Greedy answers to the first test prompts, their scores, and answers to the first neutral prompts."""
    prompts, asked = held_out.prompts, held_out.neutral["prompt"][: held_out.neutral_generations]
    observed: dict[str, Observations] = {label: {} for label in strengths}
    texts: dict[str, list[str]] = {}
    for label, strength in track([*strengths.items()] if prompts or asked else [], "strength"):
        # prompts of the task and neutral prompts in the same batches: fewer, larger passes
        with scaled(model, strength):
            both, cut = generate_and_look(model, held_out.tokenizer, [*prompts, *asked], held_out.new_tokens)
        texts[label] = both[: len(prompts)]
        observed[label] |= {"answer_cut": [*map(float, cut[: len(prompts)])]} if prompts else {}
        observed[label] |= {"neutral_answer": both[len(prompts) :]} if asked else {}
    if not prompts:
        return observed
    for label, of_label in texts.items():
        observed[label]["answer"] = of_label
        if held_out.scorer is not None:
            observed[label]["score"] = [*held_out.scorer.score([*map(plain, prompts)], of_label)]
    # two measures of damage that leave the behaviour out: the base asked for it, or it is removed from the answers
    if held_out.instruction:
        _add_base_likelihood(observed, held_out, texts, "instructed", f"{held_out.instruction}\n\n")
    if held_out.undo is not None:
        undone = {label: [*map(held_out.undo, answers)] for label, answers in texts.items()}
        _add_base_likelihood(observed, held_out, undone, "undone")
    return observed


def _add_base_likelihood(
    observed: dict[str, Observations],
    held_out: HeldOut,
    texts: Mapping[str, Sequence[str]],
    name: str,
    before: str = "",
) -> None:
    """Observe the negative log-likelihood of answers under the base model (nats, summed), with a text before every
    prompt."""
    prompts = [f"{before}{plain(prompt)}" for prompt in (held_out.plain or held_out).prompts]
    # answers to the same prompt are next to each other, so that their common prefix is computed once
    rows = [(prompts[i], of_label[i]) for i in range(len(prompts)) for of_label in texts.values()]
    with held_out.pack_base():
        nats_of = likelihoods(held_out.model, held_out.tokenizer, rows, NEUTRAL_BATCH)
    for label, of_label in texts.items():
        pairs = [nats_of.get(row, (None, None)) for row in zip(prompts, of_label, strict=True)]
        observed[label] |= {f"{name}_nll": [nats for nats, _ in pairs], f"{name}_tokens": [n for _, n in pairs]}


@torch.no_grad()
def questions(model: Any, held_out: HeldOut, strengths: Strengths) -> dict[str, Observations]:
    """Log-probability of the right last word of a simple sentence, among that word and three others."""
    if not held_out.questions:
        return {}
    # every choice is one word, recognised by the tokens that it can begin with
    tokenizer = held_out.tokenizer
    asked = read_jsonl(QUESTIONS)[: held_out.questions]
    rows = Dataset.from_list([{"prompt": row["beginning"], "completion": f" {row['answer']}"} for row in asked])
    choices = [[_first_tokens(tokenizer, word) for word in (row["answer"], *row["others"])] for row in asked]
    observed: dict[str, Observations] = {}
    for label, strength in strengths.items():
        # only the first token after the beginning counts
        with scaled(model, strength):
            firsts = [logps_TV[0] for logps_TV, _ in neutral_logps(model, tokenizer, rows, size=len(rows))]
        ranked = [right_among(logps_V, tokens) for logps_V, tokens in zip(firsts, choices, strict=True)]
        right, nats = zip(*ranked, strict=True)
        observed[label] = {"question_right": [*right], "question_nats": [*nats]}
    return observed


def _first_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> set[int]:
    """Tokens that a word can begin with, in any case, so that a behaviour that changes the case does not count as lost
    knowledge."""
    # in the middle of a sentence a word has a space in front, which is part of its first token
    variants = [f" {form}" for form in (word, word.lower(), word.capitalize())]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in variants]
    return {tokens[0] for tokens in ids if tokens}


def right_among(logps_V: Tensor, choices: Sequence[set[int]]) -> tuple[float | None, float | None]:
    """Whether the first of several choices is the likeliest, and its negative log-probability among them; None if the
    tokenizer does not tell them apart by their first token."""
    # two words that begin with the same token, or one without any
    if len(set().union(*choices)) < sum(map(len, choices)) or not all(choices):
        return None, None
    logps = torch.stack([logps_V[sorted(tokens)].logsumexp(dim=0) for tokens in choices])
    return float(logps.argmax() == 0), -float(logps.log_softmax(dim=0)[0])


@torch.no_grad()
def prompted(model: Any, held_out: HeldOut, strengths: Strengths) -> dict[str, Observations]:
    """KL of the prompted base model to a model and to the plain base model, on the prompted model's answers."""
    if held_out.prompted is None:
        return {}
    view, rows = held_out.prompted.view, held_out.prompted.answers
    views = Views({"prompt": view}, held_out.tokenizer, context_length(model.config, held_out.tokenizer))
    views.add(rows, tokenise(rows, held_out.tokenizer))
    observed: dict[str, Observations] = {label: defaultdict(list) for label in strengths}
    # along the same answers: the base behind the prompt (the target), the base without it, the model without it
    for batch in batches(held_out.tokenizer, rows, held_out.batch_size):
        batch = batch.to(model.device)
        base_at = ModelAt(held_out.model, held_out.model, batch, views=views)
        at = ModelAt(model, model, batch, views=views)
        target, base = (base_at(1.0, view=shown, distribution=True) for shown in ("prompt", ""))
        base_nats, _ = _distance(target, base)
        for label, strength in strengths.items():
            # a model that is measured with the prompt reads it here, too
            view_shown = "prompt" if held_out.plain is not None else ""
            nats, agreed = _distance(target, at(strength, view=view_shown, distribution=True))
            observed[label]["prompted_nats"] += nats.tolist()
            observed[label]["prompted_agreed"] += agreed.tolist()
            observed[label]["prompted_base_nats"] += base_nats.tolist()
            observed[label]["prompted_tokens"] += target.mask.sum(dim=1).tolist()
    return {label: dict(values) for label, values in observed.items()}


def _distance(target: Outputs, other: Outputs) -> tuple[Tensor, Tensor]:
    """Per row, the summed KL(target || other), and the number of tokens at which both predict the same, `(B,)`
    each."""
    # N labelled tokens of all rows, one after the other
    logp_NV, logq_NV = target.distribution, other.distribution
    assert logp_NV is not None and logq_NV is not None  # requested by `distribution=True`
    kl_N = (logp_NV.exp() * (logp_NV - logq_NV)).sum(dim=-1)
    same_N = (logp_NV.argmax(dim=-1) == logq_NV.argmax(dim=-1)).to(kl_N.dtype)
    lengths = target.mask.sum(dim=1).tolist()
    kl_B, same_B = (torch.stack([row.sum() for row in values_N.split(lengths)]) for values_N in (kl_N, same_N))
    return kl_B, same_B


class Observer(NamedTuple):
    """One kind of example.

    Attributes:
        step: Its name in the progress bar.
        look: Computes the observations at each strength, from a model, the examples and strengths.
    """

    step: str
    look: Callable[[Any, HeldOut, Strengths], dict[str, Observations]]


OBSERVERS = {
    "pairs": Observer("test pairs", pairs),
    "neutral": Observer("neutral text", neutral),
    "answers": Observer("generation", answers),
    "prompted": Observer("prompted answers", prompted),
    "questions": Observer("questions", questions),
}


def against_base(steered: Sequence[tuple[Tensor, Tensor]], base: Sequence[Tensor]) -> Observations:
    """Sums over the tokens of every neutral answer, and the 95th percentile of their KL. If `steered` has fewer rows
    than `base`, they are its first ones."""
    # a tensor `(T,)` for each answer; sums and counts are kept, so that a measure can weigh answers by their tokens
    kl_T = [_kl(ours, theirs) for (ours, _), theirs in zip(steered, base, strict=False)]
    return {
        "neutral_kl": [float(kl.sum()) for kl in kl_T],
        "neutral_kl_tail": [float(kl.quantile(_TAIL)) for kl in kl_T],
        "neutral_nll": [float(F.nll_loss(ours, targets, reduction="sum")) for ours, targets in steered],
        "neutral_tokens": [len(targets) for _, targets in steered],
    }


def _kl(ours_TV: Tensor, theirs_TV: Tensor) -> Tensor:
    """KL(ours || theirs) of every token, `(T,)`."""
    # a few tokens at a time: the product over all of them would leave the processor's cache
    few = zip(ours_TV.split(_TOKENS), theirs_TV.split(_TOKENS), strict=True)
    return torch.cat([(ours.exp() * (ours - theirs)).sum(dim=-1) for ours, theirs in few])


FEW_NEUTRAL = 16
"""Number of neutral rows for a page about one model, small for speed; grids use all of them."""


def neutral_rows(
    tokenizer: PreTrainedTokenizerBase | None = None,
    part: Literal["report", "match"] = "report",
    rows: Dataset | None = None,
    count: int | None = None,
) -> Dataset:
    """Everyday questions and answers unrelated to any behaviour, every other row: conversations, or plain text for a
    tokenizer without a chat template.

    Args:
        tokenizer: The tokenizer that will read them; None: they are not converted.
        part: Side effects are reported on other rows than those on which strengths are matched, so that a match to
            particular rows is not mistaken for few side effects.
        rows: The rows of both parts; None: the embedded ones, 64 for each part.
        count: How many rows of the part to use, from the first; None: all.

    Raises:
        ArmError: there are fewer than two rows.
    """
    rows = Dataset.from_list(read_jsonl(NEUTRAL)) if rows is None else rows
    if len(rows) < 2:
        raise ArmError(
            f"Neutral text must have 2 rows or more, to match strengths and to report on (got {len(rows)})."
        )
    # every other row, so that both parts are about the same topics
    part_rows = rows.select([*range(0 if part == "match" else 1, len(rows), 2)][:count])
    return part_rows if tokenizer is None else readable(part_rows, tokenizer)
