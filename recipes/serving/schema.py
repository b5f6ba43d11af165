"""Requests of OpenAI's protocol: the supported fields, and those that are refused.

Fields that do not change an answer (`user`, `metadata`, ...) are ignored. Unsupported fields that would change it,
such as `tools`, are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from steertune.recipes.serving.gating import Gate
from steertune.recipes.serving.names import Steering

Finite = Annotated[float, Field(allow_inf_nan=False)]
StopText = Annotated[str, Field(max_length=1000)]
MOST_CHOICES = 128
MOST_TOP = 20
_IGNORED = {"user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""Values of unsupported fields that are accepted because they change nothing."""
_UNSUPPORTED = {*_NEUTRAL, "function_call", "audio", "prediction", "reasoning_effort", "verbosity"}


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False


class GenerationRequest(BaseModel, extra="forbid"):
    """Fields that chats and completions share."""

    model: str
    steering: list[Steering] = Field(default=[], max_length=32)
    """Vectors in addition to those of the model's name; not part of OpenAI's protocol."""
    monitors: list[str] = Field(default=[], max_length=32)
    """Names of monitors that score the answer; not part of OpenAI's protocol."""
    gate: Gate | None = None
    """What happens to an answer that a monitor flags; not part of OpenAI's protocol."""
    temperature: Finite | None = Field(default=1.0, ge=0, le=100)
    top_p: Finite | None = Field(default=1.0, gt=0, le=1)
    n: int | None = Field(default=1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    frequency_penalty: Finite | None = Field(default=0.0, ge=-2, le=2)
    presence_penalty: Finite | None = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[int, Finite], Field(max_length=1024)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = {
            name: value
            for name, value in values.items()
            if name in cls.model_fields or not (name in _IGNORED or value is None or value in _NEUTRAL.get(name, ()))
        }
        if unsupported := sorted({*fields} & _UNSUPPORTED - {*cls.model_fields}):
            raise ValueError(f"{', '.join(unsupported)}: not supported by this server. Leave it out")
        return fields

    @property
    def watching(self) -> tuple[str, ...]:
        """All monitors that read the answer."""
        return tuple(dict.fromkeys([*self.monitors, *([] if self.gate is None else [self.gate.monitor])]))

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)


class ChatMessage(BaseModel):
    """A message; only text parts are supported."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]

    def as_text(self) -> dict[str, str]:
        """The message for a chat template."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP)

    @property
    def top(self) -> int | None:
        """How many of the most probable tokens to list; None: tokens are not scored."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP)
    echo: bool | None = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        return prompt


ChatMessage.model_rebuild()
