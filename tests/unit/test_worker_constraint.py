"""Constrained JSON through the real loop: whatever a random model wants to say, the text is JSON."""

import json

import pytest

from forepage.errors import RequestError
from forepage.rpc import worker_pb2 as pb
from forepage.settings import SEEDED_MODEL, WorkerSettings
from forepage.worker.constraint import GrammarTokenizer
from forepage.worker.request import Request
from rigs.worker import WorkerRig, worker_rig

EOS, END_OF_THINKING = 257, 262
GRAMMAR = GrammarTokenizer(SEEDED_MODEL, vocab_size=320, eos=EOS)
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["row", "key"]},
        "count": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["kind", "count"],
    "additionalProperties": False,
}


def request(schema: str, **fields: object) -> Request:
    sampling = pb.Sampling(max_tokens=200, temperature=1.0, seed=3, json_schema=schema, **fields)  # type: ignore[arg-type]
    message = pb.GenerateRequest(
        request_id="r", prompt_token_ids=list(b"JSON: "), sampling=sampling, ignore_eos=True
    )
    return Request.parse(message, WorkerSettings(), vocab_size=320, eos=EOS)


def generated(rig: WorkerRig, asked: Request) -> list[int]:
    running = rig.submit_request(asked)
    running.sequence.constraint = GRAMMAR.constraint_of(asked)
    rig.run(running)
    assert running.finished is not None
    assert running.finished.reason == pb.FINISH_REASON_STOP
    return running.tokens


def test_text_is_json_of_the_schema() -> None:
    with worker_rig() as rig:
        tokens = generated(rig, request(json.dumps(SCHEMA)))
    value = json.loads(bytes(token for token in tokens if token < 256))
    assert value["kind"] in ("row", "key")
    assert 0 <= value["count"] <= 99


def test_thinking_is_free_until_its_end() -> None:
    """Anything but the end may be thought, until the token that ends the thinking."""
    constraint = GRAMMAR.constraint_of(request("{}", free_until_token_id=END_OF_THINKING))
    assert constraint is not None
    for token in (*b"hm", END_OF_THINKING):
        mask = constraint.mask()
        assert mask[token // 8] >> (token % 8) & 1
        assert not mask[EOS // 8] >> (EOS % 8) & 1, "an answer that ends in its thinking is no JSON"
        constraint.take(token)
    mask = constraint.mask()
    assert mask[ord("{") // 8] >> (ord("{") % 8) & 1
    assert not mask[ord("h") // 8] >> (ord("h") % 8) & 1


def test_json_is_laid_out_but_spaces_do_not_go_on_for_ever() -> None:
    for indent in (4, 0, None):
        constraint = GRAMMAR.constraint_of(request("{}"))
        assert constraint is not None
        for byte in json.dumps({"a": [1, {"b": None}]}, indent=indent).encode():
            mask = constraint.mask()
            assert mask[byte // 8] >> (byte % 8) & 1, (indent, chr(byte))
            constraint.take(byte)
    constraint = GRAMMAR.constraint_of(request("{}"))
    assert constraint is not None
    constraint.take(ord("{"))
    for _ in range(64):
        constraint.take(ord(" "))
    assert not constraint.is_broken
    assert not constraint.mask()[ord(" ") // 8] >> (ord(" ") % 8) & 1


@pytest.mark.parametrize("schema", ["{", '{"type": "wizard"}', '"' + "x" * (1 << 18) + '"'])
def test_a_schema_that_cannot_be_used_is_refused_by_field(schema: str) -> None:
    with pytest.raises(RequestError) as refused:
        GRAMMAR.constraint_of(request(schema))
    assert refused.value.param == "response_format"
