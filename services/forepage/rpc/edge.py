"""The edge that every gRPC server and client of ours shares: errors, trace context, health, drain.

Errors cross as a status plus one trailing-metadata item with the error's fields, so the caller gets
back the same type with its `param` and `retry_after_s`.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from forepage.errors import CapacityError, DeadlineError, DependencyError, ForepageError, error_from_code
from forepage.exposure import warn_if_open
from forepage.rpc.tls import MutualTls

ERROR_KEY = "forepage-error-bin"
MAX_MESSAGE_BYTES = 64 << 20
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 15_000),  # a peer that hangs; gRPC's own default is a minute
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # else a stream silent for 80 s is killed
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_ERROR_OF_STATUS: dict[grpc.StatusCode, type[ForepageError]] = {
    grpc.StatusCode.UNAVAILABLE: DependencyError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CapacityError,
}


def open_channel(address: str, tls: MutualTls | None) -> grpc.aio.Channel:
    """A channel with our limits; the caller closes it."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    options = (*CHANNEL_OPTIONS, *tls.channel_options())
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=options)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ForepageError) -> NoReturn:
    """End a call with this error; never returns."""
    packed = json.dumps(
        {
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "retry_after_s": error.retry_after_s,
        }
    ).encode()
    status = grpc.StatusCode[error.grpc_status]
    await context.abort(status, error.message, trailing_metadata=((ERROR_KEY, packed),))
    raise AssertionError("abort returned")


def error_of_call(failure: grpc.aio.AioRpcError, *, what: str) -> ForepageError:
    """The typed error behind a failed call; `what` names the peer where only a status came back.

    What gRPC has to say of that is for our logs: the peer's address, or an exception with pieces of a prompt.
    """
    trailing = cast("Iterable[tuple[str, str | bytes]]", failure.trailing_metadata() or ())
    for key, value in trailing:
        if key == ERROR_KEY and isinstance(value, bytes):
            fields = json.loads(value)
            return error_from_code(
                fields["code"],
                fields["message"],
                param=fields["param"],
                retry_after_s=fields["retry_after_s"],
            )
    kind = _ERROR_OF_STATUS.get(failure.code(), DependencyError)
    status = failure.code().name.lower().replace("_", " ")
    return kind(f"{what}: {status}; try again", retry_after_s=1.0, details=failure.details() or "")


def metadata_of(context: grpc.aio.ServicerContext[Any, Any]) -> Mapping[str, str]:
    """The call's metadata as text, for trace context."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


@asynccontextmanager
async def serving(
    listen: str,
    register: Callable[[grpc.aio.Server], None],
    *,
    tls: MutualTls | None,
    drain_s: float,
    ready: bool = True,
) -> AsyncIterator[tuple[int, Any]]:
    """Serve while the block runs: yields the bound port and the health servicer.

    Health says SERVING at once, or (`ready` false) when the caller sets it.

    On leaving: health says NOT_SERVING, no new calls, open ones get `drain_s`, then they are cancelled.
    Raises: DependencyError when the address can't be bound.
    """
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack the aio module
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    register(server)
    try:
        warn_if_open(listen, lacks="FOREPAGE_TLS__*" if tls is None else None)
        if tls is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, tls.server_credentials())
    except RuntimeError as error:
        raise DependencyError(f"cannot listen on {listen}: is another process using the port?") from error
    status = health_pb2.HealthCheckResponse
    await servicer.set("", status.SERVING if ready else status.NOT_SERVING)
    await server.start()
    try:
        yield port, servicer
    finally:
        await servicer.enter_graceful_shutdown()
        await server.stop(drain_s)


async def is_serving(address: str, tls: MutualTls | None, *, timeout_s: float) -> bool:
    """Whether a gRPC server there answers SERVING."""
    async with open_channel(address, tls) as channel:
        try:
            reply = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=""), timeout=timeout_s
            )
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def run_until_signal(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run a process: `main` gets an event that SIGTERM or SIGINT sets, and drains when it is set."""

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    asyncio.run(body())
