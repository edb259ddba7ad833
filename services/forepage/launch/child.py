"""One supervised process: started in a group of its own, watched, started again, ended.

The child writes to its own log file and never waits on us. It is told to end (SIGTERM) when `forepage up`
is gone for whatever reason, so nothing outlives the one who would clean up.
"""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forepage.launch.child_log import last_lines
from forepage.launch.instance import LaunchError

LAST_LINES = 25
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class ChildSpec:
    """What to run, how to see that it takes work, and how long it may take to end."""

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    is_ready: Callable[[], Awaitable[bool]]
    drain_s: float
    after: tuple[str, ...] = ()  # started once these are ready


@dataclass(frozen=True)
class Patience:
    """Times of supervision, in seconds."""

    start_s: float = 600.0  # a large model loads for minutes; a child that ends is noticed at once
    poll_s: float = 0.1
    kill_s: float = 15.0  # past the drain timeout, before SIGKILL: streams are cut, exporters flushed
    first_restart_s: float = 0.5
    longest_restart_s: float = 30.0
    steady_s: float = 60.0  # a child that ran this long starts again without a longer wait


class Child:
    """Owns one process at a time. Law: while `ready` is set, the process has taken work."""

    def __init__(
        self, spec: ChildSpec, log_path: Path, *, patience: Patience, tell: Callable[[str], None]
    ) -> None:
        self.spec = spec
        self.log_path = log_path
        self.ready = asyncio.Event()
        self._patience = patience
        self._tell = tell
        self._process: asyncio.subprocess.Process | None = None
        log_path.touch(mode=0o600)

    @property
    def pid(self) -> int | None:
        """The process id, or None while there is no process."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process else None

    async def live(self, after: Sequence["Child"]) -> None:
        """Start once `after` are ready, then keep it running until cancelled.

        Raises: LaunchError when it does not become ready the first time; later it is tried again and again.
        """
        for other in after:
            await other.ready.wait()
        clock = asyncio.get_running_loop().time
        started = clock()
        process = await self._start()
        problem = await self._become_ready(process)
        if problem:
            raise LaunchError(f"{problem}. The end of {self.log_path}:\n{self._log_end()}")
        self._tell(f"{self.spec.name}: ready after {clock() - started:.1f} s")
        delay_s = self._patience.first_restart_s
        while True:
            code = await process.wait()
            self.ready.clear()
            if clock() - started > self._patience.steady_s:
                delay_s = self._patience.first_restart_s
            ended = f"{self.spec.name} {_how_it_ended(code)}; starting it again in {delay_s:g} s"
            self._tell(f"{ended}. The end of {self.log_path}:\n{self._log_end()}")
            self._signal_group(signal.SIGKILL)  # what it may have left in its group
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, self._patience.longest_restart_s)
            started = clock()
            process = await self._start()
            problem = await self._become_ready(process)
            self._tell(problem or f"{self.spec.name}: ready again after {clock() - started:.1f} s")

    async def stop(self, hurry: asyncio.Event) -> None:
        """SIGTERM, the drain timeout, SIGKILL; once `hurry` is set, SIGKILL at once."""
        process = self._process
        if process is None:
            return
        if process.returncode is not None:
            self._signal_group(signal.SIGKILL)
            return
        clock = asyncio.get_running_loop().time
        asked = clock()
        if not hurry.is_set():
            process.terminate()
        if not await self._ended(process, hurry) and not hurry.is_set():
            self._tell(f"{self.spec.name} did not end within {self.spec.drain_s:g} s: killed")
        self._signal_group(signal.SIGKILL)  # also what it may have left in its group
        await process.wait()
        self.ready.clear()
        self._tell(f"{self.spec.name}: ended after {clock() - asked:.1f} s")

    async def _start(self) -> asyncio.subprocess.Process:
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.argv,
                env=dict(self.spec.environ),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is ours alone: we end children in order
                preexec_fn=_end_with_parent if _LIBC else None,
            )
        return self._process

    async def _become_ready(self, process: asyncio.subprocess.Process) -> str | None:
        """Wait until it takes work; answers what went wrong instead."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._patience.start_s
        while process.returncode is None:
            if await self.spec.is_ready():
                self.ready.set()
                return None
            if clock() > deadline:
                return f"{self.spec.name} is not ready after {self._patience.start_s:g} s"
            await asyncio.sleep(self._patience.poll_s)
        return f"{self.spec.name} {_how_it_ended(process.returncode)} before it was ready"

    async def _ended(self, process: asyncio.subprocess.Process, hurry: asyncio.Event) -> bool:
        """Whether it ended by itself, within its drain timeout and before anyone hurried."""
        waits = [asyncio.ensure_future(process.wait()), asyncio.ensure_future(hurry.wait())]
        limit_s = self.spec.drain_s + self._patience.kill_s
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return process.returncode is not None

    def _signal_group(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _log_end(self) -> str:
        return "\n".join(f"    {line}" for line in last_lines(self.log_path, LAST_LINES))


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_with_parent() -> None:
    """Between fork and exec: SIGTERM for the child when the thread that started it (ours, main) is gone."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
