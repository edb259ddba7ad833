"""Builds the images, brings the stack up, uses, breaks and scales it, takes it down: `make compose-test`.

With a running Docker engine it uses that one and the images that compose.yaml names. Without one, as root on
Debian or Ubuntu (apt install docker.io debootstrap), it starts an engine of its own in a network and mount
namespace, on a base image made by debootstrap and wheels downloaded before: no registry is asked. Nothing of
it stays but --work (the root file system and the wheels, for the next run).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
PROJECT = "forepage-compose-test"
OURS = ("coldpool", "index", "worker", "gateway")
BASE_IMAGE = "forepage-base:1.0"
SUITE, PACKAGES = "bookworm", "python3,python3-venv,redis-server,ca-certificates"
BELOW_3_11_3 = "async-timeout>=4.0.3"
"""What redis asks for on Debian's Python 3.11.2 and not on a newer one that downloads for it."""
VALKEY_NAMES = {"valkey-server": "redis-server", "valkey-cli": "redis-cli"}
"""What the valkey image calls Debian's Redis."""
MAX_IMAGE_MIB = {"gateway": 700, "coldpool": 600}
"""Images without torch, base included."""
NO_NETWORK = ("--build-arg", "PIP_NO_INDEX=1")
READY_S = 600.0
TEXT = "The locker code of Maria is 5512. The locker code of Peter is 8841."
QUESTION = f"{TEXT}\n\nWhat is the locker code of Peter?"
KILL_WORKER = """
import os, signal
for entry in os.listdir("/proc"):
    if entry.isdigit() and int(entry) not in (1, os.getpid()):
        with open(f"/proc/{entry}/cmdline", "rb") as file:
            if b"forepage" in file.read():
                os.kill(int(entry), signal.SIGKILL)
"""


class Engine:
    """One Docker engine with our project on it. `environ` is that of the docker and compose commands."""

    def __init__(
        self, context: Path, environ: Mapping[str, str], build_arguments: tuple[str, ...] = ()
    ) -> None:
        self._context = context
        self.build_arguments = build_arguments
        self.environ = {**os.environ, **environ}
        self._compose = _compose_command()

    def docker(self, *arguments: str) -> str:
        """Output of a docker command."""
        return _run("docker", *arguments, environ=self.environ)

    def compose(self, *arguments: str) -> str:
        """Output of a compose command on the project."""
        command = (*self._compose, "--project-name", PROJECT, *arguments)
        return _run(*command, environ=self.environ, folder=self._context)

    def inside(self, service: str, *command: str) -> str:
        """Output of a command in the service's first container."""
        return self.compose("exec", "-T", service, *command)

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What the engine knows of the service's containers."""
        ids = self.compose("ps", "--quiet", service).split()
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", *ids)) if ids else []
        return found


def main() -> None:
    """Parse, find or start an engine, check, take down. Exit code 0 only if every check held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="kept between runs; default: a temporary folder")
    parser.add_argument("--port", default="18000", help="of the gateway, on loopback")
    parser.add_argument("--in-namespace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is taken down
    port = {"GATEWAY_PORT": options.port}
    if options.in_namespace:
        with own_engine(options.work) as reach:
            check_all(Engine(options.work / "context", reach | port, NO_NETWORK), options.port)
        return
    if _engine_answers():
        check_all(Engine(ROOT, port), options.port)
        return
    work = options.work or Path(tempfile.mkdtemp(prefix="forepage-compose-"))
    _demand_tools()
    try:
        step("base file system", lambda: make_root(work))
        step("wheels", lambda: fill_wheelhouse(work))
        step("build context", lambda: copy_context(work))
        again = [sys.executable, __file__, "--in-namespace", "--work", str(work), "--port", options.port]
        sys.exit(subprocess.run(["unshare", "--net", "--mount", *again], check=False).returncode)
    finally:
        if options.work is None:
            shutil.rmtree(work)


def check_all(engine: Engine, port: str) -> None:
    """Every check in its order; the project is taken down whatever happens."""
    url = f"http://127.0.0.1:{port}"
    try:
        step("build", lambda: engine.compose("build", *engine.build_arguments))
        step("up, every service healthy", lambda: engine.compose("up", "--detach", "--wait"))
        step("images small, confined, without others' settings", lambda: check_confinement(engine))
        first = step("a question over HTTP", lambda: ask(url))
        step("its trace in the terminal", lambda: check_trace(engine, first["id"]))
        step("a killed worker comes back", lambda: check_killed_worker(engine, url, first))
        step("two workers", lambda: check_scale(engine, url, 2))
        step("one worker again", lambda: check_scale(engine, url, 1))
    except Exception:
        print(engine.compose("logs", "--tail", "30"), flush=True)
        raise
    finally:
        engine.compose("down", "--volumes", "--remove-orphans", "--timeout", "20")
    left = engine.docker("ps", "--all", "--quiet", "--filter", f"name={PROJECT}")
    expect(not left, f"containers are left: {left}")
    volumes = engine.docker("volume", "ls", "--quiet", "--filter", f"name={PROJECT}")
    expect(not volumes, f"volumes are left: {volumes}")
    print("every check held", flush=True)


def check_confinement(engine: Engine) -> None:
    """What compose.yaml promises, seen from inside."""
    for service in OURS:
        [container] = engine.containers(service)
        names = {entry.partition("=")[0] for entry in container["Config"]["Env"]}
        sections = {
            name.removeprefix("FOREPAGE_").partition("__")[0] for name in names if "FOREPAGE_" in name
        }
        expect(
            sections <= {service.upper(), "REDIS_URL", "TELEMETRY", "MODEL"},
            f"{service} knows settings of others: {sorted(sections)}",
        )
        probe = "import os; print(os.getuid(), os.access('/', os.W_OK), os.access('/opt/forepage', os.W_OK))"
        said = engine.inside(service, "python3", "-c", probe).split()
        expect(said == ["10001", "False", "False"], f"{service}: uid, may write: {said}")
    for service, most in MAX_IMAGE_MIB.items():
        [container] = engine.containers(service)
        mib = int(engine.docker("image", "inspect", "--format", "{{.Size}}", container["Image"])) >> 20
        print(f"   {service}: {mib} MiB", flush=True)
        expect(mib <= most, f"the image of {service} has {mib} MiB, more than {most}")
        has_torch = "import importlib.util as u; print(u.find_spec('torch') is not None)"
        expect(engine.inside(service, "python3", "-c", has_torch).strip() == "False", f"{service} has torch")


def check_trace(engine: Engine, answer_id: str) -> None:
    """`forepage trace` in the gateway's container draws spans of every process."""

    def drawn() -> bool:
        try:
            text = engine.inside("gateway", "forepage", "trace", answer_id)
        except CommandError:
            return False
        wanted = ("gateway.request", "worker.prefill", "worker.decode", "coldpool.reserve", "worker.generate")
        return all(name in text for name in wanted)

    wait_until(drawn, "the trace to be complete", timeout_s=30)


def check_killed_worker(engine: Engine, url: str, before: Mapping[str, Any]) -> None:
    """SIGKILL inside: the engine starts it again, it takes work again, and answers the same."""
    [old] = engine.containers("worker")
    engine.inside("worker", "python3", "-c", KILL_WORKER)

    def is_back() -> bool:
        [new] = engine.containers("worker")
        state = new["State"]
        restarted = new["RestartCount"] > old["RestartCount"]
        return restarted and bool(state["Running"]) and state["Health"]["Status"] == "healthy"

    wait_until(is_back, "the worker to be healthy again")
    wait_until(lambda: is_ready(url), "the gateway to reach it")
    after = ask(url)
    expect(text_of(after) == text_of(before), f"{text_of(after)!r} after, {text_of(before)!r} before")


def check_scale(engine: Engine, url: str, count: int) -> None:
    """So many workers register under names of their own, and answers still come."""
    engine.compose("up", "--detach", "--wait", "--no-recreate", "--scale", f"worker={count}")

    def registered() -> bool:
        shell = "forepage status --json --index index:7101 --coldpool coldpool:7102 || true"
        found = json.loads(engine.inside("gateway", "sh", "-c", shell))
        names = {worker["described"]["worker_id"] for worker in found["workers"] if worker["described"]}
        return len(names) == len(found["workers"]) == count

    wait_until(registered, f"{count} workers")
    for _ in range(2 * count):
        ask(url)


def ask(url: str) -> dict[str, Any]:
    """One greedy answer. Raises: OSError when there is none."""
    body = {
        "model": "forepage-tiny",
        "max_tokens": 48,
        "temperature": 0,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        found: dict[str, Any] = json.load(response)
    expect(found["usage"]["completion_tokens"] > 0, f"no answer: {found}")
    return found


def text_of(answer: Mapping[str, Any]) -> str:
    """What was said."""
    return str(answer["choices"][0]["message"]["content"])


def is_ready(url: str) -> bool:
    """Whether the gateway reaches a worker."""
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def own_engine(work: Path) -> Iterator[dict[str, str]]:
    """An engine for the block, in the namespaces this process is in; yields how to reach it."""
    _run("ip", "link", "set", "lo", "up")
    with tempfile.TemporaryDirectory(prefix="forepage-engine-") as folder:
        _run("mount", "-t", "tmpfs", "tmpfs", "/run")  # its sockets and pids, seen by nobody else
        host = f"unix://{folder}/docker.sock"
        options = ["--host", host, "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"]
        options += ["--pidfile", f"{folder}/docker.pid"]
        with open(work / "dockerd.log", "wb") as log:
            daemon = subprocess.Popen(["dockerd", *options], stdout=log, stderr=log)
        environ = {
            "DOCKER_HOST": host,
            "DOCKER_BUILDKIT": "0",
            "BASE_IMAGE": BASE_IMAGE,
            "VALKEY_IMAGE": BASE_IMAGE,
        }
        try:
            reach = {**os.environ, **environ}
            wait_until(lambda: _succeeds("docker", "info", environ=reach), "the engine", timeout_s=60)
            step("import the base image", lambda: _import(work, reach))
            yield environ
        finally:
            daemon.terminate()
            daemon.wait(timeout=60)


def make_root(work: Path) -> None:
    """A minimal Debian with Python and Redis, once."""
    archive = work / "root.tar"
    if archive.exists():
        return
    root = work / "root"
    shutil.rmtree(root, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    _run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root))
    for name, target in VALKEY_NAMES.items():
        (root / "usr" / "bin" / name).symlink_to(target)
    _run("sh", "-c", f"rm -rf {root}/var/cache/apt/archives/*.deb {root}/var/lib/apt/lists/*")
    _run("tar", "--create", "--file", str(archive), "--directory", str(root), ".")
    shutil.rmtree(root)


def fill_wheelhouse(work: Path) -> None:
    """Every wheel that the images need, by this interpreter's pip: its version must be the base's."""
    wheels = work / "wheels"
    extras = ",".join(OURS)
    _run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels)),
        *("hatchling>=1.27", BELOW_3_11_3, f"{ROOT}[{extras}]"),
    )
    for own in wheels.glob("forepage-*"):
        own.unlink()


def copy_context(work: Path) -> None:
    """The files that git knows, and the wheels."""
    context = work / "context"
    shutil.rmtree(context, ignore_errors=True)
    for name in _run("git", "ls-files", folder=ROOT).splitlines():
        if (ROOT / name).is_file():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, context / name)
    for wheel in (work / "wheels").iterdir():
        os.link(wheel, context / "docker" / "wheelhouse" / wheel.name)


def step(what: str, work: Callable[[], T]) -> T:
    """Do it and say how long it took."""
    began = time.monotonic()
    print(f"== {what}", flush=True)
    result = work()
    print(f"   {time.monotonic() - began:.1f} s", flush=True)
    return result


def wait_until(holds: Callable[[], bool], what: str, *, timeout_s: float = READY_S) -> None:
    """Poll. Raises: TimeoutError."""
    give_up = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > give_up:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(1)


def expect(holds: bool, otherwise: str) -> None:
    """Raises: AssertionError that says what is wrong."""
    if not holds:
        raise AssertionError(otherwise)


class CommandError(Exception):
    """A command ended with another code than 0; the text has what it said."""


def _run(*command: str, environ: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    done = subprocess.run(
        command,
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise CommandError(
            f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def _succeeds(*command: str, environ: Mapping[str, str]) -> bool:
    try:
        _run(*command, environ=environ)
    except (CommandError, FileNotFoundError):
        return False
    return True


def _import(work: Path, environ: Mapping[str, str]) -> None:
    _run("docker", "import", str(work / "root.tar"), BASE_IMAGE, environ=environ)


def _engine_answers() -> bool:
    return _succeeds("docker", "info", environ=os.environ)


def _compose_command() -> tuple[str, ...]:
    """`docker compose`, or the stand-alone binary beside this interpreter."""
    beside = Path(sys.executable).with_name("docker-compose")
    return (str(beside),) if beside.exists() else ("docker", "compose")


def _demand_tools() -> None:
    """Raises: SystemExit that says what to install."""
    missing = [
        name for name in ("dockerd", "docker", "debootstrap", "unshare", "ip") if not shutil.which(name)
    ]
    if missing or os.geteuid() != 0:
        sys.exit(
            "compose-test: no Docker engine answers. Start one, or run this as root on Debian or Ubuntu with "
            f"docker.io and debootstrap installed (missing here: {', '.join(missing) or 'root'})"
        )


if __name__ == "__main__":
    main()
