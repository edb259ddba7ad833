"""Bodies and replies of /tokenize and /detokenize, in vLLM's words."""

from typing import Annotated

from pydantic import BaseModel, Field

from forepage.gateway.schemas import (
    EXAMPLE_MODEL,
    Fields,
    ModelName,
    Off,
    Text,
    TokenId,
    example_of,
)


class TokenizeBody(Fields):
    """POST /tokenize"""

    model_config = example_of(model=EXAMPLE_MODEL, prompt="It was hidden")
    model: ModelName
    prompt: Text = Field(description="may be longer than the model's context")
    messages: Off = None


class DetokenizeBody(Fields):
    """POST /detokenize"""

    model_config = example_of(model=EXAMPLE_MODEL, tokens=[73, 116])
    model: ModelName
    tokens: Annotated[list[TokenId], Field(description="each below the model's vocabulary size")]


class Tokens(BaseModel):
    """A text's token ids; `max_model_len` is the model's context in tokens."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    """The text of token ids; bytes that are no UTF-8 show as U+FFFD."""

    prompt: str
