"""Full by room: kept while nobody waits, paged for one who does, and back when there is room again."""

from typing import Any

import pytest

from forepage.settings import ResidencyMode
from forepage.worker.sequence import Room
from rigs.worker import WorkerRig, decode_until, text_tokens, wants, worker_rig

PROMPT = text_tokens(2_100)
LOOKAHEAD, GUARDED, EXACT, FULL = (
    ResidencyMode.LOOKAHEAD,
    ResidencyMode.GUARDED,
    ResidencyMode.EXACT,
    ResidencyMode.FULL,
)
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
        assert running.report.full_by_size
        rig.check_baseline()


def test_exact_by_request_is_never_kept() -> None:
    with worker_rig(full_share=1.0) as rig:
        rig.index.auto = wants(1, 3)
        running = rig.submit(PROMPT, mode=EXACT, max_tokens=20)
        rig.run(running)
        assert running.report.exact_steps == 19


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
