"""What the worker does when records, the cold pool manager, room or the worker itself go away."""

from typing import Any

import pytest

from forepage.coldpool.client import Reattached
from forepage.errors import ContextLengthError
from forepage.settings import ResidencyMode
from forepage.worker.arena_access import GrantRequest
from forepage.worker.sequence import Phase
from rigs.worker import Running, decode_until, text_tokens, worker_rig

PROMPT = text_tokens(1_300)
FULL, LOOKAHEAD, GUARDED, EXACT = ResidencyMode.FULL, *list(ResidencyMode)[1:3], ResidencyMode.EXACT


def test_slots_that_were_being_written_when_the_manager_was_lost_end_the_request() -> None:
    with worker_rig() as rig:
        running = rig.submit(PROMPT, max_tokens=60)
        rig.run_until(lambda: running.sequence.phase is Phase.PREFILL)
        rig.arena.is_down = True
        decode_until(rig, running, 2)
        lost = running.sequence.arena.writing[0]
        rig.loop.take_reattached(Reattached(void=(lost,), new_arena=None))
        rig.run_until(lambda: running.is_over)
        assert running.failed is not None
        assert running.failed.code == "dependency_unavailable"
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def test_publications_are_not_tried_again_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    with worker_rig() as rig:
        calls: list[int] = []
        publish = rig.arena.publish

        def counted(records: Any, span: Any) -> Any:
            calls.append(len(records))
            return publish(records, span)

        monkeypatch.setattr(rig.arena, "publish", counted)
        running = rig.submit(text_tokens(600), max_tokens=40)
        rig.run_until(lambda: running.sequence.phase is Phase.PREFILL)
        rig.arena.is_down = True
        decode_until(rig, running, 30)
        seconds = 30 * 0.2  # far more than the steps take
        assert len(calls) <= 2 * (1 + seconds / 0.25)
        for _ in range(200):
            rig.loop.turn()
            if running.is_over:
                break
        rig.arena.is_down = False
        rig.run(running)
        rig.check_baseline()


def test_a_refused_request_ends_its_span_and_holds_nothing() -> None:
    with worker_rig(kv_bytes=1 << 20) as rig:
        running = rig.submit(text_tokens(8_000), max_tokens=4)
        rig.run(running)
        assert running.failed is not None
        assert running.sequence.released.is_set()
        assert not running.sequence.span.is_recording()


def test_a_request_whose_resume_records_can_never_fit_is_refused_at_once() -> None:
    with worker_rig(kv_bytes=64 << 20, resume_every_tokens=256) as rig:
        running = rig.submit([65] * 30_000, max_tokens=4)
        rig.loop.turn()
        assert running.failed is not None
        assert running.failed.code == ContextLengthError.code
        assert "arena slots" in running.failed.message


def test_requests_that_the_arena_refused_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    with worker_rig() as rig:
        rig.arena.is_down = True
        running = [rig.submit(text_tokens(300, seed), max_tokens=2, name=str(seed)) for seed in (0, 1)]
        rig.run_until(lambda: all(one.sequence.last_refusal for one in running))
        rig.run_until(lambda: rig.loop.num_waiting == 2)
        asked: list[bytes] = []
        grant = rig.arena.grant

        def noting(request: GrantRequest, span: Any) -> Any:
            asked.extend(request.block_keys)
            return grant(request, span)

        monkeypatch.setattr(rig.arena, "grant", noting)
        rig.arena.is_down = False
        rig.run(*running)
        assert asked == [one.sequence.block_key(0, rig.parts.geometry) for one in running]


def refused(running: Running) -> bool:
    """It got one event, a typed error that another worker can make good, and holds nothing."""
    assert running.failed is not None
    assert len(running.events) == 1
    return running.failed.code == "dependency_unavailable" and running.sequence.released.is_set()


def test_a_worker_that_has_stopped_refuses_what_comes_after() -> None:
    """Its thread has ended: nobody reads a message any more."""
    with worker_rig() as rig:
        rig.loop.start()
        rig.loop.stop(5.0)
        assert not rig.loop.is_running
        assert refused(rig.submit(PROMPT))


def test_a_request_that_nobody_read_before_the_worker_gave_up_is_refused() -> None:
    with worker_rig() as rig:
        before = rig.submit(PROMPT)
        assert before.events == []
        rig.loop.give_up(ValueError("broken"))
        assert refused(before)
        assert refused(rig.submit(PROMPT))


def test_a_request_read_while_the_worker_gives_up_is_refused() -> None:
    """Taken from the inbox before, entered after everybody was told."""
    with worker_rig() as rig:
        running = rig.submit(PROMPT)
        rig.loop.broken = ValueError("broken")
        rig.run_until(lambda: rig.loop.num_sequences == 0 and running.is_over)
        assert refused(running)


def test_a_loop_that_breaks_refuses_what_waits() -> None:
    """A law breaks in the message before: the request behind it is told."""

    def breaks() -> None:
        raise ValueError("a law")

    with worker_rig() as rig:
        rig.loop.post(breaks)
        running = rig.submit(PROMPT)
        rig.loop.start()
        assert running.sequence.released.wait(10.0)
        assert refused(running)
        rig.loop.stop(5.0)
