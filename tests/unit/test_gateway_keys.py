"""API keys over HTTP: who gets in, how much each may ask, and that tenants share nothing."""

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from forepage.__main__ import app
from forepage.gateway.api_keys import KEY_PREFIX, new_key, read_keys
from forepage.gateway.residency_feed import live_worker
from forepage.rpc import worker_pb2 as pb
from forepage.settings_environment import SettingsError
from rigs.fake_worker import StartWorker, answer
from rigs.gateways import OpenGateway, bearer, chat, key_file, until

CHAT = "/v1/chat/completions"


async def test_a_key_opens_and_nothing_else_does(
    start_worker: StartWorker, open_gateway: OpenGateway, tmp_path: Path
) -> None:
    key, kept = new_key("ours")
    gateway = await open_gateway(await start_worker(), api_keys=key_file(tmp_path, kept))
    for headers in (
        {},
        bearer("fp-wrong"),
        bearer(""),
        bearer(kept.sha256),
        {"authorization": f"Basic {key}"},
    ):
        for reply in (
            await gateway.client.post(CHAT, json=chat(), headers=headers),
            await gateway.client.get("/v1/models", headers=headers),
            await gateway.client.post("/tokenize", json={"prompt": "x"}, headers=headers),
            await gateway.client.get("/openapi.json", headers=headers),
        ):
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
    assert (await gateway.client.post(CHAT, json=chat(), headers=bearer(key))).status_code == 200
    for path in ("/health", "/health/live", "/health/ready", "/ping", "/version", "/metrics"):
        assert (await gateway.client.get(path)).status_code == 200, "probes have none"


async def test_the_page_and_the_api_need_no_key_without_a_file(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker())
    assert (await gateway.client.get("/")).status_code == 200
    assert (await gateway.client.post(CHAT, json=chat(), headers=bearer("anything"))).status_code == 200


async def test_a_key_asks_so_often_a_minute_and_others_are_not_held_back(
    start_worker: StartWorker, open_gateway: OpenGateway, tmp_path: Path
) -> None:
    (few, kept_few), (many, kept_many) = new_key("few", requests_per_minute=3), new_key("many")
    gateway = await open_gateway(await start_worker(), api_keys=key_file(tmp_path, kept_few, kept_many))
    codes = [
        (await gateway.client.post(CHAT, json=chat(), headers=bearer(few))).status_code for _ in range(3)
    ]
    refused = await gateway.client.post(CHAT, json=chat(), headers=bearer(few))
    assert codes == [200, 200, 200]
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (await gateway.client.post(CHAT, json=chat(), headers=bearer(many))).status_code == 200


async def test_a_key_has_so_many_requests_at_once(
    start_worker: StartWorker, open_gateway: OpenGateway, tmp_path: Path
) -> None:
    gate = asyncio.Event()

    async def held(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        await gate.wait()
        async for event in answer(request):
            yield event

    worker = await start_worker(script=held)
    key, kept = new_key("one", max_concurrent=1)
    gateway = await open_gateway(worker, api_keys=key_file(tmp_path, kept))
    first = asyncio.create_task(gateway.client.post(CHAT, json=chat(), headers=bearer(key)))
    await until(lambda: bool(worker.requests))
    second = await gateway.client.post(CHAT, json=chat(), headers=bearer(key))
    assert second.status_code == 429
    assert int(second.headers["retry-after"]) >= 1
    gate.set()
    assert (await first).status_code == 200
    assert (await gateway.client.post(CHAT, json=chat(), headers=bearer(key))).status_code == 200


async def test_tenants_never_share_a_prefix(
    start_worker: StartWorker, open_gateway: OpenGateway, tmp_path: Path
) -> None:
    """A worker shares prefixes between equal salts alone: none that one tenant can ask for is another's."""
    worker = await start_worker()
    made = [new_key("a", tenant="a"), new_key("a2", tenant="a"), new_key("b", tenant="b"), new_key("none")]
    gateway = await open_gateway(worker, api_keys=key_file(tmp_path, *(kept for _, kept in made)))
    salts: dict[str, set[str]] = {}
    for key, kept in made:
        for asked in (None, "x", '["a", ""]', '["b", "x"]'):
            worker.requests.clear()
            body = chat() if asked is None else chat(cache_salt=asked)
            assert (await gateway.client.post(CHAT, json=body, headers=bearer(key))).status_code == 200
            salts.setdefault(kept.name, set()).add(worker.requests[0].cache_salt)
    assert salts["a"] == salts["a2"]
    assert all(len(found) == 4 for found in salts.values()), "a tenant's own salts differ"
    assert not salts["a"] & salts["b"]
    assert not salts["none"] & (salts["a"] | salts["b"])


async def test_a_tenant_watches_its_own_sequences_alone(
    start_worker: StartWorker, open_gateway: OpenGateway, tmp_path: Path
) -> None:
    """Ids of sequences say whose they are, so it holds for those that another gateway started, too."""
    worker = await start_worker()
    (key_a, kept_a), (key_b, kept_b) = new_key("a", tenant="a"), new_key("b", tenant="b")
    gateway = await open_gateway(worker, api_keys=key_file(tmp_path, kept_a, kept_b))
    for key in (key_a, key_b, key_a):
        assert (await gateway.client.post(CHAT, json=chat(n=2), headers=bearer(key))).status_code == 200
    ids = [request.request_id for request in worker.requests]
    assert len({one[:8] for one in ids}) == 6, "what people read of them differs"
    assert {len(one) for one in ids} == {32}
    frame = pb.WatchFrame(sequences=[pb.WatchedSequence(request_id=one) for one in ids])

    def seen_by(tenant: str | None) -> list[str]:
        return [one["request_id"] for one in live_worker(frame, tenant)["sequences"]]

    assert seen_by("a") == [*ids[:2], *ids[4:]]
    assert seen_by("b") == ids[2:4]
    assert seen_by("") == []
    assert seen_by(None) == ids, "without keys there are no tenants"


async def test_a_web_page_may_ask_only_if_its_origin_is_named(
    start_worker: StartWorker, open_gateway: OpenGateway, tmp_path: Path
) -> None:
    _, kept = new_key("ours")
    worker, keys = await start_worker(), key_file(tmp_path, kept)
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed = await open_gateway(worker, api_keys=keys)
    assert "access-control-allow-origin" not in (await closed.client.options(CHAT, headers=ask)).headers
    opened = await open_gateway(worker, api_keys=keys, cors_origins=("https://a.example",))
    preflight = await opened.client.options(CHAT, headers=ask)
    assert preflight.status_code == 200, "a browser sends no key with it"
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    refused = await opened.client.post(CHAT, json=chat(), headers={"origin": "https://a.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example", "the page may read why"
    other = await opened.client.options(CHAT, headers={**ask, "origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    assert (other.status_code, other.json()["error"]["code"]) == (400, "cors_not_allowed")
    assert other.json()["error"]["request_id"] == other.headers["x-request-id"]
    assert other.headers["vary"].startswith("Origin"), "a cache keeps answers to different pages apart"


async def test_the_responses_api_says_what_to_use(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker())
    reply: httpx.Response = await gateway.client.post("/v1/responses", json={"input": "Hi"})
    assert reply.status_code == 404
    assert "/v1/chat/completions" in reply.json()["error"]["message"]


def test_a_new_key_is_printed_once_and_kept_as_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    made = CliRunner().invoke(app, ["new-key", "ann", "--keys", str(path), "--tenant", "t"])
    assert made.exit_code == 0
    key = made.stdout.strip()
    assert key.startswith(KEY_PREFIX)
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (kept,) = read_keys(path).values()
    assert (kept.name, kept.tenant, kept.max_concurrent) == ("ann", "t", None)
    again = CliRunner().invoke(app, ["new-key", "ann", "--keys", str(path)])
    assert again.exit_code != 0
    assert len(read_keys(path)) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"name": "a"}', '{"name": "a", "sha256": "0"}', '{"name": "a", "key": "fp-secret"}', "\udcff"],
)
def test_a_wrong_file_stops_the_start_and_is_not_quoted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(SettingsError) as caught:
        read_keys(path)
    assert "secret" not in str(caught.value)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    _, kept = new_key("a")
    with pytest.raises(SettingsError, match="line 3"):
        read_keys(key_file(tmp_path, kept, kept))
