"""What a request leaves: one trace from the client through the call, metrics, ids; never a prompt."""

import asyncio
from typing import Any

import httpx
import pytest
import structlog
from opentelemetry.trace import StatusCode

from forepage.telemetry import MetricName, SpanName
from rigs.fake_worker import ANSWER, MODEL, StartWorker, silent
from rigs.gateways import OpenedGateway, OpenGateway, ServeGateway, chat, until

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
SECRET = "s3cret-prompt"


def points(gateway: OpenedGateway, name: MetricName) -> dict[str, Any]:
    """Values (or counts) of an instrument by the one attribute that tells its points apart."""
    return {
        "|".join(f"{key}={value}" for key, value in sorted(point.attributes.items())): point
        for point in gateway.metric(name)
    }


async def test_trace_runs_from_the_client_to_the_call(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    await gateway.client.post(
        "/v1/chat/completions", json=chat(SECRET), headers={"traceparent": TRACEPARENT, "x-request-id": "r-1"}
    )
    spans = gateway.spans()
    assert set(spans) == {SpanName.HTTP_REQUEST, SpanName.GATEWAY_GENERATE}
    outer, inner = spans[SpanName.HTTP_REQUEST], spans[SpanName.GATEWAY_GENERATE]
    assert outer.parent is not None
    assert f"{outer.parent.span_id:016x}" == PARENT_ID
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    called = worker.metadata[0]["traceparent"].split("-")
    assert called[1:3] == [TRACE_ID, f"{inner.context.span_id:016x}"]
    assert outer.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "forepage.request.id": "r-1",
    }
    assert inner.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": MODEL,
        "gen_ai.usage.input_tokens": len(SECRET) + 4,
        "gen_ai.usage.output_tokens": len(ANSWER.encode()),
        "gen_ai.response.finish_reasons": ("stop",),
        "forepage.request.id": "r-1",
        "forepage.worker.id": "worker-0",
        "forepage.cached_tokens": 2,
    }


async def test_failure_marks_both_spans(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    await worker.stop()
    await gateway.client.post("/v1/chat/completions", json=chat(SECRET))
    for span in gateway.spans().values():
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["error.type"] == "dependency_unavailable"


async def test_request_id_is_echoed_or_made(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    for path in ("/v1/models", "/health/live", "/nothing"):
        reply = await gateway.client.get(path, headers={"x-request-id": "mine-1"})
        assert reply.headers["x-request-id"] == "mine-1"
    for offered in ("", "x" * 200, "with space"):
        reply = await gateway.client.get("/v1/models", headers={"x-request-id": offered})
        assert len(reply.headers["x-request-id"]) == 32
    stream = await gateway.client.post(
        "/v1/chat/completions", json=chat(stream=True), headers={"x-request-id": "mine-2"}
    )
    assert stream.headers["x-request-id"] == "mine-2"


async def test_metrics_of_an_answer(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    await gateway.client.post("/v1/chat/completions", json=chat(stream=True))
    label = f"gen_ai.operation.name=chat|gen_ai.request.model={MODEL}"
    for name in (
        MetricName.REQUEST_DURATION,
        MetricName.TIME_TO_FIRST_TOKEN,
        MetricName.TIME_PER_OUTPUT_TOKEN,
    ):
        assert list(points(gateway, name)) == [label]
        assert points(gateway, name)[label].count == 1
    counted = {key.split("=")[-1]: point.value for key, point in points(gateway, MetricName.TOKENS).items()}
    assert counted == {"input": 6, "output": len(ANSWER.encode())}
    assert points(gateway, MetricName.REQUESTS_RUNNING)[""].value == 0
    assert points(gateway, MetricName.REFUSALS) == {}


async def test_running_and_refused_requests_are_counted(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker(script=silent)
    gateway = await open_gateway(worker, max_concurrent_requests=1)
    asking = asyncio.create_task(gateway.client.post("/v1/chat/completions", json=chat()))
    await until(lambda: len(worker.requests) == 1)
    assert points(gateway, MetricName.REQUESTS_RUNNING)[""].value == 1
    await gateway.client.post("/v1/chat/completions", json=chat())
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await gateway.client.post("/v1/chat/completions", json=chat(n=0))
    await gateway.client.post("/v1/chat/completions", json=chat(model="other"))
    refused = {key.split("=")[-1]: point.value for key, point in points(gateway, MetricName.REFUSALS).items()}
    assert refused == {"rate_limit_exceeded": 1, "invalid_request_error": 1, "model_not_found": 1}
    assert not any("other" in key for key in points(gateway, MetricName.REQUEST_DURATION))


async def test_prompts_stay_out_of_logs_and_spans(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    with structlog.testing.capture_logs() as logs:
        for fields in ({}, {"stream": True}, {"n": 0}, {"max_tokens": 10**6}):
            await gateway.client.post("/v1/chat/completions", json=chat(SECRET, **fields))
        await worker.stop()
        await gateway.client.post("/v1/chat/completions", json=chat(SECRET))
    assert len(logs) == 5
    assert SECRET not in str(logs)
    ended = gateway.span_exporter.get_finished_spans()
    assert ended
    assert not any(SECRET in span.to_json() for span in ended)


async def test_probes_leave_no_spans(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    for path in ("/health/live", "/health/ready", "/metrics", "/version"):
        assert (await gateway.client.get(path)).status_code == 200
    assert gateway.spans() == {}


async def test_metrics_endpoint_serves_our_instruments(
    start_worker: StartWorker, serve_gateway: ServeGateway, capfd: pytest.CaptureFixture[str]
) -> None:
    gateway = await serve_gateway(await start_worker())
    async with httpx.AsyncClient(base_url=gateway.url) as client:
        await client.post("/v1/chat/completions", json=chat(SECRET, stream=True))
        text = (await client.get("/metrics")).text
    assert "gen_ai_server_request_duration_seconds_count{" in text
    assert 'forepage_tokens_total{gen_ai_request_model="forepage-test",gen_ai_token_type="output"' in text
    logged = capfd.readouterr().err
    assert '"event": "listening"' in logged
    assert SECRET not in logged
    assert ANSWER not in logged
