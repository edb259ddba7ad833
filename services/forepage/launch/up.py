"""`forepage up`: start, announce, watch, end in order, leave nothing behind.

One task group owns every task. Stop: SIGTERM in reverse order of start, each child with its own drain
timeout; a second signal hurries.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from forepage.launch.child import Child, ChildSpec, Patience
from forepage.launch.child_log import follow_warnings
from forepage.launch.health import dialable, gateway_url, listen_of
from forepage.launch.instance import LaunchError, instance_lock, remove_leftovers
from forepage.launch.run_card import RunCard
from forepage.launch.terminal import Terminal
from forepage.launch.wiring import (
    START_ORDER,
    check_ports,
    check_room,
    child_specs,
    placed,
    span_dir,
)
from forepage.model.spec import read_config, served_name
from forepage.settings import Settings

PATIENCE = Patience()
QUESTION = (
    "The locker code of Maria is 5512. The locker code of Peter is 8841.\n\nWhat is the locker code of Peter?"
)
"""To try; the bundled model finds things in a text, and knows nothing else."""
SpecFactory = Callable[[Settings, Path], Sequence[ChildSpec]]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_METRICS_ROLES = ("worker", "index", "coldpool")


def up(settings: Settings) -> None:
    """Run until a signal. Raises: LaunchError, with nothing of ours left running."""
    asyncio.run(run_up(settings, terminal=Terminal()))


async def run_up(
    settings: Settings,
    *,
    terminal: Terminal,
    specs: SpecFactory = child_specs,
    patience: Patience = PATIENCE,
) -> None:
    """`up` in a running loop; `specs` makes the children (tests bring their own)."""
    shm_dir, instance = settings.coldpool.shm_dir, settings.instance
    with instance_lock(shm_dir, instance):
        settings = placed(settings)
        check_ports(settings)
        check_room(settings)
        run_dir = Path(tempfile.mkdtemp(prefix=f"forepage-{instance}-"))
        children = [
            Child(spec, run_dir / f"{spec.name}.log", patience=patience, tell=terminal.tell)
            for spec in specs(settings, run_dir)
        ]
        terminal.tell(f"logs: {run_dir}")
        card = RunCard(
            pid=os.getpid(),
            started_s=time.time(),
            run_dir=str(run_dir),
            span_dir=str(span_dir(settings, run_dir)),
            addresses={role.value: dialable(listen_of(role, settings)) for role in START_ORDER},
        )
        card.leave(shm_dir, instance)
        try:
            await _supervise(children, settings=settings, terminal=terminal)
        except ExceptionGroup as failures:
            raise _first(failures) from failures
        finally:
            for child in reversed(children):  # whatever happened above: none is left
                await child.stop(asyncio.Event())
            held = remove_leftovers(shm_dir, instance)
            if held:
                terminal.tell(f"left in place, other processes hold them: {', '.join(map(str, held))}")
    terminal.tell(f"stopped; logs stay in {run_dir}")


async def _supervise(children: Sequence[Child], *, settings: Settings, terminal: Terminal) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()
    _listen_for_signals(stop, hurry)
    by_name = {child.spec.name: child for child in children}
    async with asyncio.TaskGroup() as tasks:
        lives = [
            tasks.create_task(child.live([by_name[name] for name in child.spec.after if name in by_name]))
            for child in children
        ]
        lives.append(tasks.create_task(_announce(children, settings, terminal)))
        follows = [
            tasks.create_task(follow_warnings(child.log_path, child.spec.name, terminal.tell))
            for child in children
        ]
        try:
            await stop.wait()
            terminal.tell("stopping: streams may end; Ctrl-C again to hurry")
        finally:
            for task in lives:
                task.cancel()
            await asyncio.wait(lives)  # from here on nobody starts a child
            for child in reversed(children):
                await child.stop(hurry)
            for task in follows:
                task.cancel()


def _listen_for_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, lambda: hurry.set() if stop.is_set() else stop.set())


async def _announce(children: Sequence[Child], settings: Settings, terminal: Terminal) -> None:
    """Say what is being waited for (a terminal only), then what to do with the running system."""
    with terminal.status() as show:
        waiting = list(children)
        while waiting:
            show("waiting for " + ", ".join(child.spec.name for child in waiting))
            await waiting[0].ready.wait()
            waiting = [child for child in waiting if not child.ready.is_set()]
    terminal.tell(announcement(settings))


def announcement(settings: Settings) -> str:
    """What to do with the running system. Its model is named from the folder: not every gateway tells."""
    path = settings.model.path
    url = gateway_url(settings)
    body = json.dumps(
        {
            "model": served_name(path, read_config(path)),
            "max_tokens": 48,
            "temperature": 0,
            "messages": [{"role": "user", "content": QUESTION}],
        }
    )
    ports = {role: getattr(settings, role).metrics_port for role in _METRICS_ROLES}
    others = [f"{role} http://127.0.0.1:{number}/metrics" for role, number in ports.items() if number]
    more = "; ".join(others) or "other processes: set FOREPAGE_<ROLE>__METRICS_PORT"
    page = " (in a browser: what is resident, and a box to ask)" if settings.gateway.dashboard else ""
    key = '-H "authorization: Bearer $KEY" ' if settings.gateway.api_keys is not None else ""
    return (
        f"\nforepage is up at {url}{page}\n\n"
        f"  curl {url}/v1/chat/completions {key}-H 'content-type: application/json' \\\n    -d '{body}'\n\n"
        f"metrics: {url}/metrics ({more})\n"
        f"in another terminal: `{_command()} status`, `{_command()} trace`\nCtrl-C stops everything.\n"
    )


def _command() -> str:
    """How this shell reaches the command: by its path where no environment is activated."""
    started_as = Path(sys.argv[0])
    return str(started_as) if started_as.name == "forepage" and not shutil.which("forepage") else "forepage"


def _first(failures: ExceptionGroup) -> Exception:
    """Why the group ended: the first child that failed; a bug of ours goes up as it is."""
    expected, unexpected = failures.split(LaunchError)
    if unexpected is not None or expected is None:
        return failures
    error: Exception = expected
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
