"""What clients may send, as published in the OpenAPI document.

A field that is not here is refused by name. Fields that only allow their neutral value are here
because clients send them unasked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

CHOICES_MAX = 128
"""In the schema; the server's own limit may be lower."""
LOGPROBS_MAX = 20
STOPS_MAX = 16
BIASES_MAX = 1_024
MESSAGES_MAX = 4_096
PROMPTS_MAX = 128
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1

Name: TypeAlias = Annotated[str, StringConstraints(max_length=256)]
StopText: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=1_024)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=2**32 - 1)]
Ids: TypeAlias = Annotated[list[TokenId], Field(min_length=1)]
Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]


class Strict(BaseModel):
    """A body or a part of one: unknown fields are errors, types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream says beside the text."""

    include_usage: bool = False
    """Send a last chunk that holds the usage and no choices."""
    continuous_usage_stats: bool = False
    """Put the usage so far into every chunk."""
    include_obfuscation: Literal[False] = False
    """Streams are never padded."""


class Speculative(Strict):
    """Speculation for this request; it changes speed, never the output."""

    enabled: bool = True
    timeline: bool = False
    """Also return who did what when, as `metrics.timeline`, in the trace event format."""


class JsonSchema(Strict):
    """A schema that the output must satisfy."""

    name: Name
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    description: str | None = None
    strict: bool | None = None
    """The output always satisfies the schema, whether this is set or not."""


class TextFormat(Strict):
    """No constraint."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat: TypeAlias = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class TextPart(Strict):
    """A piece of a message or of a prediction."""

    type: Literal["text"]
    text: str


class Prediction(Strict):
    """Text that much of the output is expected to repeat; it changes speed, never the output."""

    type: Literal["content"]
    content: str | Annotated[list[TextPart], Field(max_length=MESSAGES_MAX)]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MESSAGES_MAX)]
    # What clients send back of an answer of ours.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class Generating(Strict):
    """What both kinds of completion have in common."""

    model: Name
    n: int | None = Field(default=None, ge=1, le=CHOICES_MAX)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    """0 and -1 are off."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")], Bias] | None = (
        Field(default=None, max_length=BIASES_MAX)
    )
    """By token id."""
    seed: int | None = Field(default=None, ge=SEED_MIN, le=SEED_MAX)
    stop: StopText | Annotated[list[StopText], Field(max_length=STOPS_MAX)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None
    speculative: Speculative | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=256)] | None = None
    """Requests share cached prompts only within one salt."""
    return_token_ids: bool | None = None
    """Also return ids, and which drafter guessed each of them (0: the target itself)."""
    user: Annotated[str, StringConstraints(max_length=256)] | None = None
    """The client's name for whoever asks; without effect."""


class CompletionRequest(Generating):
    """Body of /v1/completions."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=PROMPTS_MAX)]
        | Annotated[list[Ids], Field(min_length=1, max_length=PROMPTS_MAX)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=LOGPROBS_MAX)
    best_of: Literal[1] | None = None
    suffix: None = None


class ChatCompletionRequest(Generating):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=LOGPROBS_MAX)
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
