"""Keeps a sequence's text inside a grammar: JSON of any shape, or of a schema; or calls of tools.

The grammar engine is llguidance; we hand it our tokenizer file and read back which tokens may come
next. A sequence that thinks first is free until its `</think>`, but can't end before.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import llguidance

from forepage.errors import RequestError
from forepage.text.dsml import DSML
from forepage.worker.call_grammar import call_grammar
from forepage.worker.request import Request

MAX_SCHEMA_CHARS = 1 << 18
FORMAT_FIELD, TOOLS_FIELD = "response_format", "tools"
SPACING = {"x-guidance": {"whitespace_pattern": r"[ \n\r\t]{0,64}"}}
"""Room to lay JSON out, but not to go on with spaces for ever; a schema may say otherwise for itself."""
MASK_BITS = 32
"""Masks come in words of so many tokens."""


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
        answer = None if request.json_schema is None else _schema(request.json_schema)
        matcher = None if answer is None else self._matcher(_json_grammar(answer), FORMAT_FIELD)
        kept_for_later = [self._eos]
        if request.forced_tools:
            if sum(len(tool.parameters) for tool in request.forced_tools) > MAX_SCHEMA_CHARS:
                raise RequestError(
                    f"the schemas have more than {MAX_SCHEMA_CHARS} characters in all", TOOLS_FIELD
                )
            dsml_id = self._dsml_id()
            try:
                grammar = call_grammar(
                    request.forced_tools, max_calls=request.max_calls, dsml_id=dsml_id, answer=answer
                )
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the schema of a tool can't be used: {error}", TOOLS_FIELD) from error
            matcher = self._matcher(grammar, TOOLS_FIELD)
            kept_for_later.append(dsml_id)
        if matcher is None:
            return None
        free = self._all_but(kept_for_later)
        constraint = Constraint(matcher, request.free_until, free)
        for token in request.answered:
            constraint.take(token)
        return constraint

    def _matcher(self, grammar: str, field: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.get_error():
            reason = matcher.get_error().splitlines()[0]  # then come the engine's state and the grammar
            raise RequestError(f"the schema can't be used: {reason}", field)
        return matcher

    def _dsml_id(self) -> int:
        ids = self._tokenizer.tokenize_str(DSML, parse_special=True)
        if len(ids) != 1:
            raise RequestError("this model's tokenizer has no control token for it", TOOLS_FIELD)
        return ids[0]

    def _all_but(self, tokens: list[int]) -> bytes:
        mask = bytearray(b"\xff" * (-(-self._vocab_size // MASK_BITS) * MASK_BITS // 8))
        for token in tokens:
            mask[token // 8] &= ~(1 << token % 8)
        return bytes(mask)


class Constraint:
    """One sequence's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, free_until: int | None, free: bytes) -> None:
        """Tokens are free up to and including `free_until`: all that are in the bitmap `free`."""
        self._matcher = matcher
        self._free_until = free_until
        self._free = free

    def mask(self) -> bytes:
        """Bitmap of the tokens that may come next."""
        if self._free_until is not None:
            return self._free
        mask: bytes = self._matcher.compute_bitmask()
        return mask

    @property
    def is_complete(self) -> bool:
        """Whether the text has ended: nothing but the end of sequence could follow."""
        return self._free_until is None and bool(self._matcher.is_stopped())

    @property
    def is_broken(self) -> bool:
        """Whether the engine gave up: what was said so far may be no whole text of the grammar."""
        return bool(self._matcher.is_error())

    def take(self, token: int) -> None:
        """A token was picked; it was allowed by the mask."""
        if self._free_until is None:
            self._matcher.consume_token(token)
        elif token == self._free_until:
            self._free_until = None


def _schema(text: str) -> dict[str, Any]:
    """The schema of a JSON answer. Raises: RequestError unless it is a JSON object of tolerable size."""
    if len(text) > MAX_SCHEMA_CHARS:
        raise RequestError(f"the schema has more than {MAX_SCHEMA_CHARS} characters", FORMAT_FIELD)
    try:
        schema = json.loads(text) or {"type": "object"}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the schema can't be used: {error}", FORMAT_FIELD) from error
    if not isinstance(schema, dict):
        raise RequestError("the schema can't be used: a JSON object is needed", FORMAT_FIELD)
    return SPACING | schema


def _json_grammar(schema: dict[str, Any]) -> str:
    try:
        grammar: str = llguidance.LLMatcher.grammar_from_json_schema(schema)
    except ValueError as error:
        raise RequestError(f"the schema can't be used: {error}", FORMAT_FIELD) from error
    return grammar
