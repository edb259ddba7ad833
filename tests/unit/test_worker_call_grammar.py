"""Calls that must come: the grammar lets through what the layout writes of earlier calls, nothing else."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forepage.errors import RequestError
from forepage.rpc import worker_pb2 as pb
from forepage.settings import SEEDED_MODEL, WorkerSettings
from forepage.text.answer_parser import AnswerParser, ArgumentsDelta, CallDelta, ContentDelta
from forepage.text.chat import _merged, encode_parts
from forepage.text.control_tokens import ControlToken
from forepage.text.dsml import BEFORE_CALLS, call_parts
from forepage.text.messages import ThinkingMode, ToolCall
from forepage.text.tokenizer import Tokenizer
from forepage.worker.constraint import Constraint, GrammarTokenizer
from forepage.worker.request import Request
from rigs.v4_tokenizer import v4_folder
from rigs.worker import worker_rig

# ruff: noqa: RUF001
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "a town"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F", 'a"<\n', None]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "kind": {"$ref": "#/$defs/Kind"},
        "hours": {"type": "array", "items": {"type": "number"}},
        "code": {"type": "string", "pattern": "^[a-z]{2}$"},
        "any": True,
    },
    "required": ["city", "kind"],
    "$defs": {"Kind": {"type": "string", "enum": ["rain", "wind"]}},
    "additionalProperties": False,
}
CLOCK: dict[str, Any] = {"type": "object", "properties": {}}
WHOLE: dict[str, Any] = {"type": "object", "properties": {'a"b': {"type": "boolean"}}, "required": ['a"b']}
TOOLS = {"weather": WEATHER, "clock": CLOCK, "whole": WHOLE}
GRAMMARS = {
    "bundled": (SEEDED_MODEL, GrammarTokenizer(SEEDED_MODEL, vocab_size=320, eos=257)),
    "v4": (v4_folder(), GrammarTokenizer(v4_folder(), vocab_size=129280, eos=1)),
}


def request(tools: dict[str, Any], **fields: Any) -> Request:
    offered = [pb.Tool(name=name, parameters=json.dumps(schema)) for name, schema in tools.items()]
    sampling = pb.Sampling(**{"max_tokens": 400, "temperature": 1.0} | fields, forced_tools=offered)
    message = pb.GenerateRequest(
        request_id="r", prompt_token_ids=list(b"Q"), sampling=sampling, ignore_eos=True
    )
    return Request.parse(message, WorkerSettings(), vocab_size=320, eos=257)


def constraint(model: str = "bundled", tools: dict[str, Any] = TOOLS, **fields: Any) -> Constraint:
    made = GRAMMARS[model][1].constraint_of(request(tools, **fields))
    assert made is not None
    return made


def allows(mask: bytes, token: int) -> bool:
    return bool(mask[token // 8] >> (token % 8) & 1)


def is_let_through(ids: list[int], made: Constraint) -> bool:
    """Whether each token may come in turn, and the text is whole behind the last."""
    for token in ids:
        if made.is_complete or not allows(made.mask(), token):
            return False
        made.take(token)
    return made.is_complete


def written(model: str, *calls: ToolCall) -> list[int]:
    """As the layout writes an earlier turn's calls."""
    return encode_parts(_merged([BEFORE_CALLS, *call_parts(calls)]), Tokenizer.load(GRAMMARS[model][0]))


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall("1", name, arguments)


GOOD = [
    call("clock"),
    call("weather", city="Paris", kind="rain"),
    call("weather", city="", days=3, unit="F", kind="wind"),
    call("weather", city="</b> <｜ \n</invoke>", unit=None, kind="wind"),
    call("weather", city="a", unit='a"<\n', note="n", kind="rain", hours=[1, 2.5]),
    call("weather", city="ü🙂", note=None, kind="rain", any={"a": [None, "b"]}),
]
BAD = [
    call("hammer"),
    call("clock", city="Paris"),
    call("weather", city="Paris"),
    call("weather", city=5, kind="rain"),
    call("weather", city="Paris", kind="snow"),
    call("weather", city="Paris", days=10, kind="rain"),
    call("weather", city="Paris", days="3", kind="rain"),
    call("weather", city="Paris", kind="rain", hours=["1"]),
    call("weather", city="Paris", kind="rain", size=1),
    call("weather", city="x</｜DSML｜parameter>", kind="rain"),
    call("whole"),
]


@pytest.mark.parametrize("model", GRAMMARS)
def test_calls_as_the_layout_writes_them_are_let_through(model: str) -> None:
    for one in GOOD:
        assert is_let_through(written(model, one), constraint(model, max_calls=1)), one
    both = written(model, GOOD[0], GOOD[1])
    made = constraint(model, max_calls=2)
    assert is_let_through(both, made)
    assert not is_let_through(both, constraint(model, max_calls=1))


@pytest.mark.parametrize("model", GRAMMARS)
@pytest.mark.parametrize("one", BAD, ids=lambda one: f"{one.name} {dict(one.arguments)}")
def test_other_calls_are_not(model: str, one: ToolCall) -> None:
    assert not is_let_through(written(model, one), constraint(model, max_calls=1))


def test_a_value_whose_whole_text_must_fit_is_json() -> None:
    """A pattern is kept by the JSON text; raw it would be any text."""
    mark = ControlToken.DSML
    for value, fits in (
        ('string="false">"ab"', True),
        ('string="false">"a1"', False),
        ('string="true">ab', False),
    ):
        lines = (("city", 'string="true">x'), ("kind", 'string="true">rain'), ("code", value))
        parts: list[Any] = [BEFORE_CALLS, "<", mark, "tool_calls>\n<", mark, 'invoke name="weather">\n']
        for name, how in lines:
            parts += ["<", mark, f'parameter name="{name}" {how}</', mark, "parameter>\n"]
        parts += ["</", mark, "invoke>\n</", mark, "tool_calls>"]
        ids = encode_parts(parts, Tokenizer.load(SEEDED_MODEL))
        assert is_let_through(ids, constraint(max_calls=1)) is fits, value


def parsed(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """What a gateway reads: content, and calls by name with their arguments."""
    parser = AnswerParser(ThinkingMode.CHAT, with_tools=True)
    content, calls = "", list[list[str]]()
    for delta in parser.feed(text) + parser.finish(complete=True):
        match delta:
            case ContentDelta():
                content += delta.text
            case CallDelta():
                calls.append([delta.name, ""])
            case ArgumentsDelta():
                calls[delta.index][1] += delta.text
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "on": {"type": "boolean"},
        "kind": {"enum": ["rain", "wind"]},
        "level": {"enum": [1, 2, 3]},
    },
    "required": ["kind"],
}


@pytest.mark.parametrize("seed", range(4))
def test_a_random_model_calls_what_it_must(seed: int) -> None:
    """Through the real loop: only the constraint can make these calls."""
    with worker_rig() as rig:
        asked = request({"gauge": SMALL, "clock": CLOCK}, seed=seed, max_calls=2)
        running = rig.submit_request(asked)
        running.sequence.constraint = GRAMMARS["bundled"][1].constraint_of(asked)
        rig.run(running)
    assert running.finished is not None
    assert running.finished.reason == pb.FINISH_REASON_STOP
    text = Tokenizer.load(SEEDED_MODEL).decode_bytes(running.tokens).decode()
    content, calls = parsed(text)
    assert content == ""
    assert 1 <= len(calls) <= 2
    for name, arguments in calls:
        if name == "gauge":
            assert arguments["kind"] in ("rain", "wind")
            assert arguments.get("on", True) in (True, False)
            assert arguments.get("level", 1) in (1, 2, 3)
        else:
            assert (name, arguments) == ("clock", {})


def test_json_or_calls_where_both_are_asked() -> None:
    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    for text in ('{"n": 5}', None):
        made = constraint(json_schema=schema, max_calls=1)
        ids = list(text.encode()) if text else written("bundled", call("clock"))
        assert is_let_through(ids, made)
    assert not allows(constraint(json_schema=schema).mask(), ord("a"))
    assert not allows(constraint().mask(), ord("{"))


def test_thinking_can_neither_end_the_answer_nor_call() -> None:
    end_think, dsml, eos = (Tokenizer.load(SEEDED_MODEL).token_id(name) for name in CONTROL)
    made = constraint(free_until_token_id=end_think)
    for token in (*b"hm", end_think):
        mask = made.mask()
        assert {item for item in range(320) if not allows(mask, item)} == {dsml, eos}
        made.take(token)
    assert not allows(made.mask(), ord("h"))


CONTROL = (ControlToken.END_THINK, ControlToken.DSML, ControlToken.EOS)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "wizard"}}},
        {"properties": {"a": {"$ref": "#/$defs/A"}}},
        {"type": "object", "properties": {"a": {"type": "string", "not": {}}}},
        {"properties": {"a": {"type": "string"}}, "x": "y" * (1 << 18)},
    ],
    ids=lambda schema: str(schema)[:60],
)
def test_a_schema_that_cannot_be_used_is_refused_by_field(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        constraint(tools={"f": schema})
    assert refused.value.param == "tools"


def test_an_engine_that_gives_up_ends_the_request_with_an_error() -> None:
    """Half a call must not pass for a whole one."""
    with worker_rig() as rig:
        asked = request({"clock": CLOCK})
        running = rig.submit_request(asked)
        made = running.sequence.constraint = GRAMMARS["bundled"][1].constraint_of(asked)
        assert made is not None
        made.take(ord("x"))  # nothing that the mask allows
        rig.run(running)
    assert running.failed is not None
    assert "schema" in running.failed.message


@settings(max_examples=60, deadline=None)
@given(city=st.text(max_size=30), days=st.none() | st.integers(1, 9), note=st.none() | st.text(max_size=10))
def test_any_text_is_let_through_and_comes_back(city: str, days: int | None, note: str | None) -> None:
    arguments: dict[str, Any] = {"city": city}
    if days is not None:
        arguments["days"] = days
    one = call("weather", **arguments, note=note, kind="rain")
    ids = written("bundled", one)
    assert is_let_through(ids, constraint(max_calls=1))
    text = Tokenizer.load(SEEDED_MODEL).decode_bytes(ids).decode()
    assert parsed(text) == ("", [("weather", dict(one.arguments))])
