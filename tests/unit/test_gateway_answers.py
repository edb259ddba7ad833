"""Whole answers: OpenAI's objects, counts, the residency report, and what the worker is asked."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from forepage.rpc import worker_pb2 as pb
from rigs.fake_worker import ANSWER, MODEL, StartWorker, endless, started, tokens
from rigs.gateways import OpenGateway, chat, until


async def test_chat_answers_whole(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    reply = (await gateway.client.post("/v1/chat/completions", json=chat())).json()
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == MODEL
    assert reply["system_fingerprint"] == "fp-1"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = reply["usage"]
    assert usage["prompt_tokens"] == 6
    assert usage["completion_tokens"] == len(ANSWER.encode())
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_residency_report_is_readable(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    reply = (await gateway.client.post("/v1/chat/completions", json=chat())).json()
    report = reply["usage"]["forepage"]
    assert set(report) == {field.name for field in pb.ResidencyReport.DESCRIPTOR.fields}
    assert report["mode_requested"] == "guarded"
    assert report["mode_final"] == "exact"
    assert report["evidence_recall_mean"] == 0.95
    assert report["evidence_recall_min"] is None
    assert report["audited_steps"] == 3


async def test_completions_take_text_and_token_ids(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    for prompt in ("ab", [97, 98]):
        reply = await gateway.client.post(
            "/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 4}
        )
        assert reply.json()["object"] == "text_completion"
        assert reply.json()["choices"][0] == {
            "index": 0,
            "text": ANSWER[:4],
            "logprobs": None,
            "finish_reason": "length",
        }
    assert [list(request.prompt_token_ids) for request in worker.requests] == [[97, 98], [97, 98]]


async def test_chat_prompt_is_the_models_layout(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    await gateway.client.post("/v1/chat/completions", json=chat(messages=messages))
    assert list(worker.requests[0].prompt_token_ids) == [256, *b"s", 259, *b"a\n\nb", 260, 262]


async def test_every_field_reaches_the_worker(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    fields: dict[str, Any] = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "seed": -1,
        "ignore_eos": True,
        "stop_token_ids": [7, 9],
        "max_tokens": 9,
        "max_completion_tokens": 5,
        "cache_salt": "tenant",
        "user": "someone",
        "priority": -7,
        "forepage": {"mode": "exact", "min_recall": 0.5, "budget_blocks": 3},
    }
    assert (await gateway.client.post("/v1/chat/completions", json=chat(**fields))).status_code == 200
    asked = worker.requests[0]
    assert asked.sampling == pb.Sampling(
        temperature=0, top_p=0.5, top_k=7, min_p=0.25, seed=2**64 - 1, max_tokens=5, stop_token_ids=[7, 9]
    )
    assert asked.residency == pb.Residency(mode="RESIDENCY_MODE_EXACT", min_recall=0.5, budget_blocks=3)
    assert asked.cache_salt == "tenant"
    assert asked.priority == -7
    assert asked.ignore_eos


async def test_whole_numbers_may_be_written_as_fractions_and_none_is_rounded_to_off(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker)
    body = chat(max_tokens=5.0, top_k=7.0, n=1.0, priority=-3.0, seed=2.0, top_p=1e-320)
    assert (await gateway.client.post("/v1/chat/completions", json=body)).status_code == 200
    asked = worker.requests[0]
    assert (asked.sampling.max_tokens, asked.sampling.top_k, asked.sampling.seed) == (5, 7, 2)
    assert asked.priority == -3
    assert 0 < asked.sampling.top_p < 1e-37


async def test_defaults_are_neutral_and_the_seed_random(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker()
    gateway = await open_gateway(worker, default_max_tokens=11)
    fields = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "logprobs", "n", "forepage")
    nulls: dict[str, Any] = dict.fromkeys(fields)
    for _ in range(2):
        await gateway.client.post("/v1/chat/completions", json=chat(**nulls, unheard_of=1))
    first, second = (request.sampling for request in worker.requests)
    assert first == pb.Sampling(temperature=1, top_p=1, seed=first.seed, max_tokens=11, stop_token_ids=[257])
    assert first.seed != second.seed
    assert worker.requests[0].residency == pb.Residency()
    assert worker.requests[0].request_id != worker.requests[1].request_id


async def test_stop_string_cuts_the_answer_and_the_call(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        async for event in endless(request):
            yield event if event.WhichOneof("event") == "started" else tokens(b"ab--END--cd")

    worker = await start_worker(script=script)
    gateway = await open_gateway(worker)
    reply = (await gateway.client.post("/v1/chat/completions", json=chat(stop=["--END", "zz"]))).json()
    assert reply["choices"][0]["message"]["content"] == "ab"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == len("ab--END")
    assert reply["usage"]["forepage"] is None
    await until(lambda: worker.cancelled == 1)


async def test_hidden_and_broken_tokens_become_text_once(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        yield tokens([0xF0, 0x9F])
        yield tokens([0x41, 257, 0xE2])
        yield pb.GenerateEvent(finished=pb.Finished(completion_tokens=5))

    gateway = await open_gateway(await start_worker(script=script))
    reply = (await gateway.client.post("/v1/completions", json={"model": MODEL, "prompt": "x"})).json()
    assert reply["choices"][0]["text"] == "\ufffdA\ufffd"
    assert reply["usage"]["forepage"] is None


async def test_max_tokens_defaults_to_the_room_left(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    worker = await start_worker(max_context_tokens=100)
    gateway = await open_gateway(worker, default_max_tokens=512)
    body = {"model": MODEL, "prompt": [1] * 97}
    assert (await gateway.client.post("/v1/completions", json=body)).status_code == 200
    assert worker.requests[0].sampling.max_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "max_tokens"), [("x" * 100, None), ("x" * 5000, None), ("x" * 95, 6), ([1] * 100, None)]
)
async def test_too_long_a_request_never_reaches_a_worker(
    start_worker: StartWorker, open_gateway: OpenGateway, prompt: str | list[int], max_tokens: int | None
) -> None:
    worker = await start_worker(max_context_tokens=100)
    gateway = await open_gateway(worker)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens}
    reply = await gateway.client.post("/v1/completions", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert reply.json()["error"]["param"] == "prompt"
    reply = await gateway.client.post("/v1/chat/completions", json=chat("x" * 100))
    assert reply.json()["error"]["param"] == "messages"
    assert worker.requests == []


async def test_models_health_and_version(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    client = gateway.client
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["id"] == MODEL
    assert model["max_model_len"] == 1000
    assert (await client.get("/health/live")).json() == {"status": "live"}
    assert (await client.get("/health/ready")).json() == {"status": "ready"}
    assert (await client.get("/ping")).json() == {"status": "live"}
    assert (await client.get("/version")).json()["version"]
    assert "python_info" in (await client.get("/metrics")).text


async def test_load_counts_what_runs(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker())
    most = gateway.admission.max_running
    with gateway.admission.slot():
        assert (await gateway.client.get("/load")).json() == {"running": 1, "max_running": most}
    assert (await gateway.client.get("/load")).json() == {"running": 0, "max_running": most}
