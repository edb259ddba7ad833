"""What went wrong in other servers of paged KV, made to happen here: each failure by its name.

`peers.md` beside this file says whose failure each is, and which other tests show the rest of them.
"""

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from opentelemetry.trace import Span

from forepage.settings import ResidencyMode
from forepage.worker.arena_access import Grant, GrantRequest
from forepage.worker.commands import Table
from forepage.worker.quota import held_quota
from forepage.worker.rank_device import RankDevice
from forepage.worker.sequence import Phase
from rigs.held_copies import copies_held, turn
from rigs.worker import Running, WorkerRig, plan_reply, text_tokens, wants, worker_rig

FULL, LOOKAHEAD, GUARDED, EXACT = (
    ResidencyMode.FULL,
    ResidencyMode.LOOKAHEAD,
    ResidencyMode.GUARDED,
    ResidencyMode.EXACT,
)
PROMPT, OTHER = tuple(text_tokens(1_100)), tuple(text_tokens(1_100, seed=1))
"""Four whole blocks and 76 tokens."""
SHORT = PROMPT[:250]


@lru_cache
def alone(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """The tokens of `full` in a worker that has nothing else to do."""
    with worker_rig() as rig:
        running = rig.submit(prompt, max_tokens=max_tokens)
        rig.run(running)
        return running.tokens


def rows_of(running: Running) -> dict[int, int]:
    """Row ids by block, as the device has them."""
    return {int(idx): int(row) for idx, row in running.sequence.resident.row_id_by_block.items()}


def test_01_numbers_of_host_and_device_blocks_are_never_confused() -> None:
    """Device blocks, arena slots and block numbers all differ; a mix-up anywhere would read other rows."""
    with worker_rig() as rig:
        rig.run(rig.submit(OTHER, max_tokens=2, salt="o"))  # fills the first arena slots
        rig.index.auto = wants(0, 2)
        running = rig.submit(PROMPT, mode=EXACT, max_tokens=24)
        rig.run_until(lambda: len(running.tokens) >= 10)
        slots = {idx: ref.arena_id for idx, ref in running.sequence.arena.ref_by_block.items()}
        for idx, row_id in rows_of(running).items():
            assert idx not in slots or slots[idx] not in (idx, row_id)
        rig.run(running)
        assert running.tokens == alone(PROMPT, 24)
        assert running.report.demand_bytes > 0


def test_02_a_block_is_not_used_again_before_its_store_is_over() -> None:
    """Else the record under the first one's key would hold rows of the second."""
    with worker_rig(max_running=1) as rig:
        first = rig.submit(PROMPT, max_tokens=400)
        rig.run_until(lambda: first.sequence.phase is Phase.PREFILL)
        with copies_held(rig):
            turn(rig, 3)  # chunks are computed and their blocks are to be stored
            rig.loop.cancel(first.sequence)
            second = rig.submit(OTHER, max_tokens=4)
            turn(rig, 50)
            assert not second.tokens
            assert second.sequence.device is None
        rig.run(second)
        again = rig.submit(PROMPT, max_tokens=8)
        rig.run(again)
        assert again.tokens == alone(PROMPT, 8)
        rig.check_baseline()


def test_03_a_sequence_aborted_in_mid_load_frees_no_block_under_the_copy() -> None:
    with worker_rig(max_running=2) as rig:
        rig.index.auto = wants(0, 2)
        first = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=200)
        rig.run_until(lambda: len(first.tokens) >= 2)
        with copies_held(rig):
            rig.index.auto = wants(1)
            rig.run_until(lambda: first.sequence.lookahead.load is not None)
            load = first.sequence.lookahead.load
            assert load is not None
            under_copy = {int(row) for row in load.row_ids.values()}
            rig.loop.cancel(first.sequence)
            second = rig.submit(OTHER, max_tokens=8, salt="o")
            turn(rig, 50)
            if second.sequence.device is not None:
                assert not under_copy & set(rows_of(second).values())
        rig.run(second)
        assert second.tokens == alone(OTHER, 8)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def test_04_a_half_filled_block_is_never_a_record() -> None:
    """The first one ends in the middle of a block; who begins with its text computes that block itself."""
    with worker_rig(max_running=1) as rig:
        first = rig.submit(PROMPT, max_tokens=400)
        rig.run_until(lambda: len(first.tokens) >= 40)
        half = (*PROMPT, *first.tokens[:35])
        rig.loop.cancel(first.sequence)
        rig.run(rig.submit(OTHER, max_tokens=40, salt="o"))  # in the same slot, with its own state
        whole = (*half, *text_tokens(200, seed=2))
        again = rig.submit(whole, max_tokens=8)
        rig.run(again)
        assert 0 < again.sequence.cached_tokens <= len(PROMPT) // 256 * 256
        assert again.tokens == alone(whole, 8)


@contextmanager
def grants_held(rig: WorkerRig) -> Iterator[None]:
    """The arena answers what was asked within the block only behind it."""
    answer, waiting = rig.arena.grant, []

    def hold(request: GrantRequest, span: Span) -> Future[Grant]:
        waiting.append((Future[Grant](), request, span))
        return waiting[-1][0]

    with patch.object(rig.arena, "grant", hold):
        yield
    for future, request, span in waiting:
        future.set_result(answer(request, span).result())


HELD = {Phase.GRANTING: grants_held, Phase.LOADING: copies_held}


@pytest.mark.parametrize(
    "phase",
    [Phase.WAITING, Phase.GRANTING, Phase.LOADING, Phase.PREFILL, Phase.FIRST_PLAN, Phase.DECODE],
    ids=lambda phase: phase.name,
)
def test_05_a_sequence_aborted_in_any_phase_gives_everything_back(phase: Phase) -> None:
    """What it had asked for arrives afterwards, and goes back too. Paused ones: unit/test_worker_faults."""
    with worker_rig(max_running=1, first_plan_timeout_ms=60_000) as rig:
        rig.run(rig.submit(PROMPT, max_tokens=1))  # a prefix to load
        other = rig.submit(OTHER, max_tokens=30, salt="o") if phase is Phase.WAITING else None
        salt = "p" if phase is Phase.PREFILL else ""  # one that loads has little to compute
        rig.index.auto = None if phase is Phase.FIRST_PLAN else wants(0, 2)
        with HELD.get(phase, nullcontext)(rig):
            running = rig.submit(PROMPT, mode=GUARDED, max_tokens=200, salt=salt)
            rig.run_until(lambda: running.sequence.phase is phase)
            rig.loop.cancel(running.sequence)
            turn(rig, 3)
        if other is not None:
            rig.run(other)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def test_09_a_batch_beyond_every_power_of_two_gives_each_its_own_tokens() -> None:
    """Others crashed at 65 or about 80 sequences; here 130 decode together, each with blocks away."""
    prefix = PROMPT[:1_024]
    prompts = [(*prefix, *text_tokens(12 + seed % 7, seed)) for seed in range(130)]
    with worker_rig(
        arena_slots=2_500,
        max_running=130,
        max_waiting=200,
        kv_bytes=256 << 20,
        admission_timeout_s=600.0,
        first_plan_timeout_ms=600_000,
    ) as rig:
        rig.run(rig.submit((*prefix, 1), max_tokens=1))  # all the others load it
        running = [
            rig.submit(prompt, mode=LOOKAHEAD, max_tokens=6, name=str(seed))
            for seed, prompt in enumerate(prompts)
        ]
        rig.run_until(lambda: all(one.sequence.phase is Phase.FIRST_PLAN for one in running))
        assert len({one.sequence.holds.slot for one in running}) == 130
        rig.index.auto = wants(0, 2)
        for question in list(rig.index.questions):
            rig.index.answer(plan_reply(question, [0, 2]))
        rig.run(*running)
        rig.check_baseline()
    with worker_rig() as rig:
        rig.index.auto = wants(0, 2)
        for seed in (0, 64, 80, 129):
            one = rig.submit(prompts[seed], mode=LOOKAHEAD, max_tokens=6)
            rig.run(one)
            assert running[seed].tokens == one.tokens


@pytest.mark.parametrize("mode", [FULL, LOOKAHEAD, GUARDED, EXACT])
def test_17_what_admission_counts_is_what_a_sequence_comes_to_hold(mode: ResidencyMode) -> None:
    """Never more than promised; at the end of the prefill every promised row block of the prompt is used."""
    with worker_rig() as rig:
        rig.index.auto = wants(0, 2)
        running = rig.submit(PROMPT, mode=mode, max_tokens=20)
        most = [0, 0]

        def looked() -> bool:
            if running.sequence.device is not None:
                held, holds = held_quota(rig.parts, running.sequence), running.sequence.holds
                assert held.rows <= holds.row_promise
                assert held.keys <= holds.key_promise
                most[:] = max(most[0], held.rows), max(most[1], held.keys)
            return running.is_over

        rig.run_until(looked)
        rig.run(running)
        blocks = rig.parts.geometry.num_blocks(len(PROMPT))
        staging = rig.parts.blocks.staging_blocks if mode is EXACT else 0
        assert most[0] >= blocks + staging
        assert most[1] >= blocks


def others_of(rig: WorkerRig, running: Seq[Running]) -> list[tuple[dict[int, int], list[int]]]:
    """What each holds, and its row of the device's table."""
    table = rig.ranks[0].memory.tables[Table.ROWS]
    return [(rows_of(one), table[one.sequence.holds.slot].tolist()) for one in running]


@pytest.mark.parametrize("ending", ["finished", "cancelled", "failed"])
def test_a2_one_that_ends_takes_nothing_from_the_others(ending: str) -> None:
    """The published system zeroed and released the residency of live requests at every finish."""
    with worker_rig(interval_steps=64) as rig:
        rig.index.auto = wants(0, 2)
        live = [rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=24, name=name) for name in "ab"]
        rig.run_until(lambda: all(len(one.tokens) >= 3 for one in live))
        last = rig.submit(OTHER, mode=LOOKAHEAD, max_tokens=3, salt="o")
        rig.run_until(lambda: len(last.tokens) >= 1)
        before = others_of(rig, live)
        if ending == "cancelled":
            rig.loop.cancel(last.sequence)
        if ending == "failed":
            rig.arena.lost.update(last.sequence.arena.ref_by_block.values())
        rig.run_until(lambda: last.sequence.device is None)
        assert others_of(rig, live) == before
        rig.run(*live)
        assert live[0].tokens == live[1].tokens


def test_a3_what_was_generated_is_paged_like_the_prompt() -> None:
    """A block of the answer leaves the tail, is named to the index, wanted, and loaded again."""
    with worker_rig(interval_steps=32) as rig:
        generated = len(SHORT) // 256 + 1  # the first block of answer tokens only
        rig.index.auto = wants(0)
        running = rig.submit(SHORT, mode=LOOKAHEAD, max_tokens=1_200, budget_blocks=1)
        rig.run_until(lambda: running.sequence.num_processed >= 256 * (generated + 2))
        rig.run_until(lambda: generated not in running.sequence.resident.row_id_by_block)
        rig.index.auto = wants(generated)
        rig.run_until(lambda: generated in running.sequence.resident.row_id_by_block)
        assert max(len(question.arena_ids) // 4 for question in rig.index.questions) > generated
        holds, ref = running.sequence.resident, running.sequence.arena.ref_by_block
        assert same_rows(rig, int(holds.row_id_by_block[generated]), ref[generated])
        rig.loop.cancel(running.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)


def holds_now(running: Running, block: int, *, but_not: int) -> bool:
    """Whether it holds the one and not the other."""
    held = running.sequence.resident.row_id_by_block
    return block in held and but_not not in held


def same_rows(rig: WorkerRig, row_id: int, ref: Any) -> bool:
    """Whether the device block holds the record's rows: all layers of them."""
    geometry = rig.parts.geometry
    rows = rig.ranks[0].memory.pools.rows[row_id].view(torch.uint8).flatten()
    return torch.equal(rows, rig.arena.payload(ref)[: geometry.rows_bytes])


@pytest.mark.parametrize("mode", [LOOKAHEAD, EXACT])
def test_a4_rows_of_one_that_is_gone_are_never_read_by_the_next(mode: ResidencyMode) -> None:
    """The same device blocks held another text before; tokens are those over pools full of NaN."""
    said = []
    for with_another_first in (False, True):
        with worker_rig(max_running=1) as rig:
            rig.index.auto = wants(0)
            if with_another_first:
                rig.run(rig.submit(OTHER[:800], mode=mode, max_tokens=8, budget_blocks=1, salt="o"))
            running = rig.submit(PROMPT[:800], mode=mode, max_tokens=16, budget_blocks=1)
            rig.run(running)
            said.append(running.tokens)
    assert said[0] == said[1]


def test_a5_a_block_that_was_dropped_is_loaded_when_it_is_wanted_again() -> None:
    """Also a10: a record is all layers of its block, so none is half there."""
    with worker_rig() as rig:
        rig.index.auto = wants(1)
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=400, budget_blocks=1)
        rig.run_until(lambda: len(running.tokens) >= 2)
        for wanted, dropped in ((2, 1), (1, 2), (2, 1)):
            rig.index.auto = wants(wanted)
            rig.run_until(partial(holds_now, running, wanted, but_not=dropped))
            holds, refs = running.sequence.resident, running.sequence.arena.ref_by_block
            assert same_rows(rig, int(holds.row_id_by_block[wanted]), refs[wanted])
        rig.loop.cancel(running.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)


def test_a6_a_plan_for_more_than_there_is_room_loads_what_fits() -> None:
    """In the published system blocks ran out inside a thread, whose error nobody saw."""
    with worker_rig(load_slack_blocks=1) as rig:
        rig.index.auto = wants(*range(5), 400, 1)
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=20, budget_blocks=2)
        rig.run(running)
        assert running.finished is not None
        assert running.report.resident_blocks_max <= 2 + 2 + 1  # budget, tail, slack
        rig.check_baseline()


def test_a8_ranks_change_their_tables_at_the_same_step() -> None:
    seen: dict[int, list[dict[Table, torch.Tensor]]] = defaultdict(list)
    decode = RankDevice.decode

    def watched(rank: RankDevice, *args: Any, **how: Any) -> Any:
        seen[id(rank)].append({name: table.clone() for name, table in rank.memory.tables.items()})
        return decode(rank, *args, **how)

    with worker_rig(num_ranks=2) as rig, patch.object(RankDevice, "decode", watched):
        rig.index.auto = wants(0, 2)
        running = rig.submit(PROMPT, mode=LOOKAHEAD, max_tokens=40)
        rig.run_until(lambda: len(running.tokens) >= 18)
        rig.index.auto = wants(1)
        rig.run(running)
        one, two = (seen[id(rank)] for rank in rig.ranks)
    assert len(one) == len(two) == 39
    for here, there in zip(one, two, strict=True):
        assert all(torch.equal(here[name], there[name]) for name in here)
    assert any(not torch.equal(one[0][Table.ROWS], step[Table.ROWS]) for step in one)  # they did change


def test_a12_nothing_is_taken_beyond_the_context() -> None:
    with worker_rig(max_context_tokens=512) as rig:
        running = rig.submit(text_tokens(504), max_tokens=8)
        rig.run(running)
        assert len(running.tokens) == 8
