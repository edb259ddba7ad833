"""A batch of sequences that decode together: started, timed over a window, and cancelled."""

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

import grpc

from forepage.errors import ForepageError, error_from_code
from forepage.kv.plan_source import PlanSource
from forepage.rpc import worker_pb2 as pb
from forepage.rpc import worker_pb2_grpc
from forepage.rpc.edge import error_of_call, open_channel
from forepage.settings import ResidencyMode
from forepage.worker.request import PROTO_OF_MODE, PROTO_OF_SOURCE
from loadtest.throughput.case import Arm, Case
from loadtest.throughput.progress import say
from loadtest.throughput.system import Counters, System

POLL_S = 0.02
CALL_S = 20.0
SETTLE_S = 0.5
"""Loads that are under way when the index stops."""
MODES = {
    Arm.FULL: ResidencyMode.FULL,
    Arm.DEMAND: ResidencyMode.EXACT,
    Arm.LOOKAHEAD: ResidencyMode.LOOKAHEAD,
    Arm.GUARDED: ResidencyMode.GUARDED,
    Arm.EXACT: ResidencyMode.EXACT,
}


class WindowError(Exception):
    """The sequences never decoded all together."""


@dataclass(frozen=True)
class Length:
    """Of a window: it begins when each sequence gave `warm_tokens`, and is over when both minima are met."""

    warm_tokens: int
    window_tokens: int
    window_s: float
    start_s: float
    """How long the sequences have to get there, and how much longer than `window_s` a window may take."""
    early_tokens: int = 256
    """Of a guarded sequence, the first ones: each audited before it is given (worker.early_audit_steps)."""


@dataclass
class Stream:
    """One sequence's tokens as they came: seconds, and how many at once."""

    asked_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: ForepageError | None = None
    is_over: bool = False

    @property
    def num_tokens(self) -> int:
        """So far."""
        return sum(count for _, count in self.arrivals)


class Phase(StrEnum):
    """Of guarded sequences: while (of some) every step is audited before its token is given, and later."""

    EARLY = "early"
    STEADY = "steady"


@dataclass(frozen=True)
class Window:
    """What was seen between two moments at which all sequences decoded."""

    seconds: float
    num_tokens: int
    gaps_ms: list[float]
    """Between tokens of a sequence; tokens that came together share the gap before them."""
    ttft_ms: list[float]
    before: Counters
    after: Counters
    held: pb.DescribeReply
    frozen_gaps_ms: list[float]
    """As `gaps_ms`, a while later, with the index stopped: no set changes. Empty where that was not done."""
    phase: Phase | None = None
    early_share: float | None = None
    """Of the tokens of an early window: those among the first `early_tokens` of their sequence."""

    def grew(self, name: str, labels: str = "") -> float:
        """By how much a counter did."""
        return self.after.get((name, labels), 0.0) - self.before.get((name, labels), 0.0)

    def quantile(self, name: str, share: float) -> float | None:
        """The upper bound of the bucket that the quantile of a histogram without labels fell into.

        None if nothing was recorded, or it lies beyond the last bound.
        """
        labels = sorted((label for known, label in self.after if known == f"{name}_bucket"), key=float)
        counts = [(float(label), self.grew(f"{name}_bucket", label)) for label in labels]
        least = share * counts[-1][1] if counts else 0.0
        found = next((bound for bound, count in counts if count >= least > 0), math.inf)
        return found if found < math.inf else None


async def measure(
    system: System, case: Case, *, sequences: int, length: Length, as_shipped: bool = False
) -> list[Window]:
    """Time a window of all of them: of guarded ones an early and a steady one.

    In a paged arm one more follows while no set changes; `as_shipped`: the requests name no budget.
    Raises: WindowError when they do not all decode in time, the worker's own error if one fails.
    """
    async with open_channel(system.worker_address, None) as channel:
        stub = worker_pb2_grpc.DecodeWorkerStub(channel)
        streams = [Stream(time.perf_counter()) for _ in range(sequences)]
        tasks = [
            asyncio.create_task(
                follow(stub, request_of(system, case, number, names_budget=not as_shipped), stream)
            )
            for number, stream in enumerate(streams)
        ]
        is_paged = case.arm is not Arm.FULL and not as_shipped
        phases = (Phase.EARLY, Phase.STEADY) if case.arm is Arm.GUARDED and is_paged else (None,)
        windows = []
        try:
            await wait_for(streams, 0.0, length.warm_tokens, length.start_s)
            for phase in phases:
                if phase is Phase.STEADY:
                    await wait_for(streams, 0.0, length.early_tokens, length.start_s)
                say("all decode:", case.arm, phase or "")
                freeze = is_paged and phase is phases[-1]
                windows.append(await _window(system, stub, streams, length, phase=phase, freeze=freeze))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(grpc.aio.AioRpcError):
                await wait_idle(stub)
    return windows


async def _window(
    system: System,
    stub: worker_pb2_grpc.DecodeWorkerStub,
    streams: list[Stream],
    length: Length,
    *,
    phase: Phase | None,
    freeze: bool,
) -> Window:
    before, begin_s = await asyncio.to_thread(system.counters), time.perf_counter()
    is_early = phase is Phase.EARLY
    await wait_for(
        streams,
        length.window_s,
        length.window_tokens,
        length.start_s,
        most=length.early_tokens if is_early else None,
    )
    end_s = time.perf_counter()
    share = early_share(streams, begin_s, end_s, length.early_tokens) if is_early else None
    after = await asyncio.to_thread(system.counters)
    held: pb.DescribeReply = await stub.Describe(pb.DescribeRequest(), timeout=CALL_S)
    frozen: list[float] = []
    if freeze:
        with system.index_stopped():
            await asyncio.sleep(SETTLE_S)
            frozen_s = time.perf_counter()
            await wait_for(streams, length.window_s, length.window_tokens, length.start_s)
            frozen = all_gaps(streams, frozen_s, time.perf_counter())
    gaps = all_gaps(streams, begin_s, end_s)
    ttft = [(stream.arrivals[0][0] - stream.asked_s) * 1e3 for stream in streams]
    return Window(end_s - begin_s, len(gaps), gaps, ttft, before, after, held, frozen, phase, share)


def request_of(system: System, case: Case, number: int, *, names_budget: bool = True) -> pb.GenerateRequest:
    """One of the sequences that decode the history; one that names a budget is paged."""
    source = PlanSource.RECENCY if case.arm is Arm.DEMAND else PlanSource.MEMORY_INDEXER
    residency = pb.Residency(
        mode=PROTO_OF_MODE[MODES[case.arm]], min_recall=0.0, plan_source=PROTO_OF_SOURCE[source]
    )
    if names_budget:
        residency.budget_blocks = case.budget_blocks
    return pb.GenerateRequest(
        request_id=f"{case.arm}-{number}",
        prompt_token_ids=system.prompt,
        sampling=pb.Sampling(max_tokens=case.plan.answer_tokens, seed=number),
        residency=residency,
        ignore_eos=True,
    )


async def follow(stub: worker_pb2_grpc.DecodeWorkerStub, request: pb.GenerateRequest, stream: Stream) -> None:
    """Ask, and write down in `stream` what comes, until it ends."""
    try:
        async for event in stub.Generate(request):
            if event.HasField("tokens"):
                stream.arrivals.append((time.perf_counter(), len(event.tokens.token_ids)))
                stream.token_ids.extend(event.tokens.token_ids)
            elif event.HasField("failed"):
                stream.error = error_from_code(event.failed.code, event.failed.message)
            elif event.HasField("finished"):
                stream.is_over = True
    except grpc.aio.AioRpcError as failure:
        stream.error = error_of_call(failure, what="the worker")


def _check(streams: list[Stream]) -> None:
    """Raises: the first error of a sequence, or WindowError when one has ended."""
    for stream in streams:
        if stream.error is not None:
            raise stream.error
        if stream.is_over:
            raise WindowError("a sequence ended before the window did: raise --answer-tokens")


async def wait_for(
    streams: list[Stream], seconds: float, num_tokens: int, patience_s: float, *, most: int | None = None
) -> None:
    """Let them decode so long, and each so many tokens; `most`: no longer than until the first has so many.

    Raises: as `_check`, WindowError out of patience.
    """
    begin_s = time.perf_counter()
    if most is not None and max(stream.num_tokens for stream in streams) >= most:
        most = None  # some are past it already
    wanted = [stream.num_tokens + num_tokens for stream in streams]
    while True:
        _check(streams)
        passed_s = time.perf_counter() - begin_s
        slow = sum(stream.num_tokens < least for stream, least in zip(streams, wanted, strict=True))
        if passed_s >= seconds and not slow:
            return
        if most is not None and max(stream.num_tokens for stream in streams) >= most:
            return
        if passed_s > seconds + patience_s:
            raise WindowError(
                f"{slow} of {len(streams)} sequences gave no {num_tokens} tokens within {passed_s:.0f} s"
            )
        await asyncio.sleep(POLL_S)


def early_share(streams: list[Stream], begin_s: float, end_s: float, early_tokens: int) -> float | None:
    """Of the tokens that came in this time: those among the first so many of their sequence."""
    early = total = 0
    for stream in streams:
        seen = 0
        for at_s, count in stream.arrivals:
            if begin_s <= at_s <= end_s:
                total += count
                early += max(0, min(count, early_tokens - seen))
            seen += count
    return early / total if total else None


def all_gaps(streams: list[Stream], begin_s: float, end_s: float) -> list[float]:
    """Milliseconds that each token which came in this time was behind the one before it."""
    return [gap for stream in streams for gap in _gaps(stream, begin_s, end_s)]


def _gaps(stream: Stream, begin_s: float, end_s: float) -> list[float]:
    return [
        (at_s - last_s) * 1e3 / count
        for (last_s, _), (at_s, count) in pairwise(stream.arrivals)
        if begin_s <= at_s <= end_s
        for _ in range(count)
    ]


async def wait_idle(stub: worker_pb2_grpc.DecodeWorkerStub) -> None:
    """Until the worker holds nothing of what was cancelled."""
    deadline_s = time.perf_counter() + CALL_S
    while time.perf_counter() < deadline_s:
        reply = await stub.Describe(pb.DescribeRequest(), timeout=CALL_S)
        if not reply.running and not reply.waiting and not reply.arena_slots_held:
            return
        await asyncio.sleep(POLL_S)
