"""Where prefill chunks end and resume records are taken."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from forepage.settings import WorkerSettings
from forepage.worker.parts import WorkerParts
from forepage.worker.prefill import MOST_OVERTAKEN, ChunkRule, next_prompt
from rigs.worker import text_tokens, worker_rig


def rule(prompt: int, *, tail: int = 1) -> ChunkRule:
    return ChunkRule(prompt, chunk=512, resume_every=2048, block=256, tail=tail)


def chunk_ends(start: int, prompt: int, *, tail: int = 1) -> list[int]:
    ends = []
    while start < prompt:
        start = rule(prompt, tail=tail).next_end(start)
        ends.append(start)
    return ends


def test_chunks_are_aligned_and_stop_at_the_last_full_block() -> None:
    assert chunk_ends(0, 1300) == [512, 1024, 1280, 1300]
    assert chunk_ends(0, 200) == [200]
    assert chunk_ends(0, 257) == [256, 257]
    assert chunk_ends(0, 512) == [256, 512], "one token is left to compute after a resume"


def test_chunks_after_a_resume_are_those_of_a_whole_prefill() -> None:
    whole = chunk_ends(0, 5000)
    for point in (256, 1024, 2048):
        rest = chunk_ends(point, 5000)
        assert [end for end in whole if end > point and end > rest[0]] == rest[1:]


def test_resume_points_are_the_long_stride_and_the_last_full_block() -> None:
    points = [n for n in range(0, 5001, 128) if rule(5000).is_resume_point(n)]
    assert points == [2048, 4096, 4864]
    assert all(point in chunk_ends(0, 5000) for point in points)


def test_the_tail_lies_behind_every_resume_point_but_the_long_strides() -> None:
    points = [n for n in range(0, 5001, 128) if rule(5000, tail=256).is_resume_point(n)]
    assert points == [2048, 4096, 4608], "5000 - 256 = 4744 lies in the block from 4608 on"
    assert all(point in chunk_ends(0, 5000, tail=256) for point in points)
    assert not any(rule(200, tail=256).is_resume_point(n) for n in range(201)), "no block before the tail"
    assert chunk_ends(0, 200, tail=256) == [200]


@pytest.mark.parametrize(
    ("asked", "kind", "chunk"),
    [(None, "cuda", 4096), (None, "cpu", 512), (256, "cuda", 256), (256, "cpu", 256)],
)
def test_a_gpu_takes_long_chunks_unless_told_otherwise(asked: int | None, kind: str, chunk: int) -> None:
    parts = SimpleNamespace(
        settings=WorkerSettings(prefill_chunk_tokens=asked), device=SimpleNamespace(kind=torch.device(kind))
    )
    assert cast(Any, WorkerParts.prefill_chunk).fget(parts) == chunk


def prompt(*, length: int, done: int = 0, arrived_s: float) -> Any:
    return SimpleNamespace(
        request=SimpleNamespace(prompt=[0] * length), num_processed=done, arrived_s=arrived_s
    )


def test_the_shortest_rest_comes_first_and_the_first_of_all_every_fourth_time() -> None:
    waiting = [
        prompt(length=10_000, arrived_s=1.0),
        prompt(length=300, arrived_s=2.0),
        prompt(length=9_000, done=8_900, arrived_s=3.0),
        prompt(length=300, arrived_s=4.0),
    ]
    long, short, nearly_done, as_short = waiting
    assert next_prompt(waiting, num_overtaken=0) is nearly_done
    assert next_prompt(waiting, num_overtaken=MOST_OVERTAKEN) is long
    assert next_prompt([long, as_short, short], num_overtaken=1) is short, "of equals the older one"


def test_short_prompts_overtake_a_long_one_that_still_gets_on_and_nothing_else_changes() -> None:
    """Chunks of several prompts take turns: who is done first changes, no token does."""
    long, short = text_tokens(4_000), [text_tokens(600, seed) for seed in (1, 2, 3, 4, 5)]
    with worker_rig(max_running=6) as rig:
        alone: list[list[int]] = []
        for prompt_tokens in (long, *short):
            running = rig.submit(prompt_tokens, max_tokens=4, salt=f"alone {len(alone)}")
            rig.run(running)
            alone.append(running.tokens)
    with worker_rig(max_running=6) as rig:
        first = rig.submit(long, max_tokens=4)
        rig.run_until(lambda: first.sequence.num_processed >= 512)
        others = [rig.submit(one, max_tokens=4) for one in short]
        rig.run_until(lambda: all(running.tokens for running in others))
        assert 512 < first.sequence.num_processed < 4_000, "it got on meanwhile, and did not hold them up"
        assert not first.tokens
        rig.run(first, *others)
    assert [running.tokens for running in (first, *others)] == alone
