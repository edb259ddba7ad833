"""One decode worker over gRPC: its load, and the streams that this gateway has open there.

`WorkerClient` owns the channel; `WorkerStream` owns one Generate call. Failures come out as typed errors.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc
from opentelemetry.trace import Span

from forepage.errors import DeadlineError, DependencyError, ForepageError, error_from_code
from forepage.gateway.routing import WorkerLoad
from forepage.rpc import worker_pb2 as pb
from forepage.rpc.edge import error_of_call, open_channel
from forepage.rpc.tls import MutualTls
from forepage.rpc.worker_pb2_grpc import DecodeWorkerStub
from forepage.trace_context import outgoing_metadata

MAX_SLOW_POLLS = 5
"""Describe calls in a row that may time out before a worker counts as gone: it may be busy in a step."""
WATCH_TIMEOUT_S = 3600.0
"""After this a watch ends, and whoever still watches begins anew."""


@dataclass(frozen=True)
class Served:
    """Which model a worker serves, as it last said."""

    model_name: str
    model_fingerprint: str
    max_context_tokens: int


class WorkerClient:
    """A worker at `address`. `wanted` is False once the directory no longer lists it."""

    def __init__(self, address: str, tls: MutualTls | None = None) -> None:
        self.address = address
        self.wanted = True
        self._channel = open_channel(address, tls)
        self._stub = DecodeWorkerStub(self._channel)
        self._said: pb.DescribeReply | None = None
        self._reachable = False
        self._slow_polls = 0
        self._streams: set[WorkerStream] = set()
        self._cut_by: ForepageError | None = None

    @property
    def usable(self) -> bool:
        """Whether new requests may go there."""
        return self.wanted and self._reachable and self._said is not None and not self._said.draining

    @property
    def served(self) -> Served | None:
        """What it serves; None until it has answered once."""
        said = self._said
        if said is None:
            return None
        return Served(said.model_name, said.model_fingerprint, said.max_context_tokens)

    @property
    def load(self) -> WorkerLoad:
        """Its load: what it said, or our own open streams where those are already more."""
        said = self._said or pb.DescribeReply()
        load = max(said.running + said.waiting, len(self._streams))
        return WorkerLoad(said.worker_id or self.address, load, said.max_running)

    @property
    def num_streams(self) -> int:
        """Calls of ours that are open."""
        return len(self._streams)

    async def poll(self, timeout_s: float) -> None:
        """Ask for load and health."""
        try:
            self._said = await self._stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as failure:
            slow = failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            self._slow_polls = self._slow_polls + 1 if slow else MAX_SLOW_POLLS
            self._reachable = self._reachable and self._slow_polls < MAX_SLOW_POLLS
        else:
            self._slow_polls = 0
            self._reachable = True

    def generate(self, request: pb.GenerateRequest, *, timeout_s: float, span: Span) -> "WorkerStream":
        """Open a Generate call under `span`; the caller closes the stream.

        Raises: what `cut_streams` got, DependencyError once it is closed.
        """
        if self._cut_by is not None:
            raise self._cut_by
        call = self._stub.Generate(request, timeout=timeout_s, metadata=outgoing_metadata(span))
        stream = WorkerStream(call, self)
        self._streams.add(stream)
        return stream

    async def watch(self) -> AsyncGenerator[pb.WatchFrame]:
        """Snapshots of what its sequences hold. Raises: the typed error that ended them."""
        call = self._stub.Watch(pb.WatchRequest(), timeout=WATCH_TIMEOUT_S)
        try:
            async for frame in call:
                yield frame
        except grpc.aio.AioRpcError as failure:
            raise error_of_call(failure, what=f"worker {self.load.worker_id}") from failure
        finally:
            call.cancel()

    def forget(self, stream: "WorkerStream") -> None:
        """A stream was closed."""
        self._streams.discard(stream)

    def cut_streams(self, error: ForepageError) -> None:
        """End every open stream with `error`, and open no more."""
        self._cut_by = error
        for stream in list(self._streams):
            stream.cut(error)

    async def close(self) -> None:
        """Close the channel; calls still open there end, and who chose this worker before gets an error."""
        if self._cut_by is None:
            self._cut_by = DependencyError(f"worker {self.load.worker_id} left; try again", retry_after_s=1.0)
        await self._channel.close(None)


class WorkerStream:
    """One Generate call. `close` cancels it on the worker unless it has ended."""

    def __init__(
        self, call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateEvent]", worker: WorkerClient
    ) -> None:
        self._call = call
        self._worker = worker
        self._cut_by: ForepageError | None = None

    @property
    def may_resume(self) -> bool:
        """Whether another worker may go on with it: it was not ended from here."""
        return self._cut_by is None

    @property
    def served(self) -> Served:
        """What the worker serves."""
        return self._worker.served or Served("", "", 0)

    @property
    def worker_id(self) -> str:
        """Who answers."""
        return self._worker.load.worker_id

    async def next_event(self) -> pb.GenerateEvent:
        """The next event; never `failed`. Raises: the typed error of a failure or of an early end."""
        if self._cut_by is not None:
            raise self._cut_by
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise _error_of(failure, self.worker_id) from failure
        except asyncio.CancelledError:
            if self._cut_by is not None:
                raise self._cut_by from None
            raise
        if not isinstance(event, pb.GenerateEvent):
            raise DependencyError(f"worker {self.worker_id} ended the stream without a result")
        if event.WhichOneof("event") == "failed":
            failed = event.failed
            raise error_from_code(
                failed.code,
                failed.message,
                param=failed.param or None,
                retry_after_s=failed.retry_after_s or None,
            )
        return event

    def cut(self, error: ForepageError) -> None:
        """Cancel the call; whoever reads gets `error`."""
        self._cut_by = error
        self._call.cancel()

    def close(self) -> None:
        """Cancel the call if it still runs, and leave the worker's list."""
        self._call.cancel()
        self._worker.forget(self)


def _error_of(failure: grpc.aio.AioRpcError, worker_id: str) -> ForepageError:
    error = error_of_call(failure, what=f"worker {worker_id}")
    if isinstance(error, DeadlineError):
        return DeadlineError(
            "the request's deadline passed: send a larger timeout_s (the server bounds it too) or less work",
            retry_after_s=None,
        )
    return error
