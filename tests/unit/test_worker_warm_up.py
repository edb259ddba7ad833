"""A worker warms up before its first request: nothing of it stays, and computed NaN is found out."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from forepage.errors import DependencyError, IntegrityError
from forepage.kv.geometry import KvGeometry
from forepage.settings import ResidencyMode, WorkerSettings
from forepage.worker.decode_graph import StepShape
from forepage.worker.readiness import Readiness
from forepage.worker.warm_up import WarmUp, warm_shapes
from rigs.worker import WorkerRig, text_tokens, wants, worker_rig

PROMPT = text_tokens(900)


@pytest.fixture(scope="module")
def geometry() -> KvGeometry:
    with worker_rig() as rig:
        return rig.parts.geometry


def shapes(geometry: KvGeometry, *, c128_blocks: int = 1 << 20, **changes: Any) -> list[StepShape]:
    return warm_shapes(WorkerSettings(**changes), geometry, c128_blocks=c128_blocks)


def test_shapes_are_every_batch_size_at_the_contexts_named(geometry: KvGeometry) -> None:
    found = shapes(geometry, max_running=5, warm_up_tokens=[65_536, 100_000, 262_144])
    assert len(found) == len(set(found)) == 4 * 3 * 2 * 2
    assert {shape.rows for shape in found} == {1, 2, 4, 8}
    assert {shape.blocks for shape in found} == {256, 512, 1024}
    assert [shape.pulls for shape in found] == [False] * 24 + [True] * 24


def test_contexts_beyond_the_longest_and_of_one_width_are_one_shape(geometry: KvGeometry) -> None:
    found = shapes(geometry, max_running=1, max_context_tokens=100_000)
    assert {shape.blocks for shape in found} == {-(-100_000 // geometry.block_tokens)}
    assert len(found) == 4


def test_batches_that_the_c128_pool_can_not_hold_are_left_out(geometry: KvGeometry) -> None:
    found = shapes(geometry, max_running=8, c128_blocks=600, warm_up_tokens=[65_536, 262_144])
    assert {(shape.rows, shape.blocks) for shape in found} == {(1, 256), (2, 256), (4, 256), (1, 1024)}
    assert (1, 4096) in {(one.rows, one.blocks) for one in shapes(geometry, c128_blocks=8)}, (
        "one may be longest"
    )


def test_no_more_shapes_than_graphs_are_kept(geometry: KvGeometry) -> None:
    assert len(shapes(geometry, max_running=256)) == WorkerSettings().decode_graphs - 4
    assert shapes(geometry, decode_graphs=0) == []
    assert shapes(geometry, warm_up_tokens=[]) == []


def tokens_of(rig: WorkerRig) -> list[list[int]]:
    rig.index.auto = wants(1)
    told = []
    for mode in (ResidencyMode.FULL, ResidencyMode.EXACT):
        running = rig.submit(PROMPT, mode=mode, max_tokens=6, salt=mode)
        rig.run(running)
        told.append(running.tokens)
    return told


@pytest.mark.parametrize("padded", [False, True])
def test_the_text_leaves_nothing_behind(padded: bool) -> None:
    options: dict[str, Any] = {"padded": padded, "audits_on_device": padded, "prompt_tokens": 256}
    with worker_rig(**options) as cold, worker_rig(**options) as warmed:
        warmed_up = WarmUp(warmed.parts, [])
        warmed_up.finish(lambda: False)
        assert warmed_up.done == warmed_up.total == 1
        warmed.check_baseline()
        assert warmed.arena.payloads.count_nonzero() == 0
        assert tokens_of(warmed) == tokens_of(cold)
        warmed.check_baseline()


def test_the_ranks_warm_up_together() -> None:
    with worker_rig(num_ranks=2) as cold, worker_rig(num_ranks=2) as warmed:
        WarmUp(warmed.parts, []).finish(lambda: False)
        warmed.check_baseline()
        assert tokens_of(warmed) == tokens_of(cold)


@pytest.mark.parametrize("kv_bytes", [1 << 20, 64 << 20])
def test_the_text_is_as_long_as_the_pools_hold(kv_bytes: int) -> None:
    with worker_rig(kv_bytes=kv_bytes, escalation_reserve_bytes=0, max_context_tokens=900) as rig:
        WarmUp(rig.parts, []).finish(lambda: False)
        rig.check_baseline()


def test_a_model_that_computes_nan_stops_the_start() -> None:
    with worker_rig() as rig:
        rig.ranks[0].model._head.fill_(float("nan"))
        with pytest.raises(IntegrityError, match="not finite"):
            WarmUp(rig.parts, []).finish(lambda: False)
        rig.check_baseline()


def test_a_cpu_has_nothing_to_warm_up() -> None:
    with worker_rig() as rig:
        assert WarmUp.of(rig.parts) is None


@dataclass
class FakeArena:
    pinned_bytes: int = 3 << 20
    num_bytes: int = 4 << 20
    said: list[str] = field(default_factory=list)
    error: DependencyError | None = None

    def wait(self, is_stopping: Callable[[], bool]) -> None:
        self.said.append("stopping" if is_stopping() else "arena")
        if self.error is not None:
            raise self.error


@dataclass
class FakeWarmUp:
    arena: FakeArena
    done: int = 0
    total: int = 3

    def begin(self, is_stopping: Callable[[], bool]) -> None:  # noqa: ARG002
        self.arena.said.append("begin")

    def finish(self, is_stopping: Callable[[], bool]) -> None:  # noqa: ARG002
        self.arena.said.append("finish")


def readiness(arena: FakeArena) -> Readiness:
    return Readiness(arena, FakeWarmUp(arena))  # type: ignore[arg-type]  # what it asks of them is all here


def test_the_rest_is_done_once_the_gpu_may_read_the_arena() -> None:
    arena = FakeArena()
    one = readiness(arena)
    assert not one.is_ready
    assert one.progress == "3 of 4 MiB of its arena are page-locked, 0 of 3 steps of its warm-up are done"
    asyncio.run(one.prepare(lambda: False))
    assert one.is_ready
    assert arena.said == ["begin", "arena", "finish"]


def test_a_worker_told_to_stop_meanwhile_is_never_ready() -> None:
    arena = FakeArena()
    one = readiness(arena)
    asyncio.run(one.prepare(lambda: True))
    assert not one.is_ready
    assert "finish" not in arena.said


def test_an_arena_that_the_driver_refuses_stops_the_start() -> None:
    one = readiness(FakeArena(error=DependencyError("refused")))
    with pytest.raises(DependencyError, match="refused"):
        asyncio.run(one.prepare(lambda: False))
    assert not one.is_ready
