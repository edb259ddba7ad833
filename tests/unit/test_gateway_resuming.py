"""An answer whose worker is lost goes on at another: no token lost, none twice, or a typed error in time."""

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from forepage.rpc import worker_pb2 as pb
from forepage.telemetry import MetricName
from rigs.fake_worker import (
    ANSWER,
    FakeWorker,
    Script,
    StartWorker,
    finished,
    queued,
    silent,
    started,
    tokens,
)
from rigs.gateways import OpenedGateway, OpenGateway, ServeGateway, chat, events_of, until

DATA = ANSWER.encode()


def dying(after: int, *, code: str = "dependency_unavailable", width: int = 2) -> Script:
    """Says so many bytes of ANSWER behind what was said before, then fails."""

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        said = len(request.answered_token_ids)
        yield started(request)
        for start in range(said, said + after, width):
            yield tokens(DATA[start : start + width])
        yield pb.GenerateEvent(failed=pb.Failed(code=code, message="gone", retry_after_s=1.0))

    return script


async def going_on(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """ANSWER from where it stopped, as a worker of ours would: cut to max_tokens."""
    shown = DATA[: request.sampling.max_tokens]
    said = len(request.answered_token_ids)
    assert bytes(request.answered_token_ids) == shown[:said]
    yield started(request)
    for start in range(said, len(shown), 2):
        yield tokens(shown[start : start + 2])
    end = finished(request, len(shown), reason="STOP" if shown == DATA else "LENGTH")
    end.finished.residency.resumed_tokens = said
    yield end


async def two_workers(
    start_worker: StartWorker, open_gateway: OpenGateway, first: Script, second: Script, **settings: float
) -> tuple[OpenedGateway, list[FakeWorker]]:
    """A gateway whose requests for "Hi" begin at the first of two workers."""
    workers = [await start_worker(worker_id=name, script=second) for name in ("a", "b")]
    gateway = await open_gateway(*workers, **settings)
    await gateway.client.post("/v1/chat/completions", json=chat())
    home = next(worker for worker in workers if worker.requests)
    home.script = first
    for worker in workers:
        worker.requests.clear()
    return gateway, sorted(workers, key=lambda worker: worker is not home)


@pytest.mark.parametrize("said", [0, 1, 7, 16, len(DATA) - 1])
async def test_an_answer_goes_on_at_another_worker_from_the_tokens_so_far(
    start_worker: StartWorker, open_gateway: OpenGateway, said: int
) -> None:
    """16 is within the four bytes of a character: the text is whole all the same."""
    gateway, (home, other) = await two_workers(start_worker, open_gateway, dying(said, width=1), going_on)
    body = chat(stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(await gateway.client.post("/v1/chat/completions", json=body))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ANSWER
    assert usage["usage"]["completion_tokens"] == len(DATA)
    assert usage["usage"]["forepage"]["resumed_tokens"] == said
    (first,), (second,) = home.requests, other.requests
    assert bytes(second.answered_token_ids) == DATA[:said]
    second.ClearField("answered_token_ids")
    assert second == first, "the same request otherwise: seed, limits and constraints too"
    (point,) = gateway.metric(MetricName.FALLBACKS)
    assert point.attributes == {"forepage.fallback": "resumed_stream"}
    assert gateway.admission.running == 0


async def test_a_whole_answer_goes_on_as_well(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway, _ = await two_workers(start_worker, open_gateway, dying(4), going_on)
    reply = await gateway.client.post("/v1/chat/completions", json=chat(max_tokens=10))
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER[:10]
    assert reply.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("last", "reason"), [("", "length"), ("\n", "stop")])
async def test_an_answer_that_lost_only_its_end_is_over(
    start_worker: StartWorker, open_gateway: OpenGateway, last: str, reason: str
) -> None:
    """All its tokens had come: nobody is asked for more."""

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        yield tokens(b"12345" + last.encode())
        yield pb.GenerateEvent(failed=pb.Failed(code="dependency_unavailable", message="gone"))

    gateway, (_, other) = await two_workers(start_worker, open_gateway, script, going_on)
    body = chat(max_tokens=5 + len(last), stop_token_ids=list(last.encode()))
    reply = (await gateway.client.post("/v1/chat/completions", json=body)).json()
    assert reply["choices"][0]["message"]["content"] == "12345"
    assert reply["choices"][0]["finish_reason"] == reason
    assert reply["usage"]["completion_tokens"] == 5 + len(last)
    assert reply["usage"]["forepage"] is None, "its report was lost"
    assert not other.requests


async def test_an_answer_that_kills_its_workers_ends(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway, workers = await two_workers(start_worker, open_gateway, dying(2), dying(2), max_resumes=3)
    for worker in workers:
        worker.requests.clear()
    reply = await gateway.client.post("/v1/chat/completions", json=chat(stream=True))
    *chunks, last = events_of(reply)
    assert last["error"]["code"] == "dependency_unavailable"
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == ANSWER[:8], "what came before is kept, and nothing of it twice"
    assert sum(len(worker.requests) for worker in workers) == 4


@pytest.mark.parametrize("code", ["integrity_error", "capacity_exhausted", "internal_error"])
async def test_other_failures_are_not_resumed(
    start_worker: StartWorker, open_gateway: OpenGateway, code: str
) -> None:
    """Above all, nobody goes on from the tokens of a worker whose laws were broken."""
    gateway, (_, other) = await two_workers(start_worker, open_gateway, dying(4, code=code), going_on)
    reply = await gateway.client.post("/v1/chat/completions", json=chat())
    assert reply.json()["error"]["code"] == code
    assert not other.requests


async def test_an_answer_never_goes_on_with_other_weights(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    """Served under the same name, as in the midst of an update."""
    gateway, (home, other) = await two_workers(
        start_worker, open_gateway, dying(4), going_on, max_resumes=2, resume_wait_s=0.3
    )
    other.model_fingerprint = "fp-2"
    await gateway.directory.refresh()
    reply = await gateway.client.post("/v1/chat/completions", json=chat(stream=True))
    *chunks, last = events_of(reply)
    assert last["error"]["code"] == "dependency_unavailable"
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == ANSWER[: 4 * len(home.requests)], "what its own model said, and nothing else"
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp-1"}
    assert not other.requests


async def test_without_another_worker_the_error_comes_within_the_wait(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker(script=silent)  # one that fails by itself is asked again at once
    gateway = await open_gateway(worker, resume_wait_s=0.3)
    began_s = time.monotonic()

    async def stop_it() -> None:
        await until(lambda: len(worker.requests) == 1)
        await worker.stop()

    reply, _ = await asyncio.gather(
        gateway.client.post("/v1/chat/completions", json=chat(stream=True)), stop_it()
    )
    *_, last = events_of(reply)
    assert last["error"]["code"] == "dependency_unavailable"
    assert time.monotonic() - began_s < 5
    assert gateway.admission.running == 0


async def test_an_answer_waits_for_its_worker_to_start_again(
    start_worker: StartWorker, serve_gateway: ServeGateway
) -> None:
    """One worker only: it comes back at its address, and the stream goes on there."""
    said = asyncio.Event()

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        yield tokens(DATA[:6])
        said.set()
        await asyncio.Event().wait()

    worker = await start_worker(script=script)
    gateway = await serve_gateway(worker)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=10) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat()))
        await said.wait()
        await worker.stop()
        again = FakeWorker(script=going_on)
        await again.start(int(worker.address.rsplit(":", 1)[1]))
        try:
            reply = await asking
        finally:
            await again.stop()
    assert reply.json()["choices"][0]["message"]["content"] == ANSWER
    assert [bytes(request.answered_token_ids) for request in again.requests] == [DATA[:6]]


async def test_a_client_that_leaves_while_its_answer_moves_leaves_nothing(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway, (_, other) = await two_workers(start_worker, open_gateway, dying(4), going_on)
    other.script = queued
    asking = asyncio.create_task(gateway.client.post("/v1/chat/completions", json=chat()))
    await until(lambda: len(other.requests) == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: other.cancelled == 1)
    await until(lambda: gateway.admission.running == 0)
