"""Answers many jobs at once, each with its own vectors: continuous batching over any causal model of transformers.

Every step reads one token of each running answer, and then as many waiting prompts as there is room for. Complete
answers leave the batch, and others take their place. An answer depends only on its own tokens, vectors and random
numbers, up to the rounding of larger or smaller matrix products. If a step fails, for example because memory runs out,
its jobs are read again one by one, and only those that fail alone are lost.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steertune.adapters import prompt_length
from steertune.adapters.analysis.activations import outputs_of
from steertune.adapters.monitors import Monitor
from steertune.adapters.observing import base_model
from steertune.adapters.rows import steer_rows
from steertune.recipes.lab.generation import broken_rows, end_tokens, left_padded
from steertune.recipes.serving.cache import States, can_join, new_cache
from steertune.recipes.serving.defaults import BATCH
from steertune.recipes.serving.jobs import Done, Job, Prompt
from steertune.recipes.serving.row import Row, score_rows
from steertune.recipes.serving.sampling import prompt_scores, scored
from steertune.recipes.serving.vectors import Vectors

_PREFILL = 4096  # prompt tokens read in one pass; a longer prompt is read alone
_SCORES = 2**28  # logits of scored prompts in one pass: 1 GiB in float32


class Engine:
    """Runs jobs. It belongs to one thread.

    Args:
        vectors: The model and its vectors.
        tokenizer: The model's tokenizer.
        batch: Number of answers at a time.
        on_step: Called after every step with its seconds and the number of tokens that it drew.
        monitors: Name -> the monitor that scores the tokens of jobs that name it.
    """

    def __init__(
        self,
        vectors: Vectors,
        tokenizer: Any,
        batch: int = BATCH,
        on_step: Callable[[float, int], None] = lambda seconds, tokens: None,
        monitors: Mapping[str, Monitor] | None = None,
    ) -> None:
        self.vectors, self.tokenizer = vectors, tokenizer
        self.batch, self.on_step, self.monitors = batch, on_step, monitors or {}
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._states: States | None = None
        self._drawn = 0
        self._parameters = {*inspect.signature(self.base.forward).parameters}
        self._ends = end_tokens(self.base, tokenizer)
        self._joinable = can_join(self.base)

    @property
    def base(self) -> Any:
        """The base model, into which PEFT has put the vectors."""
        return base_model(self.vectors.model)

    @property
    def running(self) -> int:
        """Number of running answers."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of jobs that have not started."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a step would have anything to do."""
        return bool(self._waiting or self._running)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._waiting.append(Row(job, self.tokenizer))

    def run(self) -> None:
        """Run until every queued job has ended."""
        while self.busy:
            self.step()

    def give_up(self, message: str) -> None:
        """Fail every waiting and running job."""
        for row in [*self._running, *self._waiting]:
            row.job.fail(message)
        self._running, self._states = [], None
        self._waiting.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Read one token of every running answer, then waiting prompts."""
        start, self._drawn = time.monotonic(), 0
        if self._running:
            self._advance()
        if rows := self._admissible():
            self._admit(rows)
        self._drop_over()
        self.on_step(time.monotonic() - start, self._drawn)

    # -- one step -----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Read the last token of every running answer, and draw the next one."""
        rows = self._running
        try:
            logits_BV = self._read_next()
        except Exception as error:  # a model can raise any error, such as out of memory; the service continues
            self._running, self._states = [], None
            self._recover(rows, error)
            return
        self._keep(self._draw(rows, logits_BV))

    def _admissible(self) -> list[Row]:
        """The rows whose prompts are read next: limited by free places in the batch and by the padded size of the
        prompts."""
        rows: list[Row] = []
        width, scores = 0, False
        vocabulary = self.base.config.get_text_config().vocab_size
        while self._waiting and len(self._running) + len(rows) < self.batch:
            row = self._waiting[0]
            apart = row.alone or not self._joinable
            if (self._running or rows) and (apart or any(other.alone for other in self._running)):
                break
            width, scores = max(width, len(row.job.read)), scores or row.job.echo
            tokens = width * (len(rows) + 1)
            if rows and (tokens > _PREFILL or (scores and tokens * vocabulary > _SCORES)):
                break
            rows.append(self._waiting.popleft())
            if apart:
                break
        return rows

    def _admit(self, rows: list[Row]) -> None:
        """Read prompts, draw the first token of each answer, and add them to the batch."""
        for row in rows:
            row.job.begin()
        try:
            states, logits_BTV = self._read(rows)
            for row, logits_TV in zip(rows, logits_BTV, strict=True):
                if not row.job.tokens:
                    scores = prompt_scores(logits_TV, row.job.prompt, row.job.top or 0) if row.job.echo else []
                    row.job.listener(Prompt(tuple(scores)))
        except Exception as error:
            self._recover(rows, error)
            return
        live = self._draw(rows, logits_BTV[:, -1])
        if not live:
            return
        joined = [*self._running, *(rows[i] for i in live)]
        try:
            if len(live) < len(rows):
                states.keep(live)
            if self._states is not None:
                self._states.join(states)
            self._running, self._states = joined, self._states or states
        except Exception as error:
            self._running, self._states = [], None
            self._recover(joined, error)

    def _draw(self, rows: Sequence[Row], logits_BV: Tensor) -> list[int]:
        """Draw the next token of every row, report it, and return which rows continue."""
        live = []
        broken = broken_rows(logits_BV).tolist()
        for i, row in enumerate(rows):
            job = row.job
            if broken[i]:
                strengths = ", ".join(f"{vector.strength:g}" for vector in job.vectors) or "0"
                message = f"strength={strengths}: the model's logits are NaN or infinite. Use a smaller strength."
                job.fail(message, "request")
            elif job.new_tokens == 0:
                job.listener(Done("length", 0))
            elif job.halted:
                job.listener(row.text.flush())
                job.listener(Done("content_filter", len(job.tokens)))
            else:
                try:
                    live += [i] if self._goes_on(row, logits_BV[i]) else []
                except Exception as error:  # raised by a tokenizer, for example
                    self._recover([row], error)
        return live

    def _goes_on(self, row: Row, logits_V: Tensor) -> bool:
        """Draw one token, and return whether the answer needs another."""
        job = row.job
        token = row.sampler.draw(logits_V, job.tokens)
        self._drawn += 1
        if token in self._ends:
            job.listener(row.text.flush())
            job.listener(Done("stop", len(job.tokens)))
            return False
        score = None if job.top is None else scored(logits_V[None], [token], job.top)[0]
        job.tokens.append(token)
        job.listener(row.text.push(token, score))
        if not row.text.stopped and len(job.tokens) < job.new_tokens:
            return True
        job.listener(row.text.flush())
        job.listener(Done("stop" if row.text.stopped else "length", len(job.tokens)))
        return False

    # -- rows join and leave ---------------------------------------------------------------------------------------

    def _keep(self, live: list[int]) -> None:
        """Keep only these rows in the batch."""
        if len(live) == len(self._running):
            return
        self._running = [self._running[i] for i in live]
        if not live:
            self._states = None
        elif self._states is not None:
            self._states.keep(live)

    def _recover(self, rows: Sequence[Row], error: Exception) -> None:
        """After a failed pass, queue each row again to be read alone; a row that was already alone fails."""
        if len(rows) == 1:
            rows[0].job.fail(f"It cannot be answered: {type(error).__name__}: {error}")
            return
        for row in reversed(rows):
            row.alone = True
            self._waiting.appendleft(row)

    def _drop_over(self) -> None:
        """End jobs that timed out or were cancelled."""
        over = [row for row in [*self._running, *self._waiting] if row.job.cancelled or row.job.is_late()]
        if not over:
            return
        for row in over:
            if row.job.cancelled:
                row.job.fail("The request was cancelled.")
            else:
                row.job.fail(f"The answer was not complete after {row.job.seconds:g} seconds (--seconds).", "late")
        self._waiting = deque(row for row in self._waiting if row not in over)
        self._keep([i for i, row in enumerate(self._running) if row not in over])

    # -- the model ----------------------------------------------------------------------------------------------

    def _read(self, rows: Sequence[Row]) -> tuple[States, Tensor]:
        """Read rows from their first token; the logits are `(rows, tokens, vocabulary)`, of only the last token if no
        prompt is scored."""
        inputs, _ = left_padded(self.tokenizer, [row.job.read for row in rows])
        ids_BT, mask_BT = (inputs[name].to(self.base.device) for name in ("input_ids", "attention_mask"))
        ends_B = ids_BT.shape[1] - torch.tensor([len(row.job.tokens) for row in rows])
        options: dict[str, Any] = {"past_key_values": new_cache(self.base)} if self._joinable else {}
        if not any(row.job.echo and not row.job.tokens for row in rows):
            options["logits_to_keep"] = 1
        output = self._forward(rows, ids_BT, mask_BT, ends_B, options)
        return States.of(output, mask_BT), output.logits

    def _read_next(self) -> Tensor:
        """Read the last token of every running row; logits `(rows, vocabulary)`."""
        states = self._states
        assert states is not None
        columns = states.columns
        states.mask_BT = torch.nn.functional.pad(states.mask_BT, (0, 1), value=1)
        tokens_B1 = torch.tensor([[row.job.tokens[-1]] for row in self._running], device=self.base.device)
        # the cache holds all tokens of the answer but the last
        ends_B = torch.tensor([columns - len(row.job.tokens) + 1 for row in self._running])
        output = self._forward(self._running, tokens_B1, states.mask_BT, ends_B, {states.name: states.cache})
        return output.logits[:, -1]

    def _forward(
        self, rows: Sequence[Row], ids_BT: Tensor, mask_BT: Tensor, ends_B: Tensor, options: dict[str, Any]
    ) -> Any:
        """One forward pass, each row steered by its vectors; `ends_B` is where prompts end, in columns of the mask."""
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        options = {"position_ids": positions_BT, "use_cache": True} | options
        options = {name: value for name, value in options.items() if name in self._parameters}
        vectors = [row.job.vectors for row in rows]
        names = sorted({name for row in rows for name in row.job.monitors})
        watched = {n: self.base.get_submodule(self.monitors[name].module) for n, name in enumerate(names)}
        with (
            steer_rows(self.vectors.model, vectors),
            prompt_length(self.vectors.model, ends_B),
            outputs_of(self.base, watched, ends_early=False) as states,
        ):
            output = self.base(input_ids=ids_BT, attention_mask=mask_BT, **options)
        score_rows(self.monitors, rows, {name: states[n] for n, name in enumerate(names)})
        return output
