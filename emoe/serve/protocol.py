"""What clients send: OpenAI's fields, and ours. Every field has a type and a bound here.

The rule for fields: those that would change the answer and are not supported are refused unless they say what is done
anyway (`tools: []`); OpenAI's that change nothing here (`user`, `metadata`, ...) are ignored; all others are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

_LONGEST_NAME = 256
_INT64 = 1 << 63

Milliseconds = Annotated[float, Field(gt=0, le=1e8, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. /:-]{0,63}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]
Text = Annotated[str, StringConstraints(min_length=1)]

# Not supported, and what of them changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(_Fields):
    name: str | None = Field(None, max_length=_LONGEST_NAME)
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and with it alone")
        return self


class _Generation(_Fields):
    """What both endpoints share."""

    model: str | None = Field(None, max_length=_LONGEST_NAME)
    max_tokens: int | None = Field(None, ge=1, lt=_INT64)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Share | None = None
    n: int | None = Field(None, ge=1, lt=_INT64)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        None, max_length=1024
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    # Not OpenAI's, with the names that other servers gave them.
    top_k: int | None = Field(None, ge=0, lt=1 << 31)
    min_p: Share | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    ignore_eos: bool | None = Field(None, description="go on to max_tokens, whatever the model says")

    # Ours; X-Emoe-Task, X-SLO-TTFT-ms, X-SLO-TPOT-ms and X-SLO-TTLT-ms say the same.
    task: TaskName | None = None
    ttft_slo_ms: Milliseconds | None = Field(None, description="target for the first token")
    tpot_slo_ms: Milliseconds | None = Field(None, description="target for the mean of each further token")
    ttlt_slo_ms: Milliseconds | None = Field(None, description="target for the last token")

    # Change nothing here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @model_validator(mode="after")
    def _supported(self) -> _Generation:
        for name in _NEUTRAL:
            value = getattr(self, name, None)
            if value is not None and not any(value == each and type(value) is type(each) for each in _NEUTRAL[name]):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        if self.ignore_eos and self.form is not None:
            raise ValueError("ignore_eos goes with no response_format: an answer ends where its form does")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        for key in self.logit_bias or ():
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError(f"logit_bias has the key {key[:40]!r}; keys are token ids")
        return self

    @property
    def form(self) -> ResponseFormat | None:
        """What an answer is to keep to."""
        given = self.response_format
        return None if given is None or given.type == "text" else given

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def tokens_asked(self) -> int | None:
        """Of the answer at most."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives come with each token's log-probability; None: no log-probabilities."""
        raise NotImplementedError


class TextPart(_Fields):
    type: Literal["text"]
    text: str


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: str | None = Field(None, max_length=_LONGEST_NAME)

    # What answers have, and clients send back.
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    def to_template(self) -> dict[str, str]:
        """For a chat template: text alone; `developer` is what newer clients call `system`."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generation):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=_INT64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    parallel_tool_calls: Any = None  # without tools it changes nothing

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens say different things; give one")
        return self

    @property
    def tokens_asked(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def classified_text(self) -> str:
        """What tells the task: the last message of the user."""
        return next((each.to_template()["content"] for each in reversed(self.messages) if each.role == "user"), "")


class CompletionRequest(_Generation):
    """Body of POST /v1/completions."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)

    echo: Any = None
    suffix: Any = None
    best_of: Any = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt by itself."""
        given: Any = self.prompt
        one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if one else given


# Names of clients' fields: what else is where an error lies is a name of pydantic's.
FIELDS = frozenset(
    info.alias or name
    for model in (ChatRequest, CompletionRequest, Message, TextPart, ResponseFormat, JsonSchema, StreamOptions)
    for name, info in model.model_fields.items()
)
