"""The network between hosts cut and mended: gateway here, two hosts with worker and cold pool, Redis on one.

A cut says nothing to anybody: packets vanish. Each end has to find out for itself, and to let go of what the
other end held. The lookahead index is left out: a worker asks that of its own host, and `exact` needs none.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from forepage.settings import SEEDED_MODEL
from rigs.faulty import SMALL_PAGES, Faulty, Once, code_of, is_idle, short_request
from rigs.network import Network, NetworkError, network_of
from rigs.seen import Seen
from rigs.stack import REDIS, Stack, free_port, wait_until

NUM_TOKENS = 40
ENDLESS_TOKENS = 20_000
"""More than a worker says before it notices that nobody is there."""
NOTICE_S = 15.0
"""A silent peer is given up after this: a ping every 10 s, 5 s for its answer."""
TOLD_S = 90.0
"""That, the wait for another worker, and what a busy machine adds."""
SERVED_S = 120.0
"""After a cut connections are tried again only now and then."""
HOSTS = {"worker": "a", "worker-2": "b"}
STORE = "store"
pytestmark = pytest.mark.timeout(600)  # most of it passes in waiting for silence to be noticed


def wait_idle(system: Faulty, worker: str) -> None:
    """Asked over its console: until a host holds nothing for anybody."""
    coldpool = worker.replace("worker", "coldpool")
    what = f"{worker} lets go"
    wait_until(lambda: is_idle(system.stack, [worker], coldpool), timeout_s=60, what=what)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with ExitStack() as made:
        try:
            network = made.enter_context(network_of([*HOSTS.values(), STORE]))
        except NetworkError as error:
            pytest.skip(f"no network of hosts can be made here: {error}")
        yield network


@pytest.fixture(autouse=True)
def mended(network: Network) -> Iterator[None]:
    """A test that fails leaves no cable pulled for the next."""
    yield
    for name in network.hosts:
        network.mend(name)


@pytest.fixture(scope="module")
def stack(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    names = [REDIS, *(name.replace("worker", "coldpool") for name in HOSTS), *HOSTS, "gateway"]
    ports = {name: free_port() for name in names}
    with tempfile.TemporaryDirectory(prefix="fp-", dir="/dev/shm") as memory:
        stack = Stack(
            f"test-{os.getpid()}",
            {
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("FOREPAGE_", "OTEL_"))
            },
            ports,
            tmp_path_factory.mktemp("network"),
            Path(memory),
            hosts={REDIS: network.hosts[STORE]},
        )
        stack.environ.update(
            SMALL_PAGES
            | {
                "FOREPAGE_INSTANCE": stack.instance,
                "FOREPAGE_MODEL__PATH": str(SEEDED_MODEL),
                "FOREPAGE_REDIS_URL": f"redis://{network.addresses[STORE]}:{ports[REDIS]}/0",
                "FOREPAGE_GATEWAY__PORT": str(ports["gateway"]),
                "FOREPAGE_GATEWAY__RESUME_WAIT_S": "5",
                "FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(64 << 20),
                "FOREPAGE_COLDPOOL__PROBE_INTERVAL_S": "0.2",
                "FOREPAGE_WORKER__KV_BYTES": str(64 << 20),
                "FOREPAGE_WORKER__INDEX_ADDRESS": f"127.0.0.1:{free_port()}",
            }
        )
        for worker, host in HOSTS.items():
            coldpool = worker.replace("worker", "coldpool")
            folder = Path(memory, host)
            folder.mkdir()
            stack.hosts |= {coldpool: network.hosts[host], worker: network.hosts[host]}
            stack.more_environ[coldpool] = {
                "FOREPAGE_COLDPOOL__LISTEN": f"0.0.0.0:{ports[coldpool]}",
                "FOREPAGE_COLDPOOL__SHM_DIR": str(folder),
            }
            stack.more_environ[worker] = {
                "FOREPAGE_WORKER__WORKER_ID": worker,
                "FOREPAGE_WORKER__LISTEN": f"0.0.0.0:{ports[worker]}",
                "FOREPAGE_WORKER__ADVERTISE": f"{network.addresses[host]}:{ports[worker]}",
                "FOREPAGE_WORKER__COLDPOOL_ADDRESS": f"127.0.0.1:{ports[coldpool]}",
            }
        try:
            for name in names:
                stack.start(name)
            yield stack
        finally:
            stack.stop()


@pytest.fixture(scope="module")
def system(stack: Stack) -> Faulty:
    return Faulty(stack, code_of(16), NUM_TOKENS, tuple(HOSTS)).learn(mode="exact")


def test_an_answer_goes_on_at_another_host_when_its_own_is_cut_off(
    system: Faulty, network: Network, seen: Seen
) -> None:
    once = Once(lambda: network.cut(HOSTS["worker"]))
    answer = system.ask(on_chunk=once)
    assert system.is_right(answer)
    assert 0 < answer.forepage["resumed_tokens"] < NUM_TOKENS
    assert not network.reaches(HOSTS["worker"])
    for worker in HOSTS:
        answer = system.ask(worker)
        assert system.is_right(answer), "new requests go to the host that is left"
        assert answer.forepage["resumed_tokens"] == 0, "and do not try the other first"
    wait_idle(system, "worker")
    network.mend(HOSTS["worker"])
    system.wait_served("worker", timeout_s=SERVED_S)
    wait_idle(system, "worker-2")
    seen(
        "cut off in mid-stream, mended later",
        "a worker's host",
        promised="the answer goes on at another host from the tokens so far; its own lets go",
        recovery_s=once.stood_still_s,
        requests=4,
    )


def test_with_every_host_cut_off_the_error_comes_in_time_and_hosts_let_go(
    system: Faulty, network: Network, seen: Seen
) -> None:
    """The answer would go on for minutes; its worker ends it by itself, without having heard of anybody."""
    cut_s: list[float] = []

    def cut() -> None:
        for host in HOSTS.values():
            network.cut(host)
        cut_s.append(time.monotonic())

    answer = system.ask(max_tokens=ENDLESS_TOKENS, on_chunk=Once(cut))
    told_s = time.monotonic() - cut_s[0]
    assert answer.error is not None
    assert answer.error["code"] == "dependency_unavailable"
    assert told_s < TOLD_S
    refused = short_request(system.stack)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert refused.headers["retry-after"]
    wait_idle(system, "worker")
    assert not any(map(network.reaches, HOSTS.values())), "they let go while they are cut off"
    began_s = time.monotonic()
    for host in HOSTS.values():
        network.mend(host)
    for worker in HOSTS:
        system.wait_served(worker, timeout_s=SERVED_S)
    seen(
        "all cut off in mid-stream, mended later",
        "workers' hosts",
        promised="a typed error; new requests are refused with Retry-After; the hosts let go and serve again",
        recovery_s=time.monotonic() - began_s,
        requests=4,
    )


def test_redis_cut_off_holds_nothing_up(system: Faulty, network: Network, seen: Seen) -> None:
    """Neither gateway nor workers wait for it, however long a connection into nothing takes to end."""
    answer = system.ask(on_chunk=Once(lambda: network.cut(STORE)))
    assert system.is_right(answer)
    cut_off_until_s = time.monotonic() + NOTICE_S
    num_answers = 0
    while time.monotonic() < cut_off_until_s:
        for worker in HOSTS:
            assert system.is_right(system.ask(worker)), "workers are known from before"
            num_answers += 1
    assert not network.reaches(STORE)
    network.mend(STORE)
    recovery_s = max(system.wait_served(worker, timeout_s=SERVED_S) for worker in HOSTS)
    for worker in HOSTS:
        wait_idle(system, worker)
    seen(
        f"cut off for {NOTICE_S:g} s",
        "redis's host",
        promised="serving goes on, also of new requests",
        recovery_s=recovery_s,
        requests=num_answers + 3,
    )
