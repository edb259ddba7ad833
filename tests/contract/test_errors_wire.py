"""Every error has an HTTP and a gRPC status, and comes back from a real server as the type it was."""

from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import grpc
import pytest

from forepage import errors
from forepage.errors import ERROR_BY_CODE, CapacityError, DeadlineError, DependencyError, ForepageError
from forepage.rpc import worker_pb2 as pb
from forepage.rpc import worker_pb2_grpc as pb_grpc
from forepage.rpc.edge import abort, error_of_call, is_serving, open_channel, serving

HTTP_STATUS = {
    "internal_error": 500,
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "invalid_api_key": 401,
    "model_not_found": 404,
    "capacity_exhausted": 503,
    "rate_limit_exceeded": 429,
    "deadline_exceeded": 504,
    "dependency_unavailable": 503,
    "model_format_error": 500,
    "integrity_error": 500,
}
GRPC_STATUS = {
    "internal_error": "INTERNAL",
    "invalid_request_error": "INVALID_ARGUMENT",
    "context_length_exceeded": "INVALID_ARGUMENT",
    "invalid_api_key": "UNAUTHENTICATED",
    "model_not_found": "NOT_FOUND",
    "capacity_exhausted": "RESOURCE_EXHAUSTED",
    "rate_limit_exceeded": "RESOURCE_EXHAUSTED",
    "deadline_exceeded": "DEADLINE_EXCEEDED",
    "dependency_unavailable": "UNAVAILABLE",
    "model_format_error": "FAILED_PRECONDITION",
    "integrity_error": "DATA_LOSS",
}


class FailingWorker(pb_grpc.DecodeWorkerServicer):
    """Fails every call with the error that the test put there."""

    error: ForepageError | None = None
    status: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    async def Describe(  # noqa: N802  # the proto's name
        self, _request: pb.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DescribeReply:
        if self.error is not None:
            await abort(context, self.error)
        await context.abort(self.status, "no fields of ours")

    async def Generate(  # noqa: N802
        self, _request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateEvent]:
        yield pb.GenerateEvent(started=pb.Started())
        assert self.error is not None
        await abort(context, self.error)


@pytest.fixture
async def failing() -> AsyncIterator[tuple[FailingWorker, pb_grpc.DecodeWorkerStub]]:
    servicer = FailingWorker()

    def register(server: grpc.aio.Server) -> None:
        pb_grpc.add_DecodeWorkerServicer_to_server(servicer, server)

    async with (
        serving("127.0.0.1:0", register, tls=None, drain_s=1.0) as (port, _),
        open_channel(f"127.0.0.1:{port}", None) as channel,
    ):
        yield servicer, stub_of(channel)


def stub_of(channel: grpc.aio.Channel) -> pb_grpc.DecodeWorkerStub:
    return pb_grpc.DecodeWorkerStub(channel)


def test_every_error_has_the_statuses_of_the_table() -> None:
    assert {code: cls.http_status for code, cls in ERROR_BY_CODE.items()} == HTTP_STATUS
    assert {code: cls.grpc_status for code, cls in ERROR_BY_CODE.items()} == GRPC_STATUS
    assert all(HTTPStatus(cls.http_status) >= HTTPStatus.BAD_REQUEST for cls in ERROR_BY_CODE.values())
    assert {cls.grpc_status for cls in ERROR_BY_CODE.values()} < {status.name for status in grpc.StatusCode}


def test_codes_are_unique() -> None:
    classes = [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, ForepageError)
    ]
    assert len({cls.code for cls in classes}) == len(classes) == len(ERROR_BY_CODE)


@pytest.mark.parametrize("code", sorted(ERROR_BY_CODE))
async def test_error_survives_the_round_trip(
    failing: tuple[FailingWorker, pb_grpc.DecodeWorkerStub], code: str
) -> None:
    servicer, stub = failing
    servicer.error = ERROR_BY_CODE[code]("näher: 100 %\nline two", param="messages[0]", retry_after_s=1.5)
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await stub.Describe(pb.DescribeRequest(), timeout=10)
    events = stub.Generate(pb.GenerateRequest(), timeout=10)
    assert (await events.read()).HasField("started")
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        await events.read()
    for failure in (unary.value, streamed.value):
        back = error_of_call(failure, what="worker")
        assert type(back) is type(servicer.error)
        assert (back.message, back.param, back.retry_after_s) == (
            "näher: 100 %\nline two",
            "messages[0]",
            1.5,
        )
        assert failure.code().name == GRPC_STATUS[code]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, DependencyError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, CapacityError),
        (grpc.StatusCode.UNIMPLEMENTED, DependencyError),
    ],
)
async def test_bare_status_becomes_an_error_that_names_the_peer(
    failing: tuple[FailingWorker, pb_grpc.DecodeWorkerStub],
    status: grpc.StatusCode,
    expected: type[ForepageError],
) -> None:
    servicer, stub = failing
    servicer.status = status
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Describe(pb.DescribeRequest(), timeout=10)
    error = error_of_call(failure.value, what="worker-7")
    assert type(error) is expected
    assert "worker-7" in error.message
    assert "no fields of ours" not in error.message
    assert "no fields of ours" in str(error), "our logs have it"


async def test_nobody_there_is_a_dependency_error() -> None:
    async with open_channel("127.0.0.1:1", None) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub_of(channel).Describe(pb.DescribeRequest(), timeout=5)
    error = error_of_call(failure.value, what="worker")
    assert isinstance(error, DependencyError | DeadlineError)
    assert "127.0.0.1" not in error.message
    assert not await is_serving("127.0.0.1:1", None, timeout_s=1.0)


async def test_health_says_serving_while_the_server_runs() -> None:
    async with serving("127.0.0.1:0", lambda _server: None, tls=None, drain_s=0.1) as (port, _):
        assert await is_serving(f"127.0.0.1:{port}", None, timeout_s=5.0)
        with pytest.raises(DependencyError, match="cannot listen"):
            async with serving("256.0.0.1:99999", lambda _server: None, tls=None, drain_s=0.1):
                pass
    assert not await is_serving(f"127.0.0.1:{port}", None, timeout_s=1.0)
