"""What a throughput case holds, and the memory divided for it: as the worker would count."""

import asyncio
from itertools import pairwise, product
from typing import Any

import pytest

from forepage.kv.geometry import V4_FLASH
from forepage.rpc import worker_pb2 as pb
from forepage.settings import WorkerSettings
from forepage.worker.gpu_blocks import PoolSizes
from loadtest.throughput.case import Arm, Case, Plan
from loadtest.throughput.join import JoinError, join
from loadtest.throughput.measure import Stream, Window, WindowError, early_share, wait_for
from loadtest.throughput.system import Counters
from loadtest.throughput.trace import Trace

PLAN = Plan(
    kv_bytes=16 << 30,
    answer_tokens=8192,
    recent_tokens=2048,
    slack_blocks=64,
    overlap=0.85,
    interval_steps=64,
    topk=512,
)
CASES = [
    Case(arm, context, footprint, PLAN, V4_FLASH)
    for arm, (context, footprint) in product(
        Arm, ((65_536, 0.25), (262_144, 0.105), (524_288, 0.083), (1_048_576, 0.083))
    )
]


def pools(case: Case, sequences: int) -> PoolSizes:
    """As the worker divides its memory."""
    key_share, c128_share = case.shares(sequences)
    settings = WorkerSettings(
        kv_bytes=PLAN.kv_bytes, key_share=key_share, c128_share=c128_share, escalation_reserve_bytes=0
    )
    return PoolSizes.from_settings(settings, V4_FLASH, topk=PLAN.topk)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.arm}-{case.context_tokens}")
def test_the_last_sequence_is_admitted_beside_the_others_and_none_after_it(case: Case) -> None:
    count = case.concurrency()
    sizes = pools(case, count)
    staging = sizes.staging_blocks if case.keeps_keys else 0
    prompt = V4_FLASH.num_blocks(case.prompt_tokens)
    assert sizes.row_blocks >= (count - 1) * case.rows + max(prompt + staging, case.rows)
    assert sizes.key_blocks >= (count - 1) * case.keys + max(prompt, case.keys)
    assert sizes.c128_blocks >= count * case.total_blocks
    one = case.rows * V4_FLASH.rows_bytes + case.keys * V4_FLASH.keys_bytes
    least = (count + 1) * (one + case.total_blocks * V4_FLASH.c128_bytes)
    newest = max(0, prompt + staging - case.rows) * V4_FLASH.rows_bytes
    newest += max(0, prompt - case.keys) * V4_FLASH.keys_bytes
    assert least + newest > PLAN.kv_bytes - 4 * V4_FLASH.record_bytes


def test_paging_fits_more_sequences_than_full_the_longer_the_more() -> None:
    fits = {(case.arm, case.context_tokens): case.concurrency() for case in CASES}
    gains = [fits[Arm.LOOKAHEAD, n] / fits[Arm.FULL, n] for n in (65_536, 262_144, 524_288)]
    assert gains == sorted(gains)
    assert all(fits[Arm.FULL, n] < fits[Arm.EXACT, n] < fits[Arm.LOOKAHEAD, n] for n in (262_144, 1_048_576))


@pytest.mark.parametrize("num_candidates", [64, 500, 4096])
def test_a_trace_keeps_its_overlap_and_its_budget(num_candidates: int) -> None:
    trace = Trace(wanted_blocks=60, interval_steps=64, overlap=0.85)
    sets = [set(trace.blocks(num_candidates, 64 * interval)) for interval in range(200)]
    assert all(len(blocks) == 60 and max(blocks) < num_candidates for blocks in sets)
    kept = [len(now & after) / 60 for now, after in pairwise(sets)]
    if num_candidates >= 2 * 60:
        assert sum(kept) / len(kept) == pytest.approx(0.85, abs=0.01)
        assert min(kept) > 0.65  # never all blocks at once
    assert len(set.union(*sets)) > 60
    assert trace.blocks(num_candidates, 70) == trace.blocks(num_candidates, 64)


def test_a_trace_wants_no_more_than_there_is() -> None:
    assert Trace(60, 64, 0.85).blocks(5, 0) == [0, 1, 2, 3, 4]
    assert Trace(60, 64, 0.85).blocks(0, 0) == []


def stream(*arrivals: tuple[float, int]) -> Stream:
    return Stream(0.0, list(arrivals))


def test_the_early_share_counts_the_first_tokens_of_each_sequence() -> None:
    late = stream((1.0, 3), (2.0, 2), (3.0, 2), (9.0, 5))
    young = stream((2.5, 1), (3.5, 1))
    assert early_share([late, young], 1.5, 4.0, 4) == (1 + 2) / (4 + 2)
    assert early_share([young], 1.5, 4.0, 4) == 1.0
    assert early_share([late], 20.0, 30.0, 4) is None


@pytest.mark.parametrize(("tokens", "most", "ends"), [(3, 3, True), (5, 4, True), (2, 3, False)])
async def test_a_window_ends_when_the_first_sequence_has_so_many(tokens: int, most: int, ends: bool) -> None:
    grows = stream((0.0, 1))

    async def come() -> None:
        grows.arrivals.append((1.0, tokens - 1))

    waiting = asyncio.create_task(wait_for([grows], 0.5, 100, 0.5, most=most))
    await asyncio.sleep(0.05)
    await come()
    if ends:
        await waiting
    else:
        with pytest.raises(WindowError):
            await waiting


def joined(*parts: dict[str, Any]) -> list[int]:
    return [row["context_tokens"] for row in join(parts)["rows"]]


def test_parts_of_one_machine_are_joined_in_order_and_others_refused() -> None:
    row = {"measures": "decode", "arm": "full", "concurrency": 1}
    head = {"what": "w", "device": "d", "commit": "c", "config": {}, "command": "x", "date": "2"}
    short, long = ({**head, "rows": [{**row, "context_tokens": tokens}]} for tokens in (1, 2))
    assert joined(long, short) == [1, 2]
    for name in ("device", "commit", "config", "what"):
        with pytest.raises(JoinError, match=name):
            joined(short, {**long, name: "other"})


def window(before: Counters, after: Counters) -> Window:
    return Window(1.0, 0, [], [], before, after, pb.DescribeReply(), [])


def test_a_quantile_is_the_bound_of_the_bucket_that_grew_over_it() -> None:
    name = "steps"
    before = {
        (f"{name}_bucket", "0.0"): 7.0,
        (f"{name}_bucket", "10.0"): 8.0,
        (f"{name}_bucket", "+Inf"): 9.0,
    }
    grown = {
        (f"{name}_bucket", "0.0"): 57.0,
        (f"{name}_bucket", "2.0"): 97.0,
        (f"{name}_bucket", "10.0"): 108.0,
    }
    seen = window(before, grown | {(f"{name}_bucket", "+Inf"): 109.0})
    assert [seen.quantile(name, share) for share in (0.01, 0.50, 0.51, 0.97, 0.98, 1.0)] == [
        0,
        0,
        2,
        2,
        10,
        10,
    ]
    beyond = window(before, grown | {(f"{name}_bucket", "+Inf"): 110.0})
    assert beyond.quantile(name, 1.0) is None, "beyond the last bound"
    assert seen.quantile("other", 0.5) is None
    assert window(before, before).quantile(name, 0.5) is None, "nothing was recorded"
