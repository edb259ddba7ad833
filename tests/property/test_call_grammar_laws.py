"""Whatever the schema and whatever is picked: a call that came to its end has arguments that fit."""

import json
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from forepage.rpc import worker_pb2 as pb
from forepage.settings import SEEDED_MODEL, WorkerSettings
from forepage.text.answer_parser import AnswerParser, ArgumentsDelta, CallDelta
from forepage.text.control_tokens import ControlToken
from forepage.text.messages import ThinkingMode
from forepage.text.tokenizer import Tokenizer
from forepage.worker.constraint import Constraint, GrammarTokenizer
from forepage.worker.request import Request

VOCAB, EOS = 320, 257
GRAMMAR = GrammarTokenizer(SEEDED_MODEL, vocab_size=VOCAB, eos=EOS)
TOKENIZER = Tokenizer.load(SEEDED_MODEL)
DSML = TOKENIZER.token_id(ControlToken.DSML)
CLOSING = b'<"}]'
"""Picked more often than others, so that texts and lists come to an end."""
STEERED = {ord("<"): ord("/"), ord("/"): DSML}
"""What mostly follows what, where it may."""
MAX_TOKENS = 4000

VALUES = ["a", "b c", "</x>", "\n", '"', 1, 2.5, None, True]
properties = st.one_of(
    st.just({"type": "string"}),
    st.just({"type": "string", "minLength": 2, "maxLength": 3}),
    st.just({"type": "integer", "minimum": -5, "maximum": 5}),
    st.just({"type": ["string", "null"]}),
    st.just({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}),
    st.just({"anyOf": [{"enum": ["x", "y"]}, {"type": "boolean"}]}),
    st.just({"$ref": "#/$defs/Kind"}),
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=4, unique_by=repr).map(
        lambda some: {"enum": some}
    ),
    st.sampled_from(VALUES).map(lambda value: {"const": value}),
)
names = st.sampled_from(["alpha", "b-2", "c d", "é", "x.y", 'say "so"'])
KIND = {"type": "string", "enum": ["rain", "wind"]}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Of the schemas above."""
    if "$ref" in schema:
        return fits(value, KIND)
    if "anyOf" in schema:
        return any(fits(value, branch) for branch in schema["anyOf"])
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if allowed is not None:
        return any(value == one and type(value) is type(one) for one in allowed)
    match schema["type"]:
        case list() as types:
            return any(fits(value, {"type": kind}) for kind in types)
        case "string":
            is_text = isinstance(value, str)
            return is_text and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", MAX_TOKENS)
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "array":
            return isinstance(value, list) and len(value) <= 2 and all(isinstance(one, bool) for one in value)
        case _:
            return value is None


def picked(constraint: Constraint, pick: random.Random) -> bytes | None:
    """A text that the constraint lets through, to its end; None if that does not come."""
    tokens: list[int] = []
    while len(tokens) < MAX_TOKENS:
        mask = constraint.mask()
        allowed = [token for token in range(VOCAB) if mask[token // 8] >> (token % 8) & 1]
        assert allowed, TOKENIZER.decode_bytes(tokens)
        closing = [token for token in CLOSING if token in allowed]
        steered = STEERED.get(tokens[-1]) if tokens else None
        if steered in allowed and pick.random() < 0.8:
            closing = [steered]
        tokens.append(pick.choice(closing if closing and pick.random() < 0.6 else allowed))
        constraint.take(tokens[-1])
        assert not constraint.is_broken
        if constraint.is_complete:
            return TOKENIZER.decode_bytes(tokens)
    return None


@settings(max_examples=60, deadline=None)
@given(declared=st.dictionaries(names, properties, max_size=4), seed=st.integers(0, 2**32), data=st.data())
def test_arguments_of_a_finished_call_fit(
    declared: dict[str, dict[str, Any]], seed: int, data: st.DataObject
) -> None:
    required = data.draw(st.lists(st.sampled_from(sorted(declared)), unique=True)) if declared else []
    schema = {"type": "object", "properties": declared, "required": required, "$defs": {"Kind": KIND}}
    tool = pb.Tool(name="f", parameters=json.dumps(schema | {"additionalProperties": False}))
    sampling = pb.Sampling(max_tokens=8, forced_tools=[tool], max_calls=1)
    message = pb.GenerateRequest(request_id="r", prompt_token_ids=[65], sampling=sampling)
    constraint = GRAMMAR.constraint_of(Request.parse(message, WorkerSettings(), vocab_size=VOCAB, eos=EOS))
    assert constraint is not None
    text = picked(constraint, random.Random(seed))
    assert text is not None
    parser = AnswerParser(ThinkingMode.CHAT, with_tools=True)
    deltas = parser.feed(text.decode()) + parser.finish(complete=True)
    assert [delta.name for delta in deltas if isinstance(delta, CallDelta)] == ["f"]
    arguments = json.loads("".join(delta.text for delta in deltas if isinstance(delta, ArgumentsDelta)))
    assert set(required) <= set(arguments) <= set(declared)
    for name, value in arguments.items():
        assert fits(value, declared[name]), (name, value)
