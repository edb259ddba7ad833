"""Each process of a running system killed, stopped and started again, one after the other, under requests.

Every request ends in the right tokens or a typed error, what was held is given back, and the system serves as
before. The tests share one system, and each leaves it whole.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import redis

from forepage.coldpool.client import ColdPoolClient
from forepage.settings import SEEDED_MODEL, ModelSettings
from forepage.telemetry import open_telemetry
from forepage.worker.assembly import ModelFolder
from loadtest.soak.phases import SoakPlan, soak
from loadtest.soak.system import System
from rigs.chat import stream_chat
from rigs.faulty import SMALL_PAGES, Faulty, Once, code_of, short_request
from rigs.seen import Seen
from rigs.stack import REDIS, Stack, running_stack, wait_until

DOCUMENT = code_of(30)
NUM_TOKENS = 60
STOP_S = 10.0
"""How long a process stands still."""
WORKERS = ("worker", "worker-2")
SETTINGS = SMALL_PAGES | {
    "FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(4 << 20),
    "FOREPAGE_COLDPOOL__PROBE_INTERVAL_S": "0.2",
    "FOREPAGE_GATEWAY__RESUME_WAIT_S": "5",
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    logs = tmp_path_factory.mktemp("faults")
    with running_stack(logs, settings=SETTINGS, num_workers=2) as running:
        yield running
    assert running.leftovers() == []


def fill_the_arena(stack: Stack) -> None:
    """Other requests, until every slot that may be taken has been taken anew."""
    for number in range(5):
        answer = stream_chat(
            stack.url,
            [{"role": "user", "content": f"{number}{DOCUMENT}"}],
            mode="lookahead",
            max_tokens=2,
            budget_blocks=2,
        )
        assert answer.error is None


@pytest.fixture(scope="module")
def faulty(stack: Stack) -> Faulty:
    return Faulty(stack, DOCUMENT, NUM_TOKENS, WORKERS).learn(mode="full")


def test_a_killed_workers_answer_goes_on_at_another(faulty: Faulty, seen: Seen) -> None:
    stack = faulty.stack
    once = Once(lambda: stack.kill("worker"))
    answer = faulty.ask(on_chunk=once)
    assert faulty.is_right(answer)
    assert 0 < answer.forepage["resumed_tokens"] < NUM_TOKENS
    stack.start("worker")
    faulty.wait_served()
    faulty.wait_idle()
    seen(
        "killed in mid-stream",
        "worker",
        promised="the answer goes on at another worker from the tokens so far; its blocks are given back",
        recovery_s=once.stood_still_s,
        requests=2,
    )


def test_a_worker_that_slept_too_long_touches_nothing_when_it_wakes(faulty: Faulty, seen: Seen) -> None:
    """Its connections are dead, its answer went on elsewhere; the blocks that it leases are still its own."""
    stack = faulty.stack
    once = Once(lambda: stack.signal("worker", signal.SIGSTOP))
    answer = faulty.ask(on_chunk=once)
    assert faulty.is_right(answer)
    assert answer.forepage["resumed_tokens"] > 0
    fill_the_arena(faulty.stack)
    assert stack.arena().leased > 0, "what a stopped process holds is not given away"
    stack.signal("worker", signal.SIGCONT)
    faulty.wait_idle()
    faulty.wait_served()
    seen(
        "stopped for longer than any timeout, then woken",
        "worker",
        promised="the answer goes on at another worker; the sleeper's blocks stay its own until it lets go",
        recovery_s=once.stood_still_s,
        requests=8,
    )


def test_an_answer_waits_for_a_worker_that_stops_for_a_moment(faulty: Faulty, seen: Seen) -> None:
    """Shorter than the connection's patience (15 s): nothing has to move."""
    stack, stop_s = faulty.stack, 4.0

    def stop() -> None:
        stack.signal("worker", signal.SIGSTOP)
        threading.Timer(stop_s, stack.signal, ("worker", signal.SIGCONT)).start()

    once = Once(stop)
    answer = faulty.ask(on_chunk=once)
    assert faulty.is_right(answer)
    assert answer.forepage["resumed_tokens"] == 0
    assert once.stood_still_s >= stop_s / 2
    faulty.wait_idle()
    seen(
        f"stopped for {stop_s:g} s",
        "worker",
        promised="the answer waits and goes on",
        recovery_s=once.stood_still_s - stop_s,
        requests=1,
    )


def test_an_index_that_stands_still_holds_nothing_up(faulty: Faulty, seen: Seen) -> None:
    stack = faulty.stack
    once = Once(lambda: stack.signal("index", signal.SIGSTOP))
    began_s = time.monotonic()
    answer = faulty.ask(mode="guarded", on_chunk=once)
    assert answer.error is None
    assert answer.usage["completion_tokens"] == NUM_TOKENS
    report = answer.forepage
    assert report["late_plans"] + report["index_down_intervals"] + report["audits_lost"] > 0, "and says so"
    exact = faulty.ask()
    assert faulty.is_right(exact), "`exact` needs no index"
    time_left_s = STOP_S - (time.monotonic() - began_s)
    threading.Event().wait(max(0.0, time_left_s))
    stack.signal("index", signal.SIGCONT)
    faulty.wait_idle()

    def is_used_again() -> bool:
        again = faulty.ask(mode="guarded").forepage
        return bool(again["index_down_intervals"] + again["late_plans"] == 0 < again["intervals"])

    began_s = time.monotonic()
    wait_until(is_used_again, timeout_s=40, what="the index is used again")
    seen(
        f"stopped for {STOP_S:g} s",
        "index",
        promised="answers go on with the last set and say so; `exact` gives the tokens of `full`",
        recovery_s=time.monotonic() - began_s,
        wrong_tokens=None,
        requests=3,
        wrong_tokens_why="`guarded` answers are audited, not compared; the `exact` one was right",
    )


def test_live_answers_outlast_the_cold_pool_and_new_ones_are_refused(faulty: Faulty, seen: Seen) -> None:
    stack = faulty.stack
    once = Once(lambda: stack.kill("coldpool"))
    answer = faulty.ask(on_chunk=once)
    assert faulty.is_right(answer), "it goes on with the blocks that it leases"
    began_s = time.monotonic()
    refused = short_request(stack)
    assert time.monotonic() - began_s < 30
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert refused.headers["retry-after"]
    began_s = time.monotonic()
    stack.start("coldpool")
    faulty.wait_served()
    recovery_s = time.monotonic() - began_s
    faulty.wait_idle()
    seen(
        "killed in mid-stream, gone for seconds",
        "coldpool",
        promised="live answers go on; new ones are refused with Retry-After; the next one adopts every block",
        recovery_s=recovery_s,
        requests=4,
    )


def test_a_cold_pool_that_stands_still_is_waited_for(faulty: Faulty, seen: Seen) -> None:
    stack = faulty.stack
    once = Once(lambda: stack.signal("coldpool", signal.SIGSTOP))
    answer = faulty.ask(on_chunk=once)
    assert faulty.is_right(answer)
    threading.Timer(STOP_S, stack.signal, ("coldpool", signal.SIGCONT)).start()
    began_s = time.monotonic()
    asked = short_request(stack)
    assert asked.status_code == 200 or asked.json()["error"]["code"] == "dependency_unavailable"
    assert asked.status_code == 200 or asked.headers["retry-after"]
    faulty.wait_served()
    recovery_s = time.monotonic() - began_s - STOP_S
    faulty.wait_idle()
    seen(
        f"stopped for {STOP_S:g} s",
        "coldpool",
        promised="live answers go on; new ones wait, or are refused with Retry-After",
        recovery_s=max(0.0, recovery_s),
        requests=4,
    )


def test_a_killed_gateways_answers_are_let_go(faulty: Faulty, seen: Seen) -> None:
    stack = faulty.stack
    with pytest.raises(httpx.HTTPError):
        faulty.ask(on_chunk=Once(lambda: stack.kill("gateway")))
    faulty.wait_idle()
    began_s = time.monotonic()
    stack.start("gateway")
    recovery_s = time.monotonic() - began_s
    faulty.wait_served()
    seen(
        "killed in mid-stream",
        "gateway",
        promised="the client sees its connection end; what its request held is given back",
        recovery_s=recovery_s,
        requests=3,
    )


def test_a_gateway_that_stands_still_loses_nothing(faulty: Faulty, seen: Seen) -> None:
    stack = faulty.stack

    def stop() -> None:
        stack.signal("gateway", signal.SIGSTOP)
        threading.Timer(STOP_S, stack.signal, ("gateway", signal.SIGCONT)).start()

    once = Once(stop)
    answer = faulty.ask(on_chunk=once)
    assert faulty.is_right(answer)
    faulty.wait_idle()
    seen(
        f"stopped for {STOP_S:g} s",
        "gateway",
        promised="its answers go on when it does",
        recovery_s=max(0.0, once.stood_still_s - STOP_S),
        requests=1,
    )


def test_redis_may_go_and_come_back_empty(faulty: Faulty, seen: Seen) -> None:
    """A restart without a disk is a Redis that lost every write it had acknowledged."""
    stack = faulty.stack
    once = Once(lambda: stack.kill(REDIS))
    assert faulty.is_right(faulty.ask(on_chunk=once))
    assert faulty.is_right(faulty.ask()), "workers are known from before"
    began_s = time.monotonic()
    stack.start(REDIS)
    faulty.wait_served()
    recovery_s = time.monotonic() - began_s
    faulty.wait_idle()
    seen(
        "killed in mid-stream, back with every acknowledged write lost",
        "redis",
        promised="serving goes on; workers and records are listed anew",
        recovery_s=recovery_s,
        requests=4,
    )


def test_redis_that_loses_its_writes_while_it_runs(faulty: Faulty, seen: Seen) -> None:
    stack = faulty.stack

    def forget() -> None:
        with redis.Redis(port=stack.ports[REDIS]) as client:
            client.flushall()

    once = Once(forget)
    assert faulty.is_right(faulty.ask(on_chunk=once)), "a worker that is not listed keeps its streams"
    recovery_s = faulty.wait_served()
    faulty.wait_idle()
    seen(
        "loses every acknowledged write",
        "redis",
        promised="live answers go on; requests are served again once workers have renewed their cards",
        recovery_s=recovery_s,
        requests=3,
    )


def test_redis_without_memory_is_served_without(faulty: Faulty, seen: Seen) -> None:
    stack = faulty.stack
    with redis.Redis(port=stack.ports[REDIS]) as client:

        def fill() -> None:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1")

        once = Once(fill)
        assert faulty.is_right(faulty.ask(on_chunk=once))
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("x", "y")
        for _ in range(2):
            assert faulty.is_right(faulty.ask())
        client.config_set("maxmemory", "0")
    recovery_s = faulty.wait_served()
    faulty.wait_idle()
    seen(
        "out of memory",
        "redis",
        promised="serving goes on, plans are not published, the directory's writes queue",
        recovery_s=recovery_s,
        requests=5,
    )


def test_redis_that_stands_still_holds_nothing_up(faulty: Faulty, seen: Seen) -> None:
    stack = faulty.stack
    once = Once(lambda: stack.signal(REDIS, signal.SIGSTOP))
    began_s = time.monotonic()
    assert faulty.is_right(faulty.ask(on_chunk=once))
    while time.monotonic() - began_s < STOP_S:
        assert faulty.is_right(faulty.ask())
    stack.signal(REDIS, signal.SIGCONT)
    recovery_s = faulty.wait_served()
    faulty.wait_idle()
    seen(
        f"stopped for {STOP_S:g} s",
        "redis",
        promised="serving goes on",
        recovery_s=recovery_s,
        requests=4,
    )


async def test_a_full_arena_refuses_with_a_time_to_come_back(faulty: Faulty, seen: Seen) -> None:
    """Somebody else holds every slot: who asks waits as long as an admission may, then is told."""
    stack = faulty.stack
    model = ModelFolder.read(ModelSettings(path=SEEDED_MODEL))
    telemetry = open_telemetry("test", instance_id="hog")
    hog = ColdPoolClient(
        f"127.0.0.1:{stack.ports['coldpool']}",
        holder_id="hog",
        slot_bytes=model.geometry.slot_bytes,
        model_fingerprint=model.fingerprint,
        telemetry=telemetry,
    )
    await hog.attach()
    refs = await hog.reserve(stack.arena().total)
    refused = await asyncio.to_thread(short_request, faulty.stack)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "capacity_exhausted")
    assert refused.headers["retry-after"]
    await hog.release(refs)
    await hog.close()
    telemetry.close()
    recovery_s = await asyncio.to_thread(faulty.wait_served)
    await asyncio.to_thread(faulty.wait_idle)
    seen(
        "full",
        "arena",
        promised="admission waits, then refuses with Retry-After",
        recovery_s=recovery_s,
        requests=3,
    )


async def test_a_short_soak_leaves_nothing(faulty: Faulty) -> None:
    """The soak of the load tests in small, over what all the tests before this one did to the system."""
    stack = faulty.stack
    names = ("coldpool", "index", "gateway", *WORKERS)
    system = System(
        stack.url,
        f"127.0.0.1:{stack.ports['coldpool']}",
        [f"127.0.0.1:{stack.ports[name]}" for name in WORKERS],
        {name: stack.process_id(name) for name in names},
    )
    row = await soak(system, SoakPlan(num_requests=40, concurrency=8))
    assert row["outcome"] == "kept"
    outcomes = row["outcomes"]
    assert outcomes["finished"] > 20
    assert outcomes["left by the client"] > 2
    assert row["checked_answers"] > 0
