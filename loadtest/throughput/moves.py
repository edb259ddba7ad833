"""`python -m loadtest.throughput.moves --out loadtest/results`: from `full` to paged for others, and back.

So many sequences as fit in `full` decode the history, kept whole by room (worker.full_share 1). In each round
others come, in `full`, for which there is no room: those that decode become paged, and load again what they
dropped once the others are gone. How often, how fast, how many bytes, whether a token of the prompts was
computed again, and in `exact` whether the tokens are those of the same sequences that never moved.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass

import grpc

from forepage.errors import ForepageError
from forepage.rpc import worker_pb2 as pb
from forepage.rpc import worker_pb2_grpc
from forepage.rpc.edge import open_channel
from loadtest.quality.intervals import percentile
from loadtest.throughput.case import Arm, Case
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
from loadtest.throughput.system import Counters, StartError, System, arena_slots, running_system

MOVES = "forepage_room_moves_total"
MOVE_TIME = "forepage_room_move_time_milliseconds"
MOVED_BYTES = "forepage_room_bytes_total"
PREFILL_TOKENS = "forepage_prefill_tokens_total"
POLL_S = 0.1
COLUMNS = (
    "tokens_per_s",
    "itl_p50_ms",
    "itl_p99_ms",
    "moves_left",
    "moves_returned",
    "moves_per_s",
    "move_ms_left",
    "move_ms_returned",
    "bytes_dropped_per_move",
    "bytes_loaded_per_move",
    "prefill_tokens_recomputed",
    "tokens_compared",
    "tokens_equal",
)
NOT_PROMISED = "only `exact` promises the tokens of `full`"


@dataclass(frozen=True)
class Crowd:
    """Sequences that stay, and guests: as many as find room once the others are paged."""

    case: Case
    staying: int
    guest_tokens: int

    @property
    def guest_blocks(self) -> int:
        """A guest comes to hold."""
        return self.case.geometry.num_blocks(self.case.prompt_tokens + self.guest_tokens - 1)

    @property
    def guests(self) -> int:
        """That come at once."""
        return self.staying * (self.case.total_blocks - self.case.rows) // self.guest_blocks

    @property
    def row_blocks(self) -> int:
        """On the GPU: all that stay, in `full`."""
        return self.staying * self.case.total_blocks + 1

    @property
    def key_blocks(self) -> int:
        """Likewise; where keys are never dropped those of the guests have places of their own."""
        return self.row_blocks + self.case.keeps_keys * self.guests * self.guest_blocks

    @property
    def kv_bytes(self) -> int:
        """Rows, keys and c128 rows."""
        geometry = self.case.geometry
        rows, keys = self.row_blocks * geometry.rows_bytes, self.key_blocks * geometry.keys_bytes
        return rows + keys + self._c128_bytes + 2  # what the shares' rounding may cost

    def changes(self) -> dict[str, str]:
        """The worker's and the cold pool's settings."""
        geometry, kv_bytes = self.case.geometry, self.kv_bytes
        sequences = self.staying + self.guests
        slots = arena_slots(self.case, sequences)
        return {
            "FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(slots * geometry.slot_bytes),
            "FOREPAGE_WORKER__KV_BYTES": str(kv_bytes),
            "FOREPAGE_WORKER__KEY_SHARE": str((self.key_blocks * geometry.keys_bytes + 1) / kv_bytes),
            "FOREPAGE_WORKER__C128_SHARE": str((self._c128_bytes + 1) / kv_bytes),
            "FOREPAGE_WORKER__MAX_RUNNING": str(sequences),
            "FOREPAGE_WORKER__FULL_SHARE": "1.0",
            "FOREPAGE_WORKER__BUDGET_BLOCKS": str(self.case.budget_blocks),
        }

    def request(
        self, system: System, number: int, *, mode: pb.ResidencyMode | None = None
    ) -> pb.GenerateRequest:
        """One that stays, its tokens drawn; in the arm's mode unless another is given."""
        request = request_of(system, self.case, number, names_budget=False)
        request.sampling.temperature, request.sampling.top_p = 1.0, 1.0
        if mode is not None:
            request.residency.mode = mode
        return request

    def guest(self, system: System, name: str) -> pb.GenerateRequest:
        """One that comes, reads the same document, and goes."""
        return pb.GenerateRequest(
            request_id=name,
            prompt_token_ids=system.prompt,
            sampling=pb.Sampling(max_tokens=self.guest_tokens),
            residency=pb.Residency(mode=pb.RESIDENCY_MODE_FULL),
            ignore_eos=True,
        )

    @property
    def _c128_bytes(self) -> int:
        blocks = (self.staying + self.guests) * self.case.total_blocks + 1
        return blocks * self.case.geometry.c128_bytes


@dataclass(frozen=True)
class Found:
    """What was seen over all rounds."""

    seconds: float
    gaps_ms: list[float]
    before: Counters
    after: Counters
    num_guests: int
    tokens: list[list[int]]
    tokens_of_full: list[list[int]]

    def grew(self, name: str, labels: str = "") -> float:
        """By how much a counter did."""
        return self.after.get((name, labels), 0.0) - self.before.get((name, labels), 0.0)

    def mean(self, name: str, labels: str) -> float | None:
        """Of what a histogram took in meanwhile."""
        count = self.grew(f"{name}_count", labels)
        return self.grew(f"{name}_sum", labels) / count if count else None


class _Rounds:
    """Runs the sequences that stay, and the rounds of guests."""

    def __init__(self, system: System, crowd: Crowd, stub: worker_pb2_grpc.DecodeWorkerStub) -> None:
        self._system = system
        self._crowd = crowd
        self._stub = stub

    async def tokens_of_full(self, length: Length, num_tokens: int) -> list[list[int]]:
        """Of the same requests in `full`, all together, each so many at least."""
        streams, tasks = self._start(pb.RESIDENCY_MODE_FULL)
        try:
            await wait_for(streams, 0.0, num_tokens, length.start_s + length.window_s)
        finally:
            await self._stop(tasks)
        return [stream.token_ids for stream in streams]

    async def run(self, length: Length, rounds: int, tokens_of_full: list[list[int]]) -> Found:
        """So many rounds. Raises: WindowError when one does not end in time, the worker's own error."""
        since = await asyncio.to_thread(self._system.counters)
        streams, tasks = self._start(None)
        try:
            await wait_for(streams, 0.0, length.warm_tokens, length.start_s)
            await self._all_whole(since, streams, length.start_s)
            before, begin_s = await asyncio.to_thread(self._system.counters), time.perf_counter()
            for number in range(rounds):
                await self._guests(number)
                await self._all_whole(since, streams, length.start_s)
            end_s, after = time.perf_counter(), await asyncio.to_thread(self._system.counters)
        finally:
            await self._stop(tasks)
        return Found(
            end_s - begin_s,
            all_gaps(streams, begin_s, end_s),
            before,
            after,
            rounds * self._crowd.guests,
            [stream.token_ids for stream in streams],
            tokens_of_full,
        )

    def _start(self, mode: pb.ResidencyMode | None) -> tuple[list[Stream], list[asyncio.Task[None]]]:
        streams = [Stream(time.perf_counter()) for _ in range(self._crowd.staying)]
        requests = [self._crowd.request(self._system, number, mode=mode) for number in range(len(streams))]
        return streams, [
            asyncio.create_task(follow(self._stub, request, stream))
            for request, stream in zip(requests, streams, strict=True)
        ]

    async def _stop(self, tasks: Seq[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(grpc.aio.AioRpcError):
            await wait_idle(self._stub)

    async def _guests(self, number: int) -> None:
        """All at once, until the last has gone."""
        streams = [Stream(time.perf_counter()) for _ in range(self._crowd.guests)]
        requests = [self._crowd.guest(self._system, f"guest-{number}-{at}") for at in range(len(streams))]
        await asyncio.gather(
            *(follow(self._stub, request, stream) for request, stream in zip(requests, streams, strict=True))
        )
        for stream in streams:
            if stream.error is not None:
                raise stream.error

    async def _all_whole(self, since: Counters, streams: list[Stream], patience_s: float) -> None:
        """Until every sequence that stays is in `full`; `since`: the counters before they came."""
        deadline_s = time.perf_counter() + patience_s
        while time.perf_counter() < deadline_s:
            now = await asyncio.to_thread(self._system.counters)
            grown = {key: now.get((MOVES, key), 0.0) - since.get((MOVES, key), 0.0) for key in _REASONS}
            if grown["kept"] + grown["returned"] - grown["left"] == self._crowd.staying:
                return
            await wait_for(streams, POLL_S, 0, patience_s)
        raise WindowError(f"not all sequences were back in full within {patience_s:.0f} s: {grown}")


_REASONS = ("kept", "left", "returned")


def row_of(run: Run, crowd: Crowd, found: Found | str) -> Row:
    """`found` is what was seen, or how it failed."""
    case = crowd.case
    row: Row = {
        "measures": "moves",
        "context_tokens": case.context_tokens,
        "arm": case.arm.value,
        "batch1": False,
        "index_placement": run.index_placement,
        "kv_budget_bytes": crowd.kv_bytes,
        "experts_stored": run.folder.spec.num_experts,
        "concurrency": crowd.staying,
        "guests": crowd.guests,
        "rounds": run.options.rounds,
        **dict.fromkeys(COLUMNS),
    }
    reason = found if isinstance(found, str) else NOT_PROMISED
    if not isinstance(found, str):
        row |= _measured(found, is_exact=case.arm is Arm.EXACT)
    return row | {"why": dict.fromkeys((name for name in COLUMNS if row[name] is None), reason)}


def _measured(found: Found, *, is_exact: bool) -> Row:
    left, returned = (int(found.grew(MOVES, reason)) for reason in ("left", "returned"))
    pairs = list(zip(found.tokens, found.tokens_of_full, strict=True)) if is_exact else []
    return {
        "tokens_per_s": len(found.gaps_ms) / found.seconds,
        "itl_p50_ms": percentile(found.gaps_ms, 0.50),
        "itl_p99_ms": percentile(found.gaps_ms, 0.99),
        "moves_left": left,
        "moves_returned": returned,
        "moves_per_s": (left + returned) / found.seconds,
        "move_ms_left": found.mean(MOVE_TIME, "left"),
        "move_ms_returned": found.mean(MOVE_TIME, "returned"),
        "bytes_dropped_per_move": found.grew(MOVED_BYTES, "dropped") / left,
        "bytes_loaded_per_move": found.grew(MOVED_BYTES, "loaded") / returned,
        "prefill_tokens_recomputed": int(found.grew(PREFILL_TOKENS)) - found.num_guests,
        "tokens_compared": sum(min(map(len, pair)) for pair in pairs) if pairs else None,
        "tokens_equal": sum(_num_equal(*pair) for pair in pairs) if pairs else None,
    }


def _num_equal(one: Seq[int], other: Seq[int]) -> int:
    """Tokens before the first that differs."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def main(arguments: Seq[str] | None = None) -> int:
    """Measure and write; 1 when a case failed."""
    with open_run(_parser(), arguments) as run:
        for context in run.options.contexts:
            for arm in run.options.arms:
                crowd = Crowd(run.case(arm, context), run.options.sequences, run.options.guest_tokens)
                row = asyncio.run(_measure(run, crowd))
                run.add(row)
                print(context, arm, row["moves_per_s"], row["move_ms_returned"], flush=True)
        return run.exit_code


async def _measure(run: Run, crowd: Crowd) -> Row:
    if crowd.guests < 1:
        return row_of(run, crowd, "paging all of them makes no room for one more: raise --sequences")
    try:
        async with running_system(
            run.model,
            run.folder,
            crowd.case,
            sequences=crowd.staying,
            device=run.options.device,
            changes=crowd.changes(),
        ) as system:
            found: Found | str = await _observe(run, crowd, system)
    except (ForepageError, StartError, WindowError, OSError, grpc.aio.AioRpcError) as error:
        found = f"{type(error).__name__}: {error}"
    return row_of(run, crowd, found)


async def _observe(run: Run, crowd: Crowd, system: System) -> Found:
    async with open_channel(system.worker_address, None) as channel:
        rounds = _Rounds(system, crowd, worker_pb2_grpc.DecodeWorkerStub(channel))
        is_exact = crowd.case.arm is Arm.EXACT
        compared = await rounds.tokens_of_full(run.length, run.options.compared_tokens) if is_exact else []
        found = await rounds.run(run.length, run.options.rounds, compared)
    if not found.grew(MOVES, "left") or not found.grew(MOVES, "returned"):
        raise WindowError("no sequence moved")
    return found


def _parser() -> argparse.ArgumentParser:
    arms = [Arm.EXACT, Arm.LOOKAHEAD, Arm.GUARDED]
    parser = shared_options("loadtest.throughput.moves", __doc__, contexts=[65_536], arms=arms, choices=arms)
    parser.add_argument("--sequences", type=int, default=5, help="that stay")
    parser.add_argument("--guest-tokens", type=int, default=64, help="tokens of an answer of those that come")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compared-tokens", type=int, default=512, help="of each, in `exact`, with `full`")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
