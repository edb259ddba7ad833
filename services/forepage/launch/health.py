"""Whether one of our processes answers: gRPC health, the gateway's readiness, PING of Valkey.

Used by `forepage up` while it starts things and by `forepage healthy` inside containers. Never raises:
not answering is the answer no.
"""

import asyncio
import json
import ssl
from enum import StrEnum
from pathlib import Path
from typing import Any

from forepage.settings import GatewaySettings, Settings
from forepage.settings_environment import SettingsError

READY_PATH = "/health/ready"
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "[::]": "[::1]", "::": "::1"}


class Role(StrEnum):
    """The processes that `forepage <role>` runs."""

    GATEWAY = "gateway"
    INDEX = "index"
    COLDPOOL = "coldpool"
    WORKER = "worker"


async def role_is_ready(role: Role, settings: Settings, *, timeout_s: float) -> bool:
    """Whether the process of this role, on this host, takes work."""
    if role is Role.GATEWAY:
        return await _http_get(settings, READY_PATH, timeout_s=timeout_s) is not None
    from forepage.rpc.edge import is_serving  # grpc costs 0.2 s: only where it is asked for
    from forepage.rpc.tls import MutualTls

    try:
        tls = MutualTls.read(settings.tls)
    except SettingsError:  # the process itself says which file, and does not start
        return False
    return await is_serving(dialable(listen_of(role, settings)), tls, timeout_s=timeout_s)


def listen_of(role: Role, settings: Settings) -> str:
    """The host:port a role listens on."""
    match role:
        case Role.GATEWAY:
            return f"{settings.gateway.host}:{settings.gateway.port}"
        case Role.INDEX:
            return settings.index.listen
        case Role.COLDPOOL:
            return settings.coldpool.listen
        case Role.WORKER:
            return settings.worker.listen


def dialable(listen: str) -> str:
    """An address to call for an address listened on: wildcards become loopback."""
    host, colon, port = listen.rpartition(":") if not listen.startswith("::") else (listen, "", "")
    if not colon:
        return _LOOPBACK.get(listen, listen)
    return f"{_LOOPBACK.get(host, host)}:{port}"


async def http_json(settings: Settings, path: str, *, timeout_s: float) -> dict[str, Any] | None:
    """What the gateway answers there; None if it does not answer 200."""
    body = await _http_get(settings, path, timeout_s=timeout_s)
    found: dict[str, Any] | None = None if body is None else json.loads(body)
    return found


async def _http_get(settings: Settings, path: str, *, timeout_s: float) -> bytes | None:
    """The body of the gateway's 200, else None; HTTP/1.0, so that it comes in one piece."""
    host, port = dialable(settings.gateway.host), settings.gateway.port
    request = f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=_trusted(settings.gateway))
            head, _, body = (await _ask(reader, writer, request.encode())).partition(b"\r\n\r\n")
    except (OSError, TimeoutError):
        return None
    return body if head.split(b" ", 2)[1:2] == [b"200"] else None


def gateway_url(settings: Settings) -> str:
    """Of this host's gateway, as a client here calls it."""
    scheme = "http" if settings.gateway.tls_cert is None else "https"
    return f"{scheme}://{dialable(settings.gateway.host)}:{settings.gateway.port}"


def _trusted(gateway: GatewaySettings) -> ssl.SSLContext | None:
    """Only the very certificate that the gateway was told to show, whatever name is in it; None: plain."""
    if gateway.tls_cert is None:
        return None
    context = ssl.create_default_context(cafile=str(gateway.tls_cert))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


async def valkey_is_ready(socket_path: Path, *, timeout_s: float) -> bool:
    """Whether a Valkey or Redis server answers PING on this unix socket."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(str(socket_path))
            return await _ask(reader, writer, b"PING\r\nQUIT\r\n") == b"+PONG\r\n+OK\r\n"
    except (OSError, TimeoutError):
        return False


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
    """The answer, up to the end of the connection."""
    try:
        writer.write(request)
        await writer.drain()
        return await reader.read()
    finally:
        writer.close()
