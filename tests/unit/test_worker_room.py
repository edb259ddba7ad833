"""Full by room: kept while nobody waits, paged for one who does, and back when there is room again."""

from functools import cache
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from forepage.settings import ResidencyMode
from forepage.telemetry import Attr, MetricName
from forepage.worker.full_by_room import who_leaves
from forepage.worker.quota import Quota
from forepage.worker.sequence import Room
from rigs.gateways import data_points
from rigs.worker import Running, WorkerRig, decode_until, text_tokens, wants, worker_rig

PROMPT = text_tokens(2_100)
LOOKAHEAD, GUARDED, EXACT, FULL = (
    ResidencyMode.LOOKAHEAD,
    ResidencyMode.GUARDED,
    ResidencyMode.EXACT,
    ResidencyMode.FULL,
)
GUEST = text_tokens(300, 3)
BLOCKS = 11
"""Of a prompt of 2,100 tokens and the 600 that follow."""


def pool_bytes(rig: WorkerRig, blocks: int) -> int:
    """kv_bytes with so many key blocks, and more row blocks than that."""
    return int(blocks * rig.parts.geometry.keys_bytes / rig.parts.settings.key_share) + 1


def sizes(blocks: int) -> dict[str, Any]:
    """Settings of a worker with so many key blocks, where paging a sequence of BLOCKS frees three."""
    with worker_rig() as rig:
        kv_bytes = pool_bytes(rig, blocks)
    return {"kv_bytes": kv_bytes, "escalation_reserve_bytes": 0, "load_slack_blocks": 1}


def row_sizes(rows: int) -> dict[str, Any]:
    """Settings of a worker with so many row blocks, and keys and c128 rows enough for all."""
    with worker_rig(kv_format="fp32") as rig:
        geometry = rig.parts.geometry
    keys, c128 = 6 * BLOCKS * geometry.keys_bytes, 6 * BLOCKS * geometry.c128_bytes
    kv_bytes = rows * geometry.rows_bytes + keys + c128 + 2
    shares = {"key_share": keys / kv_bytes, "c128_share": c128 / kv_bytes}
    return {"kv_bytes": kv_bytes, "escalation_reserve_bytes": 0, "load_slack_blocks": 1} | shares


@cache
def tokens_of_full(max_tokens: int) -> list[int]:
    with worker_rig(kv_bytes=64 << 20, kv_format="fp32") as rig:
        full = rig.submit(PROMPT, mode=FULL, max_tokens=max_tokens)
        rig.run(full)
        return full.tokens


def room_of(running: Running) -> Room:
    return running.sequence.room


def values(metrics: InMemoryMetricReader, name: MetricName) -> dict[Any, Any]:
    return {point.attributes[Attr.REASON]: point.value for point in data_points(metrics, name)}


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("mode", [LOOKAHEAD, GUARDED])
def test_with_room_nothing_is_dropped_and_nothing_asked(mode: ResidencyMode, ahead: int) -> None:
    with worker_rig(full_share=1.0, ahead_steps=ahead, padded=bool(ahead)) as rig:
        rig.index.auto = wants(1, 3)
        full = rig.submit(PROMPT, mode=FULL, max_tokens=40, salt="a")
        rig.run(full)
        running = rig.submit(PROMPT, mode=mode, max_tokens=40, salt="b")
        rig.run(running)
        assert running.tokens == full.tokens
        assert rig.index.questions == []
        assert running.report.full_steps == 39
        assert running.report.full_by_room
        assert not running.report.full_by_size
        rig.check_baseline()


def test_one_that_asks_to_page_is_paged_although_there_is_room() -> None:
    with worker_rig(full_share=1.0) as rig:
        rig.index.auto = wants(1, 3)
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=40, asks_to_page=True)
        rig.run(running)
        assert not running.report.full_by_room
        assert running.report.full_steps == 0
        rig.check_baseline()


@pytest.mark.parametrize("ahead", [0, 1])
def test_exact_leaves_full_by_dropping_returns_by_loading_and_gives_the_tokens_of_full(ahead: int) -> None:
    metrics = InMemoryMetricReader()
    settings: dict[str, Any] = {
        "ahead_steps": ahead,
        "padded": bool(ahead),
        "kv_format": "fp32",
        "full_share": 1.0,
    }
    with worker_rig(metrics=metrics, **settings, **row_sizes(10)) as rig:  # it takes 9, paged 8, a guest 2
        rig.index.auto = wants(3)
        moving = rig.submit(PROMPT, mode=EXACT, max_tokens=120, budget_blocks=1, name="moving")
        sequence = moving.sequence
        decode_until(rig, moving, 5)
        assert room_of(moving) is Room.KEPT
        assert sequence.holds.staging_ids == []
        for at in range(2):
            guest = rig.submit(GUEST, mode=FULL, max_tokens=10, name=f"guest-{at}", salt=f"guest-{at}")
            rig.run_until(lambda one=guest: one.sequence.device is not None)  # type: ignore[misc]
            assert room_of(moving) is Room.PAGED
            assert not sequence.resident.rows_complete
            assert sequence.resident.keys_complete
            assert len(sequence.holds.staging_ids) == rig.parts.blocks.staging_blocks
            rig.run_until(lambda one=guest: one.is_over)  # type: ignore[misc]
            rig.run_until(lambda: room_of(moving) is Room.KEPT)
            assert sequence.resident.rows_complete
            assert sequence.holds.staging_ids == []
        rig.run(moving)
        assert moving.tokens == tokens_of_full(120)
        report, geometry = moving.report, rig.parts.geometry
        assert report.full_steps > 0 < report.exact_steps
        assert report.paged_steps == 0
        assert values(metrics, MetricName.ROOM_MOVES) == {"kept": 1, "left": 2, "returned": 2}
        moved = values(metrics, MetricName.ROOM_BYTES)
        assert moved["dropped"] % geometry.rows_bytes == moved["loaded"] % geometry.rows_bytes == 0
        assert 0 < moved["dropped"] <= moved["loaded"], (
            "what left came back, and was joined by what aged meanwhile"
        )
        times = data_points(metrics, MetricName.ROOM_MOVE_TIME)
        assert {point.attributes[Attr.REASON]: point.count for point in times} == {"left": 2, "returned": 2}
        prompts = len(PROMPT) + 2 * len(GUEST)
        assert sum(point.value for point in data_points(metrics, MetricName.PREFILL_TOKENS)) == prompts
        rig.check_baseline()


@pytest.mark.parametrize(
    ("lack", "gains", "leave"),
    [
        (Quota(0, 0), [(5, 5)], []),
        (Quota(4, 4), [(3, 3), (5, 5), (4, 4)], [1]),
        (Quota(4, 4), [(2, 2), (3, 3), (2, 2)], [1, 0]),
        (Quota(4, 0), [(1, 9), (4, 0)], [1]),
        (Quota(4, 1), [(9, 0), (0, 2), (3, 0)], [0, 1]),
        (Quota(9, 9), [(2, 2), (3, 3)], []),
        (Quota(1, 1), [(9, 0), (7, 0)], []),
        (Quota(1, 0), [], []),
    ],
)
def test_as_many_leave_as_make_up_for_what_is_lacking_or_nobody(
    lack: Quota, gains: list[tuple[int, int]], leave: list[int]
) -> None:
    assert who_leaves(lack, {key: Quota(*gain) for key, gain in enumerate(gains)}) == leave


def test_nobody_leaves_for_a_request_that_lacks_something_else() -> None:
    """There are blocks enough, but no slot."""
    with worker_rig(full_share=1.0, max_running=1, admission_timeout_s=600.0) as rig:
        rig.index.auto = wants(1, 3)
        first = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=40, name="first")
        decode_until(rig, first, 5)
        second = rig.submit(GUEST, mode=FULL, max_tokens=4, name="second", salt="other")
        rig.run(first, second)
        assert first.report.full_steps == 39
        assert second.finished is not None


@pytest.mark.parametrize("ahead", [0, 1])
def test_one_that_waits_for_blocks_gets_them_and_when_it_is_gone_the_other_returns(ahead: int) -> None:
    """Room for one in full and one paged: the first leaves `full` for the second, and comes back after it."""
    with worker_rig(full_share=1.0, ahead_steps=ahead, padded=bool(ahead), **sizes(BLOCKS + 6)) as rig:
        rig.index.auto = wants(1, 3)
        first = rig.submit(PROMPT, mode=GUARDED, max_tokens=600, name="first")
        decode_until(rig, first, 5)
        assert first.sequence.room is Room.KEPT
        second = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=20, name="second", salt="other")
        rig.run_until(lambda: second.is_over)
        assert second.finished is not None, second.failed
        assert first.sequence.room is not Room.KEPT
        assert first.sequence.report.paged_steps > 0
        rig.run_until(lambda: first.sequence.room is Room.KEPT)
        assert first.sequence.resident.rows_complete
        assert first.sequence.resident.keys_complete
        rig.run(first)
        report = first.report
        assert report.full_steps > 0 < report.paged_steps
        assert report.full_steps + report.paged_steps == 599
        assert report.demand_bytes == 0
        rig.check_baseline()


def test_without_an_index_it_leaves_by_what_it_holds() -> None:
    with worker_rig(full_share=1.0, **sizes(BLOCKS + 6)) as rig:
        first = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=200, name="first")
        decode_until(rig, first, 5)
        rig.index.is_up = False
        second = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=20, name="second", salt="other")
        rig.run(first, second)
        assert first.finished is not None
        assert second.finished is not None
        assert first.report.paged_steps > 0
        rig.check_baseline()
