"""Which characters of a message each block of the prompt stands for: how a page shows what was read.

Offsets count UTF-16 code units, as strings in a browser do. Nothing here is kept.
"""

import codecs
from collections.abc import Sequence

from pydantic import BaseModel

from forepage.errors import RequestError
from forepage.text.control_tokens import ControlToken
from forepage.text.dsml import Part
from forepage.text.tokenizer import Tokenizer

Span = tuple[int, int]


class Passages(BaseModel):
    """`blocks[i]` is the part [begin, end) of the message that block i of the prompt holds."""

    prompt_tokens: int
    block_tokens: int
    blocks: list[Span]


def passages(parts: Sequence[Part], text: str, tokenizer: Tokenizer, *, block_tokens: int) -> Passages:
    """Spans of `text`, the last text of the layout that equals it. Raises: RequestError if there is none."""
    ids_of = [
        [tokenizer.token_id(part)] if isinstance(part, ControlToken) else tokenizer.encode_text(part)
        for part in parts
    ]
    places = [at for at, part in enumerate(parts) if not isinstance(part, ControlToken) and part == text]
    if not places:
        raise RequestError("the last message must be one text, apart from others", "messages")
    first = sum(len(ids) for ids in ids_of[: places[-1]])
    prompt_tokens = sum(map(len, ids_of))
    tokens = ids_of[places[-1]]
    if tokenizer.decode_bytes(tokens) != text.encode():
        raise RequestError("this model's tokenizer does not keep the text as it is", "messages")
    return Passages(
        prompt_tokens=prompt_tokens,
        block_tokens=block_tokens,
        blocks=block_spans(tokens, first, prompt_tokens, tokenizer, block_tokens=block_tokens),
    )


def block_spans(
    tokens: Sequence[int], first: int, prompt_tokens: int, tokenizer: Tokenizer, *, block_tokens: int
) -> list[Span]:
    """Spans of a text whose tokens are the prompt's from position `first` on; empty where a block has none.

    A character whose bytes two blocks share belongs to the later one.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    spans: list[Span] = []
    end = 0
    for block_start in range(0, prompt_tokens, block_tokens):
        begin, stop = max(0, block_start - first), max(0, block_start + block_tokens - first)
        chars = decoder.decode(tokenizer.decode_bytes(tokens[begin:stop]))
        start, end = end, end + len(chars.encode("utf-16-le")) // 2
        spans.append((start, end))
    return spans
