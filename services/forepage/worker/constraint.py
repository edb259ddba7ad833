"""Keeps a sequence's text inside a grammar: JSON of any shape, or of a schema. Token by token.

The grammar engine is llguidance; we hand it our tokenizer file and read back which tokens may come
next. A sequence that thinks first is free until its `</think>`.
"""

import json
from functools import cached_property
from pathlib import Path

import llguidance

from forepage.errors import RequestError
from forepage.worker.request import Request

MAX_SCHEMA_CHARS = 1 << 18
FIELD = "response_format"


class GrammarTokenizer:
    """llguidance's view of one tokenizer file, made when a constraint is first asked for."""

    def __init__(self, folder: Path, *, vocab_size: int, eos: int) -> None:
        """`vocab_size` is the model's: masks have a bit for each of its logits."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos = eos

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
        return llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos)

    def constraint_of(self, request: Request) -> "Constraint | None":
        """What the request wants its text to be. Raises: RequestError for a schema that can't be used."""
        if request.json_schema is None:
            return None
        if len(request.json_schema) > MAX_SCHEMA_CHARS:
            raise RequestError(f"the schema has more than {MAX_SCHEMA_CHARS} characters", FIELD)
        try:
            schema = json.loads(request.json_schema) or {"type": "object"}
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        except ValueError as error:
            raise RequestError(f"the schema can't be used: {error}", FIELD) from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar)
        if matcher.get_error():
            raise RequestError(f"the schema can't be used: {matcher.get_error()}", FIELD)
        return Constraint(matcher, request.free_until)


class Constraint:
    """One sequence's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, free_until: int | None) -> None:
        """Tokens are free up to and including `free_until`."""
        self._matcher = matcher
        self._free_until = free_until

    def mask(self) -> bytes | None:
        """Bitmap of the tokens that may come next, none while it is free."""
        if self._free_until is not None:
            return None
        mask: bytes = self._matcher.compute_bitmask()
        return mask

    @property
    def is_complete(self) -> bool:
        """Whether the text has ended: nothing but the end of sequence could follow."""
        return self._free_until is None and bool(self._matcher.is_stopped())

    def take(self, token: int) -> None:
        """A token was picked; it was allowed by the mask."""
        if self._free_until is None:
            self._matcher.consume_token(token)
        elif token == self._free_until:
            self._free_until = None
