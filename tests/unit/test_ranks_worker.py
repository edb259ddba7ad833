"""A worker whose model is split: the real loop leads another rank, a thread over real gloo."""

from dataclasses import fields

import torch

from forepage.model.kv_pools import KvPools
from forepage.rpc import worker_pb2 as pb
from forepage.settings import ResidencyMode
from forepage.worker.commands import (
    BlockLoad,
    ClearSlot,
    Command,
    ConfirmLoads,
    DecodeStep,
    EditTable,
    Load,
    PrefillMore,
    PrefillStep,
    Restore,
    SetTable,
    Stop,
    Table,
)
from rigs.worker import WorkerRig, decode_until, text_tokens, wants, worker_rig

PROMPT_TOKENS = 1500
EVERY_COMMAND: list[Command] = [
    SetTable(Table.ARENA, 3, (0, -1, 1 << 40)),
    EditTable(Table.ROWS, 1, (7, 2), (-1, 30)),
    ClearSlot(2),
    Load((BlockLoad(1 << 40, 1, 2, 3), BlockLoad(0, key_id=7))),
    Restore(1, 512, (0, 65_536)),
    PrefillStep(0, 256, tuple(range(512))),
    PrefillStep(0, 256, tuple(range(512)), 3, 7),
    PrefillMore(5),
    DecodeStep((0, 1), (700, 3), (5, 6)),
    ConfirmLoads(),
    Stop(),
]


def answers(num_ranks: int) -> list[tuple[list[int], pb.ResidencyReport]]:
    """Each mode twice (the second over a cached prefix), with copies in step so that runs can be compared."""
    said = []
    with worker_rig(num_ranks=num_ranks, kv_format="fp32", kv_bytes=64 << 20) as rig:
        rig.index.auto = wants(1, 0, recall=0.5)
        for mode in (ResidencyMode.FULL, ResidencyMode.EXACT, ResidencyMode.LOOKAHEAD, ResidencyMode.GUARDED):
            for _ in range(2):
                running = rig.submit(
                    text_tokens(PROMPT_TOKENS), mode=mode, max_tokens=70, budget_blocks=1, salt=mode
                )
                rig.run_until(lambda one=running: one.is_over, in_step=True)  # type: ignore[misc]
                assert running.finished is not None, running.failed
                said.append((running.tokens, running.report))
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()
        check_same_memory(rig)
    return said


def check_same_memory(rig: WorkerRig) -> None:
    """Every rank's pools and tables hold the same bytes, once all have carried out what was sent."""
    device = rig.parts.device
    if device._link is None:
        return
    device._unsent.append(ConfirmLoads())
    device._send(device._link)
    device._settle(device._link)
    ours, *others = (rank.memory for rank in rig.ranks)
    for other in others:
        for item in fields(KvPools):
            mine, theirs = getattr(ours.pools, item.name), getattr(other.pools, item.name)
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), item.name
        for table in Table:
            assert torch.equal(ours.tables[table], other.tables[table]), table


def test_every_rank_does_the_parts_of_a_chunk_that_rank_0_does() -> None:
    with worker_rig(num_ranks=2, prefill_share=0.01) as rig:
        running = rig.submit(text_tokens(60), max_tokens=100)
        decode_until(rig, running, 2)
        sliced = rig.submit(text_tokens(300), max_tokens=1, salt="sliced")
        rig.run_until(lambda: rig.ranks[0].has_chunk)
        check_same_memory(rig)
        assert all(rank.has_chunk for rank in rig.ranks)
        rig.run_until(lambda: sliced.is_over)
        assert sliced.finished is not None, sliced.failed
        check_same_memory(rig)
        assert not any(rank.has_chunk for rank in rig.ranks)
        rig.loop.cancel(running.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def test_two_ranks_say_what_one_says_in_every_mode() -> None:
    one, two = answers(1), answers(2)
    for (tokens, report), (expected, expected_report) in zip(two, one, strict=True):
        assert tokens == expected
        assert report.exact_steps == expected_report.exact_steps
        assert report.demand_bytes == expected_report.demand_bytes
        assert report.escalations == expected_report.escalations
    exact, guarded = two[2][1], two[6][1]
    assert exact.demand_bytes > 0
    assert guarded.escalations >= 2, "loads of a repair and of the move to exact were committed"
    assert guarded.exact_steps > 0
