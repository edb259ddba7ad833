"""`python -m loadtest.throughput.prefill --out loadtest/results`: decodes beside a long prompt.

Sequences decode the history as in `python -m loadtest.throughput`; then a prompt that nobody has seen comes
and is prefilled, and goes. Time between tokens before, meanwhile and afterwards, how fast the prompt was
processed, and how many of its blocks were in the cold pool before it was at its end.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random

import grpc

from forepage.errors import ForepageError
from forepage.rpc import worker_pb2 as pb
from forepage.rpc import worker_pb2_grpc
from forepage.rpc.edge import open_channel
from forepage.settings import WorkerSettings
from forepage.worker.parts import GPU_CHUNK_TOKENS
from loadtest.quality.intervals import percentile
from loadtest.throughput.case import Arm, Case
from loadtest.throughput.history import PLAIN_TOKENS
from loadtest.throughput.measure import (
    Length,
    Stream,
    WindowError,
    all_gaps,
    follow,
    request_of,
    wait_for,
    wait_idle,
)
from loadtest.throughput.rows import Row
from loadtest.throughput.run import Run, open_run, shared_options
from loadtest.throughput.system import StartError, System, arena_slots, running_system

WATCH_MS = 250
GUEST = "guest"
GUEST_SEED = 1
PHASES = ("before", "during", "after")
COLUMNS = (
    "tokens_per_s",
    "tokens_per_s_during",
    *(f"itl_{share}_ms_{phase}" for phase in PHASES for share in ("p50", "p99")),
    "itl_p50_during_vs_before",
    "itl_p99_during_vs_before",
    "prefill_tokens_per_s",
    "prefill_blocks_finished",
    "prefill_blocks_stored",
)


@dataclass(frozen=True)
class Guest:
    """The prompt that comes: so many tokens, one token of an answer, in `full`."""

    num_tokens: int
    case: Case

    @property
    def num_blocks(self) -> int:
        """It comes to hold."""
        return self.case.geometry.num_blocks(self.num_tokens + 1)

    def others(self, most: int) -> int:
        """Sequences of the case that fit beside it, at most so many."""
        return min(most, self._beside().concurrency())

    def changes(self, sequences: int, *, chunk_tokens: int, share: float) -> dict[str, str]:
        """The worker's and the cold pool's settings for so many sequences and it."""
        geometry, plan = self.case.geometry, self.case.plan
        beside = self._beside()
        keys, c128 = (share * beside.plan.kv_bytes for share in beside.shares(sequences))
        slots = arena_slots(self.case, sequences) + self.num_blocks
        slots += 2 * -(-geometry.resume_bytes // geometry.slot_bytes)
        longest = max(self.case.prompt_tokens + plan.answer_tokens, self.num_tokens + 1)
        return {
            "FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(slots * geometry.slot_bytes),
            "FOREPAGE_WORKER__KEY_SHARE": str((keys + self.num_blocks * geometry.keys_bytes) / plan.kv_bytes),
            "FOREPAGE_WORKER__C128_SHARE": str(
                (c128 + self.num_blocks * geometry.c128_bytes) / plan.kv_bytes
            ),
            "FOREPAGE_WORKER__MAX_RUNNING": str(sequences + 1),
            "FOREPAGE_WORKER__MAX_CONTEXT_TOKENS": str(max(512, longest)),
            "FOREPAGE_WORKER__PREFILL_CHUNK_TOKENS": str(chunk_tokens),
            "FOREPAGE_WORKER__PREFILL_SHARE": str(share),
        }

    def request(self) -> pb.GenerateRequest:
        """Tokens of its own: the cold pool has none of its blocks."""
        return pb.GenerateRequest(
            request_id=GUEST,
            prompt_token_ids=Random(GUEST_SEED).choices(range(PLAIN_TOKENS), k=self.num_tokens),
            sampling=pb.Sampling(max_tokens=1),
            residency=pb.Residency(mode=pb.RESIDENCY_MODE_FULL),
            ignore_eos=True,
        )

    def _beside(self) -> Case:
        """The case with what the guest leaves of the memory."""
        geometry, plan = self.case.geometry, self.case.plan
        one = geometry.rows_bytes + geometry.keys_bytes + geometry.c128_bytes
        return replace(self.case, plan=replace(plan, kv_bytes=plan.kv_bytes - self.num_blocks * one))


@dataclass(frozen=True)
class Sight:
    """Of the guest at one moment: blocks that it has finished, and those of them in the cold pool."""

    finished: int
    stored: int


@dataclass(frozen=True)
class Found:
    """Gaps between tokens of the others by phase, in ms; how long the guest took, and its last sight."""

    gaps_ms: dict[str, list[float]]
    seconds: dict[str, float]
    prefill_s: float
    last_sight: Sight | None


@dataclass
class _Watch:
    """Keeps the newest sight of the guest while its prompt is processed."""

    block_tokens: int
    newest: Sight | None = field(default=None)

    async def look(self, stub: worker_pb2_grpc.DecodeWorkerStub) -> None:
        async for frame in stub.Watch(pb.WatchRequest(interval_ms=WATCH_MS)):
            for view in frame.sequences:
                if view.request_id == GUEST and view.phase == pb.SEQUENCE_PHASE_PREFILL:
                    self.newest = Sight(view.processed_tokens // self.block_tokens, view.stored_blocks)


async def observe(system: System, guest: Guest, *, sequences: int, length: Length) -> Found:
    """Let so many sequences decode, then the guest come beside them.

    Raises: WindowError when they do not all decode in time, the worker's own error if one fails.
    """
    async with open_channel(system.worker_address, None) as channel:
        stub = worker_pb2_grpc.DecodeWorkerStub(channel)
        streams = [Stream(time.perf_counter()) for _ in range(sequences)]
        watch = _Watch(guest.case.geometry.block_tokens)
        tasks = [
            asyncio.create_task(follow(stub, request_of(system, guest.case, number), stream))
            for number, stream in enumerate(streams)
        ]
        tasks.append(
            asyncio.create_task(watch.look(stub))
        )  # in all three phases, so that it costs each alike
        spans: dict[str, tuple[float, float]] = {}

        async def phase(name: str) -> None:
            begin_s = time.perf_counter()
            await wait_for(streams, length.window_s, length.window_tokens, length.start_s)
            spans[name] = begin_s, time.perf_counter()

        try:
            await wait_for(streams, 0.0, length.warm_tokens, length.start_s)
            await phase("before")
            came = Stream(time.perf_counter())
            await follow(stub, guest.request(), came)
            if came.error is not None:
                raise came.error
            await wait_for(streams, 0.0, 1, length.start_s)  # the gap that the prompt's end is part of
            spans["during"] = came.asked_s, time.perf_counter()
            await phase("after")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(grpc.aio.AioRpcError):
                await wait_idle(stub)
    return Found(
        gaps_ms={name: all_gaps(streams, *span) for name, span in spans.items()},
        seconds={name: end_s - begin_s for name, (begin_s, end_s) in spans.items()},
        prefill_s=came.arrivals[0][0] - came.asked_s,
        last_sight=watch.newest,
    )


def row_of(run: Run, guest: Guest, found: Found | str, *, sequences: int) -> Row:
    """`found` is what was seen, or how it failed."""
    case, options = guest.case, run.options
    row: Row = {
        "measures": "prefill",
        "context_tokens": case.context_tokens,
        "arm": case.arm.value,
        "batch1": False,
        "index_placement": run.index_placement,
        "kv_budget_bytes": case.plan.kv_bytes,
        "experts_stored": run.folder.spec.num_experts,
        "concurrency": sequences,
        "prompt_tokens": guest.num_tokens,
        "prefill_chunk_tokens": options.chunk_tokens,
        "prefill_share": options.share,
        **dict.fromkeys(COLUMNS),
    }
    reason = found if isinstance(found, str) else "the prompt was at its end before it was looked at"
    if not isinstance(found, str):
        row |= _measured(guest, found)
    return row | {"why": dict.fromkeys((name for name in COLUMNS if row[name] is None), reason)}


def _measured(guest: Guest, found: Found) -> Row:
    gaps = found.gaps_ms
    p50 = {name: percentile(gaps[name], 0.50) for name in PHASES}
    p99 = {name: percentile(gaps[name], 0.99) for name in PHASES}
    return {
        "tokens_per_s": len(gaps["before"]) / found.seconds["before"],
        "tokens_per_s_during": len(gaps["during"]) / found.seconds["during"],
        **{f"itl_p50_ms_{name}": value for name, value in p50.items()},
        **{f"itl_p99_ms_{name}": value for name, value in p99.items()},
        "itl_p50_during_vs_before": p50["during"] / p50["before"],
        "itl_p99_during_vs_before": p99["during"] / p99["before"],
        "prefill_tokens_per_s": guest.num_tokens / found.prefill_s,
        "prefill_blocks_finished": found.last_sight and found.last_sight.finished,
        "prefill_blocks_stored": found.last_sight and found.last_sight.stored,
    }


def main(arguments: Seq[str] | None = None) -> int:
    """Measure and write; 1 when a case failed."""
    with open_run(_parser(), arguments) as run:
        for context in run.options.contexts:
            for arm in run.options.arms:
                row = asyncio.run(_measure(run, Guest(run.options.prompt_tokens, run.case(arm, context))))
                run.add(row)
                print(context, arm, row["concurrency"], row["itl_p99_during_vs_before"], flush=True)
        return run.exit_code


async def _measure(run: Run, guest: Guest) -> Row:
    options = run.options
    sequences = guest.others(options.sequences)
    if sequences < 1:
        failure = f"no sequence fits beside the prompt in {guest.case.plan.kv_bytes} bytes"
        return row_of(run, guest, failure, sequences=0)
    changes = guest.changes(sequences, chunk_tokens=options.chunk_tokens, share=options.share)
    try:
        async with running_system(
            run.model,
            run.folder,
            guest.case,
            sequences=sequences,
            device=options.device,
            changes=changes,
        ) as system:
            found: Found | str = await observe(system, guest, sequences=sequences, length=run.length)
    except (ForepageError, StartError, WindowError, OSError, grpc.aio.AioRpcError) as error:
        found = f"{type(error).__name__}: {error}"
    return row_of(run, guest, found, sequences=sequences)


def _parser() -> argparse.ArgumentParser:
    defaults = WorkerSettings()
    arms = [Arm.FULL, Arm.LOOKAHEAD]
    parser = shared_options("loadtest.throughput.prefill", __doc__, contexts=[65_536], arms=arms)
    parser.add_argument("--sequences", type=int, default=16, help="that decode, as far as they fit")
    parser.add_argument("--prompt-tokens", type=int, default=131_072, help="of the prompt that comes")
    parser.add_argument("--chunk-tokens", type=int, default=GPU_CHUNK_TOKENS)
    parser.add_argument(
        "--share", type=float, default=defaults.prefill_share, help="worker.prefill_share; 1: no slices"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
