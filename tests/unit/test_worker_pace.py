"""A prefill beside decode steps: how much of a chunk comes between two of them; it changes no bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch

from forepage.settings import ResidencyMode
from forepage.worker.pace import Pace, parts_within
from forepage.worker.sequence import Phase
from forepage.worker.stopwatch import Stopwatch, Told
from rigs.worker import Running, WorkerRig, decode_until, text_tokens, wants, worker_rig

LONG, SHORT = text_tokens(2_100, 1), text_tokens(300)


class ScriptedWatch(Stopwatch):
    """Decode steps take 10 ms; a part of a chunk as long as the test says."""

    def __init__(self, part_ms: float) -> None:
        super().__init__(torch.device("cpu"))
        self._part_ms = part_ms

    @contextmanager
    def time(self, tell: Told) -> Iterator[None]:
        yield
        count = getattr(tell, "args", (0, 0, 0))[2]
        tell(count * self._part_ms if count else 10.0)


def end(rig: WorkerRig, running: Running) -> None:
    """Cancel it: nothing is held any more."""
    rig.loop.cancel(running.sequence)
    rig.run_until(lambda: rig.loop.num_sequences == 0)
    rig.check_baseline()


def beside(rig: WorkerRig, running: Running) -> list[str]:
    """What each turn did while a long prompt was processed beside `running`: a step, or parts of a chunk."""
    turns: list[str] = []
    device = rig.parts.device

    def noted(act: Callable[..., Any], say: Callable[..., str]) -> Callable[..., Any]:
        def doing(*args: Any, **kwargs: Any) -> Any:
            turns.append(say(*args, **kwargs))
            return act(*args, **kwargs)

        return doing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "decode", noted(device.decode, lambda _: "step"))
        begin = noted(device.begin_prefill, lambda *_, num_parts, **__: str(num_parts))
        patch.setattr(device, "begin_prefill", begin)
        patch.setattr(device, "continue_prefill", noted(device.continue_prefill, str))
        prefilled = rig.submit(LONG, max_tokens=1, name="long", salt="long")
        rig.run_until(lambda: prefilled.is_over)
    assert not running.is_over
    return turns


@pytest.mark.parametrize(
    ("expected_ms", "budget_ms", "count"),
    [
        ([1.0] * 5, 3.0, 3),
        ([1.0] * 5, 99.0, 5),
        ([4.0, 1.0], 3.0, 1),
        ([1.0, 4.0, 1.0], 3.0, 1),
        ([2.0], 0.0, 1),
    ],
)
def test_as_many_parts_as_fit_and_never_none(expected_ms: list[float], budget_ms: float, count: int) -> None:
    assert parts_within(expected_ms, budget_ms) == count


def test_a_slice_is_as_long_as_a_step_may_grow_by() -> None:
    pace = Pace(40, share=0.45)
    assert pace.next_parts(512, 0, beside_decode=True) == 1, "nothing is known yet"
    pace.saw_parts(512, 0, 1, 2.0)
    assert pace.next_parts(512, 1, beside_decode=True) == 1, "no decode step is known yet"
    pace.saw_decode(20.0)
    assert pace.next_parts(512, 1, beside_decode=True) == 8, "16 ms; parts not seen take what the others do"
    assert pace.next_parts(512, 37, beside_decode=True) == 3, "no more than are left"
    assert pace.next_parts(512, 1, beside_decode=False) == 39
    assert Pace(40, share=1.0).next_parts(512, 1, beside_decode=True) == 39


def test_a_few_outliers_move_nothing() -> None:
    pace = Pace(4, share=0.5)
    for took_ms in (900.0, 1.0, 1.0, 900.0, 1.0):
        pace.saw_parts(512, 0, 4, 4 * took_ms)
    for took_ms in (2.0, 500.0, 2.0):
        pace.saw_decode(took_ms)
    assert pace.next_parts(512, 0, beside_decode=True) == 2


def test_chunks_of_other_sizes_are_expected_to_take_no_less() -> None:
    pace = Pace(10, share=0.5)
    pace.saw_decode(8.0)
    pace.saw_parts(512, 0, 10, 20.0)
    assert pace.next_parts(1, 0, beside_decode=True) == 4, "as of a large one, until one was seen"
    assert pace.next_parts(1_024, 0, beside_decode=True) == 2, "twice as many tokens, twice as long"
    pace.saw_parts(1, 0, 10, 10.0)
    assert pace.next_parts(1, 0, beside_decode=True) == 8
    assert pace.next_parts(300, 0, beside_decode=True) == 4, "of the size class of 512"


def test_decode_steps_come_between_slices_of_a_chunk() -> None:
    with worker_rig(prefill_share=0.45) as rig:
        device = rig.parts.device
        device.stopwatch = ScriptedWatch(part_ms=4.0)
        running = rig.submit(SHORT, max_tokens=200)
        decode_until(rig, running, 5)
        turns = beside(rig, running)
        slices = [int(turn) for turn in turns if turn != "step"]
        assert device.num_prefill_parts == 14
        first = [1, 2, 2, 2, 2, 2, 2, 1]
        assert slices == first + [2] * 7 * 4, "8 ms; the first chunk as large is expected to take twice that"
        assert all((one == "step") != (other == "step") for one, other in pairwise(turns[1:-1]))
        end(rig, running)


def test_with_all_of_the_time_a_chunk_is_never_cut() -> None:
    with worker_rig(prefill_share=1.0) as rig:
        running = rig.submit(SHORT, max_tokens=60)
        decode_until(rig, running, 5)
        slices = [turn for turn in beside(rig, running) if turn != "step"]
        assert slices == [str(rig.parts.device.num_prefill_parts)] * 5


@pytest.mark.parametrize("mode", [ResidencyMode.FULL, ResidencyMode.LOOKAHEAD])
def test_slices_change_no_token(mode: ResidencyMode) -> None:
    """A prompt alone, and one sliced beside another's decode steps: the same answer, the same blocks."""
    answers = []
    for share in (1.0, 0.45):
        with worker_rig(prefill_share=share, kv_format="fp32", kv_bytes=64 << 20) as rig:
            rig.index.auto = wants(1)
            rig.parts.device.stopwatch = ScriptedWatch(part_ms=3.0)
            if share < 1.0:
                other = rig.submit(SHORT, max_tokens=300, salt="other")
                decode_until(rig, other, 3)
            running = rig.submit(LONG[:1300], mode=mode, max_tokens=8)
            rig.run_until(lambda one=running: one.is_over, in_step=True)  # type: ignore[misc]
            assert running.finished is not None, running.failed
            records = [rig.arena.payload(ref).clone() for ref in running.sequence.arena.ref_by_block.values()]
            answers.append((running.tokens, torch.stack(records)))
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])


def test_a_prompt_cancelled_within_a_chunk_leaves_nothing_and_the_next_begins_anew() -> None:
    with worker_rig(prefill_share=0.45) as rig:
        rig.parts.device.stopwatch = ScriptedWatch(part_ms=20.0)
        alone = rig.submit(LONG[:900], max_tokens=4, salt="alone")
        rig.run(alone)
        running = rig.submit(SHORT, max_tokens=300)
        decode_until(rig, running, 3)
        cut = rig.submit(LONG[:900], max_tokens=4, name="cut", salt="cut")
        rig.run_until(lambda: cut.sequence.resident.num_blocks > 2 if cut.sequence.device else False)
        rig.run_until(lambda: rig.parts.device.local.has_chunk)
        assert cut.sequence.phase is Phase.PREFILL
        rig.loop.cancel(cut.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 1)
        assert not rig.parts.device.local.has_chunk
        rig.parts.device.stopwatch = ScriptedWatch(part_ms=0.1)
        again = rig.submit(LONG[:900], max_tokens=4, name="again", salt="again")
        rig.run_until(lambda: again.is_over)
        assert again.tokens == alone.tokens
        end(rig, running)


@pytest.mark.parametrize("took_s", [(0.0, 0.25)])
def test_on_the_cpu_the_time_is_told_at_once(took_s: tuple[float, float]) -> None:
    times, told = cycle(took_s), list[float]()
    watch = Stopwatch(torch.device("cpu"), clock=lambda: next(times))
    with watch.time(told.append):
        assert told == []
    assert told == [250.0]


class FakeEvent:
    """An event of a device that is `now` milliseconds on, and has come as far as `done`."""

    now = done = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def query(self) -> bool:
        return self.at <= FakeEvent.done

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


def test_on_a_gpu_nothing_is_waited_for_and_nothing_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "now", 0.0)
    monkeypatch.setattr(FakeEvent, "done", -1.0)
    watch, told = Stopwatch(torch.device("cuda")), list[float]()
    for took_ms in (3.0, 5.0, 7.0):
        with watch.time(told.append):
            FakeEvent.now += took_ms
    watch.settle()
    assert told == []
    FakeEvent.done = 8.0
    watch.settle()
    assert told == [3.0, 5.0], "the oldest first, as far as the device has come"
    FakeEvent.done = 15.0
    with watch.time(told.append):
        assert told == [3.0, 5.0, 7.0], "also if nobody settles"
