"""Requests are checked field by field; each refusal names the field."""

import struct
from typing import Any

import numpy as np
import pytest

from forepage.coldpool.records import SlotRef
from forepage.errors import DeadlineError, RequestError
from forepage.index.deadline import Deadline
from forepage.index.question import QuestionLimits, parse_request
from forepage.rpc import index_pb2 as pb

LIMITS = QuestionLimits(
    max_blocks=16,
    max_position=4096,
    num_c4_layers=3,
    index_heads=2,
    index_dims=4,
    num_target_layers=2,
    hidden_size=8,
    default_threshold=0.4,
)
NUM_BLOCKS = 11


def floats(count: int, **places: float) -> bytes:
    values = np.arange(count, dtype="<f4")
    for place, value in places.items():
        values[int(place[1:])] = value
    return values.tobytes()


def request(**fields: Any) -> pb.LookaheadRequest:
    good: dict[str, Any] = {
        "stamp": pb.Stamp(sequence_id="s", incarnation=2, interval=3),
        "num_tokens": 3000,
        "arena_ids": struct.pack("<11I", *range(100, 111)),
        "generations": struct.pack("<11Q", *range(2**62, 2**62 + 11)),
    }
    return pb.LookaheadRequest(**{**good, **fields})


def predict(**fields: Any) -> pb.Predict:
    good: dict[str, Any] = {
        "num_candidates": 9,
        "budget_blocks": 5,
        "position": 2999,
        "hidden": floats(16),
    }
    return pb.Predict(**{**good, **fields})


def audit(**fields: Any) -> pb.Audit:
    good: dict[str, Any] = {
        "layer_idx": 2,
        "position": 2990,
        "query": floats(8),
        "weights": floats(2),
        "resident": bytes([0b1010_0101, 0b0000_0010]),
        "resident_scores": floats(5),
        "topk": 32,
    }
    return pb.Audit(**{**good, **fields})


def test_request_becomes_checked_values() -> None:
    question = parse_request(request(predict=predict(), audits=[audit()]), LIMITS)
    assert question.stamp.incarnation == 2
    assert question.blocks[0] == SlotRef(type(question.blocks[0].arena_id)(100), 2**62)
    assert len(question.blocks) == NUM_BLOCKS
    assert question.prediction is not None
    assert question.prediction.hidden.tolist()[1] == list(range(8, 16))
    assert question.prediction.threshold == pytest.approx(0.4)
    asked = question.audits[0]
    assert asked.absent_blocks == (1, 3, 4, 6, 8, 10)  # bits count from the lowest of byte 0
    assert asked.query.shape == (2, 4)
    assert asked.resident_scores == (0.0, 1.0, 2.0, 3.0, 4.0)


def test_threshold_of_the_request_wins() -> None:
    question = parse_request(request(predict=predict(threshold=0.0)), LIMITS)
    assert question.prediction is not None
    assert question.prediction.threshold == 0.0


def test_padding_of_resident_scores_is_dropped() -> None:
    padded = audit(resident_scores=floats(4, _1=-np.inf, _3=-np.inf))
    assert parse_request(request(audits=[padded]), LIMITS).audits[0].resident_scores == (0.0, 2.0)


def test_sequence_without_finished_blocks_is_fine() -> None:
    empty = request(arena_ids=b"", generations=b"", predict=predict(num_candidates=0))
    assert parse_request(empty, LIMITS).blocks == ()


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (request(), "predict"),
        (request(predict=predict(), arena_ids=bytes(43)), "arena_ids"),
        (request(predict=predict(), arena_ids=bytes(4 * 17), generations=bytes(8 * 17)), "arena_ids"),
        (request(predict=predict(), generations=bytes(87)), "generations"),
        (request(predict=predict(), generations=bytes(80)), "generations"),
        (request(predict=predict(num_candidates=12)), "predict.num_candidates"),
        (request(predict=predict(position=4096)), "predict.position"),
        (request(predict=predict(hidden=floats(15))), "predict.hidden"),
        (request(predict=predict(hidden=bytes(63))), "predict.hidden"),
        (request(predict=predict(hidden=floats(16, _3=np.nan))), "predict.hidden"),
        (request(predict=predict(hidden=floats(16, _3=-np.inf))), "predict.hidden"),
        (request(predict=predict(threshold=1.5)), "predict.threshold"),
        (request(predict=predict(threshold=np.nan)), "predict.threshold"),
        (request(audits=[audit(), audit(layer_idx=3)]), "audits[1].layer_idx"),
        (request(audits=[audit(topk=0)]), "audits[0].topk"),
        (request(audits=[audit(position=2**40)]), "audits[0].position"),
        (request(audits=[audit(resident=bytes(1))]), "audits[0].resident"),
        (request(audits=[audit(resident=bytes(3))]), "audits[0].resident"),
        (request(audits=[audit(query=floats(9))]), "audits[0].query"),
        (request(audits=[audit(query=floats(8, _0=np.inf))]), "audits[0].query"),
        (request(audits=[audit(weights=floats(1))]), "audits[0].weights"),
        (request(audits=[audit(weights=floats(2, _1=np.nan))]), "audits[0].weights"),
        (request(audits=[audit(resident_scores=bytes(5))]), "audits[0].resident_scores"),
        (request(audits=[audit(resident_scores=floats(2, _1=np.nan))]), "audits[0].resident_scores"),
        (request(audits=[audit(resident_scores=floats(2, _1=np.inf))]), "audits[0].resident_scores"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_request_is_refused_by_field(bad: pb.LookaheadRequest, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(bad, LIMITS)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


def test_deadline_counts_from_its_start() -> None:
    now = 100.0
    deadline = Deadline.after_ms(1500, lambda: now)
    assert deadline.remaining_s() == 1.5
    deadline.check()
    now = 101.6
    assert deadline.remaining_s() == 0.0
    with pytest.raises(DeadlineError, match="deadline_ms"):
        deadline.check()


def test_no_deadline_never_passes() -> None:
    deadline = Deadline.after_ms(0, lambda: 1e12)
    assert deadline.remaining_s() is None
    deadline.check()
