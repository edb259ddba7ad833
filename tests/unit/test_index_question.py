"""Requests are checked field by field; each refusal names the field."""

import struct
from typing import Any

import numpy as np
import pytest

from forepage.coldpool.records import SlotRef
from forepage.errors import DeadlineError, RequestError
from forepage.index.deadline import Deadline
from forepage.index.question import parse_request
from forepage.rpc import index_pb2 as pb
from rigs.index_limits import LIMITS

NUM_BLOCKS = 11


def floats(count: int, **places: float) -> bytes:
    values = np.arange(count, dtype="<f4")
    for place, value in places.items():
        values[int(place[1:])] = value
    return values.tobytes()


def entries(*values: int) -> bytes:
    return np.array(values, dtype="<u4").tobytes()


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
        "resident_entries": entries(0, 140, 746, 63, 383),  # blocks 0, 2, 11 (after the bitmap's), 0 and 5
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
    assert asked.resident == ((0, 0.0), (140, 1.0), (746, 2.0), (63, 3.0), (383, 4.0))


def test_threshold_of_the_request_wins() -> None:
    question = parse_request(request(predict=predict(threshold=0.0)), LIMITS)
    assert question.prediction is not None
    assert question.prediction.threshold == 0.0


def test_padding_is_dropped_with_its_entry_whatever_that_is() -> None:
    padded = audit(
        resident_scores=floats(4, _1=-np.inf, _3=-np.inf),
        resident_entries=entries(5, 2**32 - 1, 9, 2**32 - 1),
    )
    assert parse_request(request(audits=[padded]), LIMITS).audits[0].resident == ((5, 0.0), (9, 2.0))


def test_entries_of_the_newest_blocks_are_fine_up_to_the_last_visible() -> None:
    """Position 2990 sees entries 0..746; the bitmap ends with block 10, entry 703."""
    last = audit(resident_scores=floats(2), resident_entries=entries(704, 746))
    assert parse_request(request(audits=[last]), LIMITS).audits[0].resident == ((704, 0.0), (746, 1.0))


def test_audit_in_which_nothing_is_resident_is_fine() -> None:
    none = audit(resident=bytes(2), resident_scores=b"", resident_entries=b"")
    asked = parse_request(request(audits=[none]), LIMITS).audits[0]
    assert asked.resident == ()
    assert asked.absent_blocks == tuple(range(11))


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
        (request(audits=[audit(resident_scores=floats(4))]), "audits[0].resident_entries"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_request_is_refused_by_field(bad: pb.LookaheadRequest, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(bad, LIMITS)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"", "0 bytes, wanted 20 for 5 scores"),
        (bytes(19), "19 bytes, wanted 20"),
        (entries(0, 1, 2, 3, 747), "747 is not visible, 747 entries are"),
        (entries(0, 1, 2, 3, 2**32 - 1), "4294967295 is not visible"),
        (entries(0, 1, 2, 3, 64), "64 is in block 1, which is absent"),
        (entries(0, 1, 2, 3, 703), "703 is in block 10, which is absent"),
        (entries(0, 1, 2, 704, 704), "names an entry twice"),
    ],
)
def test_malformed_entries_are_refused_with_the_reason(bad: bytes, why: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(request(audits=[audit(), audit(resident_entries=bad)]), LIMITS)
    assert caught.value.param == "audits[1].resident_entries"
    assert why in caught.value.message


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
