"""What a client may send, checked field by field; an error names the field that is wrong.

Fields that OpenAI defines and we can't honour are refused unless they ask for nothing; fields that
nobody defines are ignored, as OpenAI clients expect. Inside `forepage`, our own, they are refused.
What only chat takes is in `chat_schemas`.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from forepage.kv.plan_source import PlanSource
from forepage.settings import ResidencyMode

MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_STOP_TOKENS = 64
EXAMPLE_MODEL = "forepage-tiny"
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def _off(value: Any) -> Any:
    if value:
        raise ValueError("not supported yet: leave it out")
    return value


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is 5, and some clients write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _one_prompt(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        raise ValueError("one prompt a request: a string or a list of token ids")
    return value


def encodable(value: str) -> str:
    """The text. Raises: ValueError unless it can be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode: it has a lone surrogate") from None
    return value


def example_of(**fields: Any) -> ConfigDict:
    """Configuration of a body: a request that the documentation shows."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


Off = Annotated[Any, AfterValidator(_off), Field(description="refused unless it asks for nothing")]
WHOLE = BeforeValidator(_whole)
TokenId = Annotated[int, Field(ge=0)]
Text = Annotated[str, AfterValidator(encodable)]
ModelName = Annotated[Text, Field(min_length=1, max_length=256, description="one of GET /v1/models")]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Fields(BaseModel):
    """Strict about what it knows, deaf to the rest."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class ResidencyFields(Fields):
    """How this request's KV may be paged (`forepage`)."""

    model_config = ConfigDict(extra="forbid")

    mode: Annotated[ResidencyMode, Field(strict=False)] | None = Field(
        None, description="how its KV is paged; the server's default unless said"
    )
    min_recall: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="guarded: an audited step that recalls less evidence is a miss",
    )
    budget_blocks: Annotated[int, Field(ge=1, le=INT32_MAX), WHOLE] | None = Field(
        None, description="blocks chosen by score that may be resident"
    )
    plan_source: Annotated[PlanSource, Field(strict=False)] | None = Field(
        None, description="for measuring: a baseline that keeps as many blocks as the memory indexer would"
    )
    threshold: float | None = Field(None, ge=0.0, le=1.0, description="an entry is wanted above this")
    audit: bool | None = Field(None, description="audit lookahead too, and report every audited step")
    reads: bool | None = Field(None, description="report which blocks were read for the answer")


class StreamOptions(Fields):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(None, description="a last chunk, without choices, carries `usage`")


class GenerationBody(Fields, ABC):
    """What both endpoints take."""

    prompt_field: ClassVar[str]

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX), WHOLE] | None = Field(
        None, description="the most tokens an answer may have, reasoning included"
    )
    temperature: float | None = Field(
        None, ge=0.0, le=2.0, description="0: always the likeliest token; 1 unless said"
    )
    top_p: float | None = Field(
        None, gt=0.0, le=1.0, description="draw from the likeliest tokens that together have this probability"
    )
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX), WHOLE] | None = Field(
        None, description="extension: draw from so many likeliest tokens; 0 or -1: all"
    )
    min_p: float | None = Field(
        None, ge=0.0, le=1.0, description="extension: draw from tokens this likely relative to the likeliest"
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), WHOLE] | None = Field(
        None, description="equal requests with equal seeds draw equal tokens"
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="texts that end the answer, and are left out of it"
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="extension, as in vLLM: any of these ends the answer, its text is left out"
    )
    stream: bool | None = Field(None, description="answer in server-sent events, as it is made")
    stream_options: StreamOptions | None = Field(None, description="only with stream: true")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = Field(
        None, description="answers wanted; 1 unless said"
    )
    user: Any = Field(None, description="not looked at")
    priority: Annotated[int, Field(ge=INT32_MIN, le=INT32_MAX), WHOLE] | None = Field(
        None,
        description="extension, as in vLLM: of the requests that wait for room on a worker, the lowest goes "
        "first, then the oldest; 0 unless said. Running ones are not stopped for it",
    )
    timeout_s: float | None = Field(
        None, gt=0.0, description="extension: the whole request ends by then, with 504 if it isn't done"
    )
    ignore_eos: bool | None = Field(None, description="extension: go on to max_tokens")
    forepage: ResidencyFields | None = Field(None, description="extension: residency of this request")
    cache_salt: Text | None = Field(
        None, max_length=256, description="extension: prefixes are shared only between equal salts"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2.0, le=2.0, description="taken from a token's logit each time the answer has had it"
    )
    presence_penalty: float | None = Field(
        None, ge=-2.0, le=2.0, description="taken from a token's logit once the answer has had it"
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100.0, description="extension, as in vLLM: over prompt and answer"
    )
    logit_bias: Off = None

    @property
    def num_choices(self) -> int:
        """Answers wanted."""
        return self.n or 1

    @property
    @abstractmethod
    def num_top_logprobs(self) -> int | None:
        """Alternatives to show with each token's log-probability; None for no log-probabilities."""

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens the client wants, if it said."""
        return self.max_tokens


class TextBody(GenerationBody):
    """POST /v1/completions"""

    model_config = example_of(model=EXAMPLE_MODEL, prompt="It was hidden", max_tokens=64)
    prompt_field: ClassVar[str] = "prompt"

    prompt: Annotated[
        Text | list[TokenId],
        Field(min_length=1, description="one text, or one list of token ids below the vocabulary's size"),
        BeforeValidator(_one_prompt),
    ]
    best_of: Literal[1] | None = Field(None, description="only 1: use n")
    echo: Off = None
    suffix: Off = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = Field(
        None, description="alternatives to show with each token's"
    )

    @property
    def num_top_logprobs(self) -> int | None:
        """As asked."""
        return self.logprobs
