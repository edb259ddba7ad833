"""Two measurements of a running system: a soak by many clients, and more load than it can take."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from forepage.settings import ResidencyMode
from loadtest.soak.system import Holdings, System
from loadtest.soak.traffic import (
    NUM_CHECKED,
    Answered,
    Asked,
    Outcome,
    alike,
    ask,
    closed_loop,
    known,
    mixed,
    open_loop,
)

Row = dict[str, Any]
TIMEOUT_S = 300.0
WATCH_S = 0.1
SOAK_PROMISE = "every request ends in tokens or a typed error; memory, descriptors and blocks return"
OVERLOAD_PROMISE = "goodput holds; who is refused is told when to come back; no stream starves"
MAX_GROWTH_SHARE, MAX_GROWTH_BYTES = 0.1, 48 << 20
"""How much more a process may hold after the second half of the requests than after the first: the larger."""
MAX_MORE_DESCRIPTORS = 8
MIN_GOODPUT_SHARE = 0.8
"""Under overload, of what as many clients as fit got by themselves."""
MAX_GAP_S = 10.0
"""Between two pieces of a stream: longer is starving."""


@dataclass(frozen=True)
class SoakPlan:
    """How much to ask."""

    num_requests: int = 2000
    concurrency: int = 16
    seed: int = 0
    answer_scale: int = 1
    """Long answers make large batches: while one is decoded others are prefilled, one after the other."""


@dataclass(frozen=True)
class OverloadPlan:
    """`factor` times the rate that `concurrency` clients reach by themselves, for `window_s` each."""

    concurrency: int = 8
    factor: float = 4.0
    window_s: float = 20.0
    seed: int = 1


def open_client(system: System) -> httpx.AsyncClient:
    """As many connections as any plan wants; the caller closes it."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=system.url, timeout=TIMEOUT_S, limits=limits)


async def soak(system: System, plan: SoakPlan) -> Row:
    """Every kind of request by many clients; what is held half-way and at the end, nothing running."""
    async with open_client(system) as client:
        model = await _model(client)
        truth = [await ask(client, known(number, ResidencyMode.FULL), model) for number in range(NUM_CHECKED)]
        half = plan.num_requests // 2
        began_s = time.monotonic()
        async with _busiest(system) as busiest:
            first = await closed_loop(
                client, mixed(half, plan.seed, plan.answer_scale), model, concurrency=plan.concurrency
            )
            middle = await system.idle_holdings()
            rest = mixed(plan.num_requests - half, plan.seed + 1, plan.answer_scale)
            second = await closed_loop(client, rest, model, concurrency=plan.concurrency)
        took_s = time.monotonic() - began_s
    end = await system.idle_holdings()
    return _soak_row(truth, [*first, *second], middle, end) | {
        "seconds": round(took_s, 1),
        "batch_max": busiest.batch,
        "concurrency": plan.concurrency,
    }


async def overload(system: System, plan: OverloadPlan) -> Row:
    """Requests that are all alike: as many clients as fit, then arrivals at a multiple of their rate."""
    async with open_client(system) as client:
        model = await _model(client)
        began_s = time.monotonic()
        asked = _until(began_s + plan.window_s, alike(plan.seed))
        calm = await closed_loop(client, asked, model, concurrency=plan.concurrency)
        calm_s = time.monotonic() - began_s
        rate = plan.factor * len(calm) / calm_s
        asked = itertools.islice(alike(plan.seed + 1), max(1, round(rate * plan.window_s)))
        began_s = time.monotonic()
        async with _busiest(system) as busiest:
            stormy = await open_loop(client, asked, model, rate=rate)
        stormy_s = time.monotonic() - began_s
    end = await system.idle_holdings()
    return _overload_row(stormy, end, calm_rate=_num_tokens(calm) / calm_s, stormy_s=stormy_s) | {
        "offered": plan.factor,
        "batch_max": busiest.batch,
        "concurrency": plan.concurrency,
    }


@dataclass
class _Busiest:
    batch: int = 0


@asynccontextmanager
async def _busiest(system: System) -> AsyncIterator[_Busiest]:
    """The most sequences that a worker ran at once while the block lasted."""
    found = _Busiest()

    async def watch() -> None:
        while True:
            for address in system.worker_addresses:
                found.batch = max(found.batch, (await system.describe(address)).running)
            await asyncio.sleep(WATCH_S)

    watching = asyncio.create_task(watch())
    try:
        yield found
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _model(client: httpx.AsyncClient) -> str:
    name: str = (await client.get("/v1/models")).json()["data"][0]["id"]
    return name


def _until(deadline_s: float, requests: Iterator[Asked]) -> Iterator[Asked]:
    for asked in requests:
        if time.monotonic() > deadline_s:
            return
        yield asked


def _num_tokens(answers: Sequence[Answered]) -> int:
    return sum(one.num_tokens for one in answers if one.outcome is Outcome.FINISHED)


def _soak_row(truth: Sequence[Answered], answers: Sequence[Answered], middle: Holdings, end: Holdings) -> Row:
    outcomes = Counter(one.outcome for one in answers)
    finished = [one for one in answers if one.outcome is Outcome.FINISHED]
    checked = [one for one in finished if one.asked.checked is not None]
    wrong = sum(one.text != truth[one.asked.checked or 0].text for one in checked)
    lost = sum(one.asked.max_tokens - one.num_tokens for one in finished)
    unexpected = [one for one in answers if one.outcome is Outcome.FAILED and not one.asked.is_wrong]
    growth = _growth(middle.anonymous_bytes, end.anonymous_bytes)
    descriptors = _growth(middle.descriptors, end.descriptors)
    broken = [
        f"{name} grew by {grown >> 20} MiB"
        for name, grown in growth.items()
        if grown > max(MAX_GROWTH_BYTES, MAX_GROWTH_SHARE * middle.anonymous_bytes[name])
    ]
    broken += [
        f"{name} has {more} descriptors more"
        for name, more in descriptors.items()
        if more > MAX_MORE_DESCRIPTORS
    ]
    broken += [f"{name}: {count} still held" for name, count in end.leaks.items() if count]
    broken += [f"{outcomes[Outcome.UNTYPED]} answers without a type"] * (outcomes[Outcome.UNTYPED] > 0)
    broken += [f"{len(unexpected)} answers failed: {Counter(one.error for one in unexpected)}"] * bool(
        unexpected
    )
    broken += [f"{wrong} of {len(checked)} answers were not those of `full` alone"] * (wrong > 0)
    broken += [f"{lost} tokens did not come"] * (lost != 0)
    return {
        "fault": "soak: every kind of request, a fifth left by the client",
        "target": "all",
        "promised": SOAK_PROMISE,
        "outcome": "kept" if not broken else "; ".join(broken),
        "recovery_s": None,
        "wrong_tokens": wrong,
        "lost_tokens": lost,
        "leaked_blocks": end.leaked_blocks,
        "requests": len(answers),
        "outcomes": {
            one.value: count for one, count in sorted(outcomes.items(), key=lambda item: item[0].value)
        },
        "refusals": Counter(one.error for one in answers if one.outcome is Outcome.REFUSED),
        "checked_answers": len(checked),
        "memory_growth_bytes": growth,
        "descriptor_growth": descriptors,
        "why": {"recovery_s": "nothing fails"},
    }


def _overload_row(answers: Sequence[Answered], end: Holdings, *, calm_rate: float, stormy_s: float) -> Row:
    outcomes = Counter(one.outcome for one in answers)
    refused = [one for one in answers if one.outcome is Outcome.REFUSED]
    finished = [one for one in answers if one.outcome is Outcome.FINISHED]
    silent = sum(one.retry_after is None for one in refused)
    goodput = _num_tokens(answers) / stormy_s
    gap_s = max((one.longest_gap_s for one in finished), default=0.0)
    others = len(answers) - len(refused) - len(finished)
    lost = sum(one.asked.max_tokens - one.num_tokens for one in finished)
    broken = [f"goodput fell to {goodput / calm_rate:.0%}"] * (goodput < MIN_GOODPUT_SHARE * calm_rate)
    broken += [f"{silent} refusals without Retry-After"] * (silent > 0)
    broken += [f"a stream waited {gap_s:.1f} s between two pieces"] * (gap_s > MAX_GAP_S)
    broken += [f"{others} requests neither finished nor were refused: {outcomes}"] * (others > 0)
    broken += ["nothing was refused: this was no overload"] * (not refused)
    broken += [f"{name}: {count} still held" for name, count in end.leaks.items() if count]
    broken += [f"{lost} tokens did not come"] * (lost != 0)
    return {
        "fault": "overload",
        "target": "all",
        "promised": OVERLOAD_PROMISE,
        "outcome": "kept" if not broken else "; ".join(broken),
        "recovery_s": None,
        "wrong_tokens": None,
        "lost_tokens": lost,
        "leaked_blocks": end.leaked_blocks,
        "requests": len(answers),
        "finished": len(finished),
        "refused": len(refused),
        "goodput_tokens_per_s": round(goodput, 1),
        "goodput_share": round(goodput / calm_rate, 3),
        "longest_gap_s": round(gap_s, 2),
        "first_token_max_s": round(max((one.first_s or 0.0 for one in finished), default=0.0), 2),
        "why": {
            "recovery_s": "nothing fails",
            "wrong_tokens": "answers are not compared, the soak compares them",
        },
    }


def _growth(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in before}
