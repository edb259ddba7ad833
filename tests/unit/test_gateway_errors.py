"""Errors: OpenAI's shape everywhere, Retry-After where waiting helps, no echo. Wrong fields: another file."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from forepage.errors import CapacityError, ForepageError, RateLimitError
from forepage.rpc import worker_pb2 as pb
from forepage.rpc.edge import abort
from rigs.fake_worker import FakeWorker, StartWorker, silent, started
from rigs.gateways import JSON, SECRET, OpenedGateway, OpenGateway, chat, error_of, until


def spans_with(gateway: OpenedGateway, text: str) -> list[str]:
    """Spans are kept and sent on: they hold ids, counts and times, never text."""
    spans = gateway.span_exporter.get_finished_spans()
    assert spans
    return [span.name for span in spans if text in span.to_json()]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{", b"[" * 100_000, b'{"seed": ' + b"1" * 5000 + b"}"],
    ids=["empty", "cut", "list", "null", "text", "not-utf8", "deep", "huge-number"],
)
async def test_malformed_body_is_a_400(
    start_worker: StartWorker, open_gateway: OpenGateway, content: bytes
) -> None:
    gateway = await open_gateway(await start_worker())
    reply = await gateway.client.post("/v1/chat/completions", content=content, headers=JSON)
    assert reply.status_code == 400
    assert error_of(reply)["code"] == "invalid_request_error"


async def test_body_must_say_that_it_is_json(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    reply = await gateway.client.post(
        "/v1/completions", content=b"{}", headers={"content-type": "text/plain"}
    )
    assert reply.status_code == 400
    assert "content-type" in str(error_of(reply)["message"])


async def test_unknown_path_and_method(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    reply = await gateway.client.get("/v1/nothing")
    assert (reply.status_code, error_of(reply)["code"]) == (404, "not_found")
    reply = await gateway.client.get("/v1/completions")
    assert (reply.status_code, error_of(reply)["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/chat/completions", 400),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/gpt-9", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/tokenize", 400),
        ("GET", "/nowhere", 404),
    ],
)
async def test_an_error_names_the_request_as_the_client_did(
    start_worker: StartWorker, open_gateway: OpenGateway, method: str, path: str, status: int
) -> None:
    gateway = await open_gateway(await start_worker())
    reply = await gateway.client.request(method, path, headers={"x-request-id": "mine-7"})
    assert reply.status_code == status
    assert reply.json()["error"]["request_id"] == "mine-7"


async def test_unknown_model_is_a_404(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    reply = await gateway.client.post("/v1/chat/completions", json=chat(model="gpt-9"))
    error = error_of(reply)
    assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


async def test_without_a_worker_it_is_a_503(open_gateway: OpenGateway) -> None:
    gateway = await open_gateway()
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert (reply.status_code, error_of(reply)["code"]) == (503, "dependency_unavailable")
    assert int(reply.headers["retry-after"]) >= 1
    ready = await gateway.client.get("/health/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "no_worker"})


@pytest.mark.parametrize("announced", [True, False])
async def test_body_over_the_bound_is_a_413(
    start_worker: StartWorker, open_gateway: OpenGateway, announced: bool
) -> None:
    gateway = await open_gateway(await start_worker(), max_body_bytes=1024)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 300

    content = b"x" * 1500 if announced else chunks()
    reply = await gateway.client.post("/v1/completions", content=content)
    assert (reply.status_code, error_of(reply)["code"]) == (413, "request_too_large")
    assert gateway.admission.running == 0


async def test_over_the_concurrency_limit_is_a_429(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker, max_concurrent_requests=1)
    with gateway.admission.slot():
        reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert (reply.status_code, error_of(reply)["code"]) == (429, "rate_limit_exceeded")
    assert reply.headers["retry-after"] == "1"
    assert worker.requests == []
    assert (await gateway.client.post("/v1/chat/completions", json=chat())).status_code == 200


@pytest.mark.parametrize(
    ("code", "status", "retry_after"),
    [
        ("capacity_exhausted", 503, "7"),
        ("rate_limit_exceeded", 429, "7"),
        ("context_length_exceeded", 400, None),
        ("deadline_exceeded", 504, None),
        ("integrity_error", 500, None),
        ("something_new", 500, None),
    ],
)
async def test_failed_event_keeps_its_type(
    start_worker: StartWorker, open_gateway: OpenGateway, code: str, status: int, retry_after: str | None
) -> None:
    async def script(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield pb.GenerateEvent(failed=pb.Failed(code=code, message="no", retry_after_s=6.2))

    gateway = await open_gateway(await start_worker(script=script))
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert reply.status_code == status
    assert error_of(reply)["message"] == "no"
    assert reply.headers.get("retry-after") == retry_after


async def test_workers_name_of_the_prompt_becomes_the_clients(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        code = "context_length_exceeded"
        yield pb.GenerateEvent(failed=pb.Failed(code=code, message="no", param="prompt_token_ids"))

    gateway = await open_gateway(await start_worker(script=script))
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert (reply.status_code, error_of(reply)["param"]) == (400, "messages")


@pytest.mark.parametrize("error", [RateLimitError("full", None, 3.0), CapacityError("full", None, 3.0)])
async def test_refused_call_keeps_its_type(open_gateway: OpenGateway, error: ForepageError) -> None:
    class Refusing(FakeWorker):
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateEvent]:  # noqa: ARG002, N802
            await abort(context, error)
            yield pb.GenerateEvent()

    worker = Refusing()
    await worker.start()
    gateway = await open_gateway(worker)
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert (reply.status_code, reply.headers["retry-after"]) == (error.http_status, "3")
    assert error_of(reply)["code"] == error.code
    await worker.stop()


@pytest.mark.parametrize("stream", [True, False])
async def test_what_grpc_says_of_a_failure_is_in_the_log_and_not_in_the_answer(
    start_worker: StartWorker, open_gateway: OpenGateway, stream: bool
) -> None:
    """A defect's exception may quote the prompt; of a worker that is gone gRPC tells the address."""

    async def broken(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        raise ValueError(SECRET)

    gateway = await open_gateway(await start_worker(script=broken), resume_wait_s=0)
    with capture_logs() as logs:
        reply = await gateway.client.post("/v1/chat/completions", json=chat(stream=stream))
    assert "dependency_unavailable" in reply.text
    assert SECRET not in reply.text
    (said,) = [line for line in logs if line["event"] == "request"]
    assert said["error"] == "dependency_unavailable"
    assert SECRET in said["reason"]
    assert not spans_with(gateway, SECRET)


async def test_of_a_wrong_request_the_client_alone_is_told(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker())
    with capture_logs() as logs:
        reply = await gateway.client.post("/v1/chat/completions", json=chat(model=SECRET))
    assert reply.status_code == 404
    assert SECRET not in str(logs)


async def test_worker_that_ends_without_a_result_is_an_error(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)

    gateway = await open_gateway(await start_worker(script=script))
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert (reply.status_code, error_of(reply)["code"]) == (503, "dependency_unavailable")


async def test_deadline_is_a_504(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    worker = await start_worker(script=silent)
    gateway = await open_gateway(worker, request_timeout_s=0.2)
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert (reply.status_code, error_of(reply)["code"]) == (504, "deadline_exceeded")
    await until(lambda: worker.cancelled == 1)


@pytest.mark.parametrize("timeout_s", [0.2, 1e-9])
async def test_a_requests_own_deadline_is_a_504_that_frees_its_slot(
    start_worker: StartWorker, open_gateway: OpenGateway, timeout_s: float
) -> None:
    worker = await start_worker(script=silent)
    gateway = await open_gateway(worker)
    reply = await gateway.client.post("/v1/chat/completions", json=chat(timeout_s=timeout_s))
    assert (reply.status_code, error_of(reply)["code"]) == (504, "deadline_exceeded")
    assert "timeout_s" in str(error_of(reply)["message"])
    assert gateway.admission.running == 0
    await until(lambda: worker.cancelled == len(worker.requests))


async def test_a_request_cannot_outlive_the_servers_bound(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker(script=silent), request_timeout_s=0.2)
    reply = await gateway.client.post("/v1/chat/completions", json=chat(timeout_s=3600))
    assert (reply.status_code, error_of(reply)["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("timeout_s", [0, -1, "1"])
async def test_deadline_that_is_none_is_refused(
    start_worker: StartWorker, open_gateway: OpenGateway, timeout_s: object
) -> None:
    gateway = await open_gateway(await start_worker())
    reply = await gateway.client.post("/v1/chat/completions", json=chat(timeout_s=timeout_s))
    assert (reply.status_code, error_of(reply)["param"]) == (400, "timeout_s")


async def test_bug_is_a_500_without_details(
    start_worker: StartWorker, open_gateway: OpenGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(await start_worker())

    def broken(_: str) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(gateway.directory, "workers_for", broken)
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert (reply.status_code, error_of(reply)["code"]) == (500, "internal_error")
    assert reply.headers["x-request-id"]
    assert not spans_with(gateway, SECRET)
    assert gateway.admission.running == 0
