"""`forepage up` with small fake children: order, restarts, failures, and that nothing stays."""

import asyncio
import errno
import io
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from forepage.launch.child import ChildSpec, Patience
from forepage.launch.health import Role
from forepage.launch.instance import LaunchError
from forepage.launch.run_card import running_card
from forepage.launch.terminal import Terminal
from forepage.launch.up import run_up
from forepage.launch.wiring import valkey_spec
from forepage.settings import ColdpoolSettings, GatewaySettings, IndexSettings, Settings, WorkerSettings

DEADLINE_S = 20.0
PATIENCE = Patience(start_s=10.0, poll_s=0.01, kill_s=0.2, first_restart_s=0.01, longest_restart_s=0.05)
FAKE_CHILD = """
import os, pathlib, signal, sys, time
name, folder, how = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
def note(text):
    with open(folder / "events", "a") as events:
        events.write(f"{text} {name} {os.getpid()}\\n")
def end(*_):
    note("ended")
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "deaf" else end)
note("started")
print('{"level": "warning", "event": "watch out", "of": "' + name + '"}', flush=True)
if how == "broken":
    print("reason of the failure", file=sys.stderr)
    sys.exit(3)
(folder / name).write_text(str(os.getpid()))
while True:
    time.sleep(0.02)
"""

LONE_PARENT = """
import asyncio, os, pathlib, sys
from forepage.launch.child import Child, ChildSpec, Patience
fake_child, folder = sys.argv[1], pathlib.Path(sys.argv[2])
async def ready():
    return True
argv = (sys.executable, "-I", "-S", "-c", fake_child, "a", str(folder), "steady")
spec = ChildSpec("a", argv, dict(os.environ), ready, drain_s=1.0)
asyncio.run(Child(spec, folder / "a.log", patience=Patience(), tell=print).live([]))
"""


class Screen(io.StringIO):
    """What the console writes to; `gone` is a terminal that was closed."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@dataclass
class FakeHost:
    """Fake children in a folder, and what they and the console said."""

    folder: Path
    output: Screen = field(default_factory=Screen)

    def spec(self, name: str, how: str = "steady", after: tuple[str, ...] = ()) -> ChildSpec:
        argv = (sys.executable, "-I", "-S", "-c", FAKE_CHILD, name, str(self.folder), how)
        return ChildSpec(
            name, argv, dict(os.environ), partial(self._is_ready, name), drain_s=0.2, after=after
        )

    async def _is_ready(self, name: str) -> bool:
        path = self.folder / name
        return path.exists() and path.read_text() != "" and is_running(int(path.read_text()))

    def events(self, kind: str) -> list[str]:
        path = self.folder / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[1] for line in lines if line.startswith(f"{kind} ")]

    def pids(self) -> list[int]:
        path = self.folder / "events"
        return sorted({int(line.split()[2]) for line in path.read_text().splitlines()})

    def settings(self) -> Settings:
        return Settings(
            gateway=GatewaySettings(port=0),
            index=IndexSettings(listen="127.0.0.1:0"),
            worker=WorkerSettings(listen="127.0.0.1:0"),
            coldpool=ColdpoolSettings(
                listen="127.0.0.1:0", shm_dir=self.folder / "shm", capacity_bytes=1 << 20
            ),
        )

    def run(self, specs: Sequence[ChildSpec]) -> Awaitable[None]:
        console = Console(file=self.output, highlight=False, markup=False, soft_wrap=True)
        return run_up(self.settings(), terminal=Terminal(console), specs=lambda *_: specs, patience=PATIENCE)

    @asynccontextmanager
    async def up(self, *specs: ChildSpec) -> AsyncIterator["asyncio.Future[None]"]:
        """The running system once it is announced; stopped by a signal at the end."""
        task = asyncio.ensure_future(self.run(specs))
        await until(lambda: task.done() or "forepage is up" in self.output.getvalue())
        try:
            yield task
        finally:
            if not task.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await task


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return FakeHost(tmp_path)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # other processes set no event of ours
            await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_up_starts_in_order_and_ends_in_reverse_order(host: FakeHost) -> None:
    async with host.up(host.spec("a"), host.spec("b", after=("a",)), host.spec("c", after=("b",))):
        assert host.events("started") == ["a", "b", "c"]
        assert "/v1/chat/completions" in host.output.getvalue()
    assert host.events("ended") == ["c", "b", "a"]
    assert not any(is_running(pid) for pid in host.pids())


async def test_up_removes_what_the_instance_left_in_shared_memory(host: FakeHost) -> None:
    async with host.up(host.spec("a")):
        (host.folder / "shm" / "forepage-default-arena").touch()
        card = running_card(host.folder / "shm", "default")
        assert card is not None
        assert card.pid == os.getpid()
        assert card.span_dir == f"{card.run_dir}/spans"
        assert set(card.addresses) == set(Role)
    assert list((host.folder / "shm").iterdir()) == []


async def test_up_refuses_a_second_one_of_the_instance(host: FakeHost) -> None:
    async with host.up(host.spec("a")):
        with pytest.raises(LaunchError, match="already running"):
            await host.run([host.spec("b")])
    assert host.events("started") == ["a"]


async def test_killed_child_is_started_again_and_said_so(host: FakeHost) -> None:
    async with host.up(host.spec("a"), host.spec("b")):
        os.kill(host.pids()[0], signal.SIGKILL)
        await until(lambda: "ready again" in host.output.getvalue())
        assert "was ended by SIGKILL; starting it again in 0.01 s" in host.output.getvalue()
        assert len(host.events("started")) == 3


async def test_child_that_ends_before_it_is_ready_fails_the_start_with_its_last_lines(host: FakeHost) -> None:
    with pytest.raises(LaunchError, match=r"(?s)b ended with exit code 3.*reason of the failure"):
        await host.run([host.spec("a"), host.spec("b", "broken", after=("a",))])
    assert host.events("ended") == ["a"]
    assert not any(is_running(pid) for pid in host.pids())


async def test_child_that_ignores_sigterm_is_killed_after_its_drain(host: FakeHost) -> None:
    async with host.up(host.spec("a", "deaf")):
        pass
    assert "a did not end within 0.2 s: killed" in host.output.getvalue()
    assert not any(is_running(pid) for pid in host.pids())


async def test_terminal_that_closes_does_not_keep_children_alive(host: FakeHost) -> None:
    async with host.up(host.spec("a"), host.spec("b")):
        host.output.gone = True
    assert host.events("ended") == ["b", "a"]
    assert list((host.folder / "shm").iterdir()) == []


async def test_second_signal_hurries(host: FakeHost) -> None:
    slow = host.spec("a", "deaf")
    slow = ChildSpec(slow.name, slow.argv, slow.environ, slow.is_ready, drain_s=1000.0)
    async with host.up(slow) as task:
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: "stopping" in host.output.getvalue())
        os.kill(os.getpid(), signal.SIGINT)
        await until(task.done)
    assert not any(is_running(pid) for pid in host.pids())


async def test_stop_during_the_start_ends_what_was_started(host: FakeHost) -> None:
    async def never() -> bool:
        return False

    stuck = host.spec("b", after=("a",))
    stuck = ChildSpec(stuck.name, stuck.argv, stuck.environ, never, drain_s=1.0, after=("a",))
    task = asyncio.ensure_future(host.run([host.spec("a"), stuck]))
    await until(lambda: host.events("started") == ["a", "b"])
    os.kill(os.getpid(), signal.SIGTERM)
    await task
    assert host.events("ended") == ["b", "a"]


async def test_warnings_of_children_reach_the_console(host: FakeHost) -> None:
    async with host.up(host.spec("a")):
        await until(lambda: "[a] warning: watch out of=a" in host.output.getvalue())


async def test_child_ends_when_its_parent_is_killed(host: FakeHost) -> None:
    argv = (sys.executable, "-c", LONE_PARENT, FAKE_CHILD, str(host.folder))
    parent = await asyncio.create_subprocess_exec(*argv)
    await until(lambda: host.events("started") == ["a"])
    parent.kill()
    await until(lambda: host.events("ended") == ["a"])
    assert await parent.wait() == -signal.SIGKILL


async def test_bundled_valkey_answers_on_its_socket_and_ends(host: FakeHost) -> None:
    spec = valkey_spec(host.folder)
    async with host.up(spec):
        assert await spec.is_ready()
    assert not await spec.is_ready()
    assert not (host.folder / "valkey.sock").exists()
