"""The network between hosts cut and mended: gateway here, two hosts with worker and cold pool, Redis on one.

A cut says nothing to anybody: packets vanish. Each end has to find out for itself, and to let go of what the
other end held. The lookahead index is left out: a worker asks that of its own host, and `exact` needs none.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from forepage.settings import SEEDED_MODEL
from rigs.chat import Answer, stream_chat
from rigs.network import Network, NetworkError, network_of
from rigs.seen import Seen
from rigs.stack import REDIS, Stack, free_port, wait_until

MESSAGES = [
    {"role": "user", "content": "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(16))}
]
NUM_TOKENS = 40
ENDLESS_TOKENS = 20_000
"""More than a worker says before it notices that nobody is there."""
NOTICE_S = 15.0
"""A silent peer is given up after this: a ping every 10 s, 5 s for its answer."""
TOLD_S = 90.0
"""That, the wait for another worker, and what a busy machine adds."""
HOSTS = {"worker": "a", "worker-2": "b"}
STORE = "store"
pytestmark = pytest.mark.timeout(600)  # most of it passes in waiting for silence to be noticed


@dataclass
class System:
    """Processes on their hosts, the right answer, and for each worker a salt whose requests go there."""

    stack: Stack
    network: Network
    truth: str
    salts: dict[str, str]

    def ask(
        self, salt: str, *, max_tokens: int = NUM_TOKENS, on_chunk: Callable[[Answer], None] | None = None
    ) -> Answer:
        return stream_chat(
            self.stack.url,
            MESSAGES,
            mode="exact",
            budget_blocks=1,
            max_tokens=max_tokens,
            on_chunk=on_chunk,
            cache_salt=salt,
        )

    def is_right(self, answer: Answer) -> bool:
        """No token lost, none twice, none wrong."""
        counted = answer.usage.get("completion_tokens") == NUM_TOKENS
        return answer.error is None and answer.text == self.truth and counted

    def serving_worker(self) -> str:
        (name,) = [name for name in HOSTS if self.stack.worker(name).running]
        return name

    def is_idle(self, worker: str) -> bool:
        """Asked over its console: whether a host holds nothing for anybody."""
        arena, one = self.stack.arena(worker.replace("worker", "coldpool")), self.stack.worker(worker)
        blocks = (one.row_blocks_free, one.key_blocks_free, one.slots_free)
        return (
            (arena.leased, arena.writing, one.running, one.waiting, one.arena_slots_held) == (0, 0, 0, 0, 0)
            and arena.free + arena.cached == arena.total
            and blocks == (one.row_blocks_total, one.key_blocks_total, one.max_running)
        )

    def wait_idle(self, worker: str) -> None:
        wait_until(lambda: self.is_idle(worker), timeout_s=60, what=f"{worker} lets go")

    def wait_served(self, worker: str) -> float:
        """Until a request is answered rightly by this very worker; how long that took."""
        began_s = time.monotonic()

        def is_served() -> bool:
            servers: list[str] = []
            try:
                answer = self.ask(
                    self.salts[worker], on_chunk=at_chunk(5, lambda: servers.append(self.serving_worker()))
                )
            except (AssertionError, httpx.HTTPError):
                return False
            return self.is_right(answer) and servers == [worker]

        wait_until(is_served, timeout_s=120, what=f"{worker} serves")
        return time.monotonic() - began_s


def at_chunk(number: int, act: Callable[[], None]) -> Callable[[Answer], None]:
    """Act once, at a chunk of an answer."""

    def on_chunk(answer: Answer) -> None:
        if answer.num_chunks == number:
            act()

    return on_chunk


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
            {
                "FOREPAGE_INSTANCE": stack.instance,
                "FOREPAGE_MODEL__PATH": str(SEEDED_MODEL),
                "FOREPAGE_REDIS_URL": f"redis://{network.addresses[STORE]}:{ports[REDIS]}/0",
                "FOREPAGE_GATEWAY__PORT": str(ports["gateway"]),
                "FOREPAGE_GATEWAY__WORKER_POLL_S": "0.2",
                "FOREPAGE_GATEWAY__RESUME_WAIT_S": "5",
                "FOREPAGE_COLDPOOL__CAPACITY_BYTES": str(64 << 20),
                "FOREPAGE_COLDPOOL__PROBE_INTERVAL_S": "0.2",
                "FOREPAGE_WORKER__RECENT_TOKENS": "256",
                "FOREPAGE_WORKER__FULL_SHARE": "0",
                "FOREPAGE_WORKER__KV_BYTES": str(64 << 20),
                "FOREPAGE_WORKER__INDEX_ADDRESS": f"127.0.0.1:{free_port()}",
                "OMP_NUM_THREADS": "1",
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
def system(stack: Stack, network: Network) -> System:
    """Found while nothing is wrong."""
    made = System(stack, network, "", {})
    for salt in "abcdefghijklmnop":
        servers: list[str] = []
        answer = made.ask(salt, on_chunk=at_chunk(5, lambda: servers.append(made.serving_worker())))  # noqa: B023 (called at once)
        made.salts.setdefault(servers[0], salt)
        made.truth = made.truth or answer.text
        assert made.is_right(answer)
        if len(made.salts) == len(HOSTS):
            return made
    raise AssertionError("one worker gets everything")


def test_an_answer_goes_on_at_another_host_when_its_own_is_cut_off(system: System, seen: Seen) -> None:
    network = system.network
    cut_s: list[float] = []

    def cut() -> None:
        network.cut(HOSTS["worker"])
        cut_s.append(time.monotonic())

    stood_still_s = 0.0
    newest_s: float | None = None

    def on_chunk(answer: Answer) -> None:
        nonlocal stood_still_s, newest_s
        at_chunk(12, cut)(answer)
        if cut_s:
            now_s = time.monotonic()
            stood_still_s = max(stood_still_s, now_s - (newest_s or cut_s[0]))
            newest_s = now_s

    answer = system.ask(system.salts["worker"], on_chunk=on_chunk)
    assert system.is_right(answer)
    assert 0 < answer.forepage["resumed_tokens"] < NUM_TOKENS
    assert not network.reaches(HOSTS["worker"])
    for salt in system.salts.values():
        answer = system.ask(salt)
        assert system.is_right(answer), "new requests go to the host that is left"
        assert answer.forepage["resumed_tokens"] == 0, "and do not try the other first"
    system.wait_idle("worker")
    network.mend(HOSTS["worker"])
    system.wait_served("worker")
    system.wait_idle("worker-2")
    seen(
        "cut off in mid-stream, mended later",
        "a worker's host",
        promised="the answer goes on at another host from the tokens so far; its own lets go",
        recovery_s=stood_still_s,
        requests=4,
    )


def test_with_every_host_cut_off_the_error_comes_in_time_and_hosts_let_go(system: System, seen: Seen) -> None:
    """The answer would go on for minutes; its worker ends it by itself, without having heard of anybody."""
    network = system.network
    cut_s: list[float] = []

    def cut() -> None:
        for host in HOSTS.values():
            network.cut(host)
        cut_s.append(time.monotonic())

    answer = system.ask(system.salts["worker"], max_tokens=ENDLESS_TOKENS, on_chunk=at_chunk(12, cut))
    told_s = time.monotonic() - cut_s[0]
    assert answer.error is not None
    assert answer.error["code"] == "dependency_unavailable"
    assert told_s < TOLD_S
    refused = httpx.post(
        f"{system.stack.url}/v1/completions",
        json={"model": "forepage-seeded", "prompt": "x", "max_tokens": 2},
        timeout=60,
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "dependency_unavailable")
    assert refused.headers["retry-after"]
    system.wait_idle("worker")
    assert not any(map(network.reaches, HOSTS.values())), "they let go while they are cut off"
    began_s = time.monotonic()
    for host in HOSTS.values():
        network.mend(host)
    for worker in HOSTS:
        system.wait_served(worker)
    seen(
        "all cut off in mid-stream, mended later",
        "workers' hosts",
        promised="a typed error; new requests are refused with Retry-After; the hosts let go and serve again",
        recovery_s=time.monotonic() - began_s,
        requests=4,
    )


def test_redis_cut_off_holds_nothing_up(system: System, seen: Seen) -> None:
    """Neither gateway nor workers wait for it, however long a connection into nothing takes to end."""
    network = system.network
    answer = system.ask(system.salts["worker"], on_chunk=at_chunk(12, lambda: network.cut(STORE)))
    assert system.is_right(answer)
    cut_off_until_s = time.monotonic() + NOTICE_S
    num_answers = 0
    while time.monotonic() < cut_off_until_s:
        for salt in system.salts.values():
            assert system.is_right(system.ask(salt)), "workers are known from before"
            num_answers += 1
    assert not network.reaches(STORE)
    network.mend(STORE)
    recovery_s = max(system.wait_served(worker) for worker in HOSTS)
    for worker in HOSTS:
        system.wait_idle(worker)
    seen(
        f"cut off for {NOTICE_S:g} s",
        "redis's host",
        promised="serving goes on, also of new requests",
        recovery_s=recovery_s,
        requests=num_answers + 3,
    )
