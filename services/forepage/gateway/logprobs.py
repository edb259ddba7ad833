"""Log-probabilities as a worker sends them, and as OpenAI's two endpoints word them.

Every generated token has an entry, also those of reasoning and markup, and the one that ends the answer.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from forepage.errors import IntegrityError, RequestError
from forepage.rpc import worker_pb2 as pb
from forepage.text.tokenizer import Tokenizer

LEAST = -9999.0
"""What OpenAI gives for a probability of zero: JSON has no infinity."""


@dataclass(frozen=True)
class Scored:
    """A token and its log-probability; `raw` are its bytes, which may be a part of a character."""

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True)
class ScoredToken:
    """A generated token, the alternatives, and how many characters of the answer were before it."""

    chosen: Scored
    top: tuple[Scored, ...]
    offset: int


class TokenScore(BaseModel):
    """A token in a chat's log-probabilities."""

    token: str
    logprob: float
    bytes: list[int]


class TokenScores(TokenScore):
    """A generated token with its alternatives."""

    top_logprobs: list[TokenScore]


class ChatLogprobs(BaseModel):
    """Of one choice, or a piece of it."""

    content: list[TokenScores]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Of one choice of a plain completion, or a piece of it; parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class LogprobReader:
    """Reads one answer's entries; `num_top` alternatives were asked for."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def read(self, tokens: pb.Tokens, count: int) -> list[ScoredToken]:
        """Entries of the first `count` tokens of an event.

        Raises: RequestError when the worker computes none, IntegrityError when their number is wrong.
        """
        if tokens.token_ids and not tokens.chosen:
            raise RequestError("this worker computes no log-probabilities: leave it out", "logprobs")
        num_tokens, width = len(tokens.token_ids), self._num_top
        if len(tokens.chosen) != num_tokens or len(tokens.top) != num_tokens * width:
            raise IntegrityError("a worker sent the wrong number of log-probabilities")
        return [
            self._entry(chosen, tokens.top[index * width : (index + 1) * width])
            for index, chosen in enumerate(tokens.chosen[:count])
        ]

    def _entry(self, chosen: pb.TokenLogprob, top: Sequence[pb.TokenLogprob]) -> ScoredToken:
        offset = self._offset
        raw = self._tokenizer.decode_bytes((chosen.token_id,))
        self._offset += len(self._decoder.decode(raw))
        return ScoredToken(self._scored(chosen), tuple(self._scored(item) for item in top), offset)

    def _scored(self, item: pb.TokenLogprob) -> Scored:
        raw = self._tokenizer.decode_bytes((item.token_id,))
        name = self._tokenizer.name_of(item.token_id)  # tokens that end an answer are silent, but have one
        return Scored(name or raw.decode(errors="replace"), raw, max(item.logprob, LEAST))


def chat_logprobs(tokens: Sequence[ScoredToken]) -> ChatLogprobs | None:
    """A chat's wording; None for no tokens."""
    if not tokens:
        return None
    return ChatLogprobs(
        content=[
            TokenScores(
                **_score(token.chosen).model_dump(), top_logprobs=[_score(item) for item in token.top]
            )
            for token in tokens
        ]
    )


def text_logprobs(tokens: Sequence[ScoredToken]) -> TextLogprobs | None:
    """A plain completion's wording; None for no tokens. The generated token is among the alternatives."""
    if not tokens:
        return None
    tops = [{item.text: item.logprob for item in (*token.top, token.chosen)} for token in tokens]
    return TextLogprobs(
        tokens=[token.chosen.text for token in tokens],
        token_logprobs=[token.chosen.logprob for token in tokens],
        top_logprobs=tops if any(token.top for token in tokens) else None,
        text_offset=[token.offset for token in tokens],
    )


def _score(item: Scored) -> TokenScore:
    return TokenScore(token=item.text, logprob=item.logprob, bytes=list(item.raw))
