"""/tokenize and /detokenize: there and back, typed refusals, and the bounds of a generation's body."""

import pytest

from rigs.fake_worker import MODEL, StartWorker
from rigs.gateways import OpenGateway


@pytest.mark.parametrize("text", ["", "Hi there", "naïve 漢字 🙂", "</think>"])
async def test_text_comes_back(start_worker: StartWorker, open_gateway: OpenGateway, text: str) -> None:
    client = (await open_gateway(await start_worker())).client
    found = (await client.post("/tokenize", json={"model": MODEL, "prompt": text})).json()
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 1000
    back = await client.post("/detokenize", json={"model": MODEL, "tokens": found["tokens"]})
    assert back.json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "fields", "param", "status"),
    [
        ("/tokenize", {}, "prompt", 400),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user"}]}, "messages", 400),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model", 404),
        ("/detokenize", {"tokens": [0, 10**9]}, "tokens[1]", 400),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", 400),
    ],
)
async def test_refusals_name_the_field(
    start_worker: StartWorker,
    open_gateway: OpenGateway,
    path: str,
    fields: dict[str, object],
    param: str,
    status: int,
) -> None:
    client = (await open_gateway(await start_worker())).client
    reply = await client.post(path, json={"model": MODEL, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)


async def test_bodies_and_slots_are_bounded(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker(), max_concurrent_requests=1, max_body_bytes=1024)
    reply = await gateway.client.post("/tokenize", json={"model": MODEL, "prompt": "x" * 2000})
    assert reply.status_code == 413
    assert gateway.admission.running == 0
    with gateway.admission.slot():
        reply = await gateway.client.post("/detokenize", json={"model": MODEL, "tokens": []})
    assert reply.status_code == 429
