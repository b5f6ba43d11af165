"""Steered models and monitors in Inspect (https://inspect.aisi.org.uk).

    inspect eval TASK --model steertune/base+careful -M vectors=careful=runs/careful/adapter -M strength=1.5
    inspect eval TASK --model steertune/base+careful@1,steertune/base+careful@-1 -M vectors=careful=FOLDER
    inspect eval TASK --model steertune/base+fix -M vectors=fix=FOLDER -M monitors=odd=FOLDER

The name after `steertune/` is the model name of a request to `steertune serve`: the base model and the vectors that
steer it. The model runs in Inspect's process, with the server's engine, so that samples are answered in batches. The
monitors' readings of an answer are in the metadata of its output, and `monitor("odd")` makes scores of them.

Inspect discovers this provider when the package is installed; `inspect_ai` is not a dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState
from inspect_ai.tool import ToolChoice, ToolInfo

from steertune.adapters import monitors
from steertune.adapters.types import finite_strength
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.processes import device_of
from steertune.recipes.serving.answers import Choice
from steertune.recipes.serving.defaults import BATCH, LONGEST
from steertune.recipes.serving.errors import ApiError
from steertune.recipes.serving.http import model_name
from steertune.recipes.serving.loading import load_vectors, named_folders
from steertune.recipes.serving.names import read_model_name
from steertune.recipes.serving.remedies import check_monitors
from steertune.recipes.serving.replies import failure
from steertune.recipes.serving.schema import ChatRequest
from steertune.recipes.serving.service import Service, Settings

_REASONS: dict[str, StopReason] = {"stop": "stop", "length": "max_tokens", "content_filter": "content_filter"}
_FIELDS = ("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "logit_bias", "max_tokens")


@modelapi(name="steertune")
class SteeredModel(ModelAPI):
    """A base model with vectors and monitors.

    Args:
        model_name: The model name as in a request to the server: `base+careful@1.5`.
        base_url: Not used; for a running server, use Inspect's `openai-api`.
        api_key: Not used.
        config: Inspect's generation config.
        vectors: `NAME=FOLDER` of each adapter, as a list or separated by commas.
        monitors: `[NAME=]FOLDER` of each monitor, likewise; each scores every answer.
        strength: Strength of the vectors in the name that have no `@`.
        base: The base model; None: that of the first adapter.
        dtype: Number format of the base model.
        batch: Number of answers that are generated at a time.

    Raises:
        ArmError: a model, vector or monitor does not exist or does not fit.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  as in Inspect's own providers
        vectors: str | Sequence[str] = (),
        monitors: str | Sequence[str] = (),
        strength: float | str = 1.0,
        base: str | None = None,
        dtype: str = "float32",
        batch: int = BATCH,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        folders = named_folders(_words(vectors))
        self._service = _service(folders, _words(monitors), base, dtype, batch)
        self.batch = batch
        at = finite_strength(str(strength))
        if at is None:
            raise ArmError(f"strength={strength!r:.80} must be a finite number, as in -M strength=1.5.")
        # checked now rather than with the first sample
        steering = read_model_name(model_name, self._service.settings.name, [*folders])
        bare = {part for part in model_name.split("+") if "@" not in part}
        self._steering = [one.model_copy(update={"strength": at}) if one.vector in bare else one for one in steering]
        for one in self._steering:
            self._service.vectors.check(one.vector, one.strength)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a sample.

        Raises:
            ArmError: it uses tools, or cannot be answered.
        """
        if tools:
            raise ArmError("A steered model answers with text and cannot use tools. Choose a task without them.")
        settings = {name: value for name in _FIELDS if (value := getattr(config, name)) is not None}
        body = ChatRequest.model_validate({
            "model": "base",
            "messages": [{"role": message.role, "content": message.text} for message in input],
            "steering": [one.model_dump() for one in self._steering],
            "monitors": [*self._service.monitors],
            "stop": config.stop_seqs,
            "n": config.num_choices or 1,
            **settings,
        })  # fmt: skip
        try:
            started = await self._service.start(body)
            choices = [Choice() for _ in range(started.call.choices)]
            async for number, event in started.call.events():
                choices[number].hear(event)
            for choice in choices:
                if choice.failure is not None:
                    raise failure(choice.failure)
        except ApiError as error:
            raise ArmError(str(error)) from error
        answers = [
            ChatCompletionChoice(
                message=ChatMessageAssistant(content=choice.text, model=self.model_name, source="generate"),
                stop_reason=_REASONS[choice.reason or "stop"],
            )
            for choice in choices
        ]
        read, written = sum(map(len, started.prompts)), sum(choice.tokens for choice in choices)
        return ModelOutput(
            model=self.model_name,
            choices=answers,
            usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
            metadata=started.form.readings(choices[0], True) or None,
        )

    def max_connections(self) -> int:
        """The number of samples that the engine answers at a time."""
        return self.batch

    async def aclose(self) -> None:
        """End the engine's thread."""
        self._service.stop()


@scorer(metrics={"*": [mean(), stderr()]})
def monitor(name: str) -> Scorer:
    """A monitor's reading of the answer: its `score`, and whether it is `flagged`.

    Args:
        name: Name of a monitor of the model, given with `-M monitors=NAME=FOLDER`.
    """

    async def score(state: TaskState, target: Target) -> Score:
        readings = (state.output.metadata or {}).get("monitors", {})
        if name not in readings:
            raise ArmError(
                f"No monitor {name!r:.80} has read this answer (got {[*readings]}). Use --model steertune/... "
                f"with -M monitors={name}=FOLDER."
            )
        reading = readings[name]
        value = {"score": reading["score"] or 0.0, "flagged": float(reading["flagged"])}
        return Score(value=value, answer=state.output.completion, metadata={"tokens": reading["tokens"]})

    return score


def _words(value: str | Sequence[str]) -> list[str]:
    """The parts of a model argument, which is a list or separated by commas."""
    return [word for word in value.split(",") if word] if isinstance(value, str) else [*value]


def _service(folders: Any, readers: list[str], base: str | None, dtype: str, batch: int) -> Service:
    """The engine with its vectors and monitors."""
    read = named_folders(readers, name_by_folder=True)
    check_monitors(read, None)
    loaded, tokenizer = load_vectors(folders, base, dtype, device_of())
    watching = {name: monitors.load(folder, loaded.model, tokenizer) for name, folder in read.items()}
    settings = Settings(name=model_name(loaded.model), batch=batch, longest=LONGEST, queue=10_000)
    return Service(loaded, tokenizer, settings, watching)
