"""What only a chat takes: messages, tools, and how hard to think."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    model_validator,
)

from forepage.gateway.schemas import (
    EXAMPLE_MODEL,
    INT32_MAX,
    MAX_TOP_LOGPROBS,
    WHOLE,
    Fields,
    GenerationBody,
    Off,
    Text,
    encodable,
    example_of,
)
from forepage.text.dsml import to_json
from forepage.text.messages import Role, Task

MAX_TOOLS = 1024
FUNCTION_NAME = r"^[A-Za-z0-9_.:/-]{1,128}$"
"""Wider than OpenAI's; nothing in it needs escaping in a tag."""


def _known_choice(value: Any) -> Any:
    by_name = isinstance(value, dict) and value.get("type") == "function"
    if not by_name and value not in (None, "none", "auto", "required"):
        raise ValueError('must be none, auto, required or {"type": "function", "function": {"name": ...}}')
    return value


def _text_part(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        raise ValueError("must be text: the model sees no images, audio or files")
    return value


def _text_alone(value: Any) -> Any:
    if isinstance(value, list) and value != ["text"]:
        raise ValueError("must be text alone: the model makes no audio or images")
    return value


def _no_search(value: Any) -> Any:
    if value is not None:
        raise ValueError(
            "nothing is searched here: leave it out, and put what should be read into the prompt"
        )
    return value


class TextPart(Fields):
    """A part of a message's content; only text."""

    type: Annotated[Literal["text"], BeforeValidator(_text_part)] = Field(
        description="text is all that is taken"
    )
    text: Text = Field(description="parts are joined by empty lines")


class FunctionCallFields(Fields):
    """What was called; `arguments` is a JSON object as text."""

    name: str = Field(pattern=FUNCTION_NAME, description="which function was called")
    arguments: Text = Field(description="a JSON object as text")


class ToolCallFields(Fields):
    """A call of an assistant."""

    id: Text = Field(min_length=1, max_length=256, description="its result comes with the same tool_call_id")
    type: Literal["function"] | None = Field(None, description="functions are all that is called")
    function: FunctionCallFields = Field(description="what was called, with what")


class ChatMessageFields(Fields):
    """A message; what goes with which role is checked in `conversation`."""

    role: Annotated[Role, Field(strict=False, description="who speaks")]
    content: Text | list[TextPart] | None = Field(
        None, description="what was said; null only for an assistant that calls tools"
    )
    reasoning_content: Text | None = Field(None, description="assistant: the reasoning that came with it")
    tool_calls: list[ToolCallFields] | None = Field(None, description="assistant: the calls that it made")
    tool_call_id: Text | None = Field(None, description="tool: which call this is the result of")
    task: Annotated[Task, Field(strict=False)] | None = Field(
        None, description="extension: a short auxiliary answer; only with the last message"
    )
    extracted_url: Text | None = Field(None, description="extension: what task read_url asks about")
    function_call: Off = None

    @property
    def texts(self) -> list[str] | None:
        """The content's texts."""
        if isinstance(self.content, str):
            return [self.content]
        return None if self.content is None else [part.text for part in self.content]


class FunctionFields(Fields):
    """A tool that may be called. The model is shown all of it as the client wrote it, unknown fields too."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=FUNCTION_NAME, description="what the model calls it by")
    description: str | None = Field(None, description="tells the model when and how to call it")
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments; none without")
    _as_sent: dict[str, Any]

    @property
    def as_sent(self) -> dict[str, Any]:
        """The JSON object of the request."""
        return self._as_sent

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        fields = handler(value)
        try:
            encodable(to_json(value))
        except RecursionError:
            raise ValueError("nested too deep") from None
        fields._as_sent = value
        return fields


class ToolFields(Fields):
    """A tool; only functions."""

    type: Literal["function"] = Field(description="functions are all that is taken")
    function: FunctionFields = Field(description="what may be called")


class NamedFunction(Fields):
    """Which function."""

    name: str = Field(pattern=FUNCTION_NAME, description="one of the request's tools")


class NamedTool(Fields):
    """The one tool that must be called (`tool_choice`)."""

    type: Literal["function"] = Field(description="functions are all that is called")
    function: NamedFunction = Field(description="which one")


class ChatTemplateFields(Fields):
    """Switches of the chat layout (`chat_template_kwargs`); ones that we don't have are refused."""

    model_config = ConfigDict(extra="forbid")

    thinking: bool | None = Field(None, description="reason before the answer")
    drop_thinking: bool | None = Field(
        None, description="true unless said: reasoning from before the last user message is left out"
    )


class PlainFormat(Fields):
    """Any text."""

    type: Literal["text"] = Field(description="any text")


class JsonFormat(Fields):
    """A JSON object, whatever its shape."""

    type: Literal["json_object"] = Field(description="a JSON object")


class NamedSchema(Fields):
    """OpenAI's wrapping of a schema; the answer always keeps to it, `strict` or not."""

    name: str = Field(pattern=FUNCTION_NAME, description="not shown to the model")
    description: str | None = Field(None, description="not shown to the model")
    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema that the answer keeps to")
    strict: bool | None = Field(None, description="kept to either way")


class SchemaFormat(Fields):
    """JSON of a schema."""

    type: Literal["json_schema"] = Field(description="JSON of a schema")
    json_schema: NamedSchema = Field(description="which schema")


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    model_config = example_of(
        model=EXAMPLE_MODEL, messages=[{"role": "user", "content": "Where was it hidden?"}], max_tokens=64
    )
    prompt_field: ClassVar[str] = "messages"

    messages: list[ChatMessageFields] = Field(min_length=1, description="the conversation, oldest first")
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX), WHOLE] | None = Field(
        None, description="the newer name of max_tokens; it wins"
    )
    logprobs: bool | None = Field(None, description="show each token's log-probability")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = Field(
        None,
        description="alternatives to show with each, if logprobs is true",
    )
    tools: Annotated[list[ToolFields], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="what the answer may call"
    )
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None, BeforeValidator(_known_choice)
    ] = Field(None, description="whether it must; auto unless said")
    parallel_tool_calls: bool | None = Field(None, description="false: the answer ends with its first call")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="whether to think before the answer, and how hard; none unless said"
    )
    modalities: Annotated[list[Literal["text"]], BeforeValidator(_text_alone)] | None = Field(
        None, description="text is all that is made"
    )
    audio: Off = None
    web_search_options: Annotated[Any, BeforeValidator(_no_search)] = Field(
        None, description="refused: nothing is searched"
    )
    chat_template_kwargs: ChatTemplateFields | None = Field(
        None, description="extension, as in vLLM and SGLang"
    )
    functions: Off = None
    response_format: Annotated[
        PlainFormat | JsonFormat | SchemaFormat | None,
        Field(discriminator="type", description="what the answer must be, token by token; text unless said"),
    ] = None

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens the client wants; the newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """JSON schema that the answer must keep to; empty: any object."""
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.schema_
        return {} if isinstance(self.response_format, JsonFormat) else None

    @property
    def num_top_logprobs(self) -> int | None:
        """As asked."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[ToolFields]:
        """Tools that may be called in this answer, and that the model is shown."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[ToolFields]:
        """Tools of which the answer must be calls; where it may as well be JSON of a schema: either."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.offered_tools if tool.function.name == name]
        is_bound = self.tool_choice == "required" or self.answer_schema is not None
        return self.offered_tools if is_bound else []

    @property
    def max_calls(self) -> int | None:
        """Most calls that are wanted in an answer; None: any number. One that is named is called once."""
        is_one = isinstance(self.tool_choice, NamedTool) or self.parallel_tool_calls is False
        return 1 if is_one else None
