"""What `forepage up` makes of the settings before any process starts."""

import socket
from pathlib import Path

import pytest

from forepage.launch.health import Role, dialable, listen_of
from forepage.launch.instance import LaunchError, instance_lock, remove_leftovers
from forepage.launch.wiring import START_ORDER, check_ports, check_room, child_specs, placed
from forepage.settings import ColdpoolSettings, GatewaySettings, IndexSettings, Settings, WorkerSettings


def any_ports(shm_dir: Path, *, capacity_bytes: int = 1 << 20) -> Settings:
    return Settings(
        gateway=GatewaySettings(port=0),
        index=IndexSettings(listen="127.0.0.1:0"),
        worker=WorkerSettings(listen="127.0.0.1:0"),
        coldpool=ColdpoolSettings(listen="127.0.0.1:0", shm_dir=shm_dir, capacity_bytes=capacity_bytes),
    )


def test_ports_of_zero_become_free_ports_that_peers_are_told(tmp_path: Path) -> None:
    settings = placed(any_ports(tmp_path))
    ports = {listen_of(role, settings).rpartition(":")[2] for role in START_ORDER}
    assert len(ports) == 4
    assert "0" not in ports
    assert settings.worker.index_address == settings.index.listen
    assert settings.worker.coldpool_address == settings.coldpool.listen
    check_ports(settings)


def test_peer_address_that_points_elsewhere_is_refused_by_name() -> None:
    settings = Settings(worker=WorkerSettings(index_address="10.0.0.7:7101"))
    with pytest.raises(LaunchError, match=r"FOREPAGE_WORKER__INDEX_ADDRESS .*FOREPAGE_INDEX__LISTEN"):
        placed(settings)


@pytest.mark.parametrize(
    ("role", "variable"), [(Role.GATEWAY, "FOREPAGE_GATEWAY__PORT"), (Role.WORKER, "FOREPAGE_WORKER__LISTEN")]
)
def test_taken_port_is_refused_by_the_name_of_its_setting(tmp_path: Path, role: Role, variable: str) -> None:
    settings = placed(any_ports(tmp_path))
    port = int(listen_of(role, settings).rpartition(":")[2])
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(LaunchError, match=f"{variable}: cannot listen on"),
    ):
        check_ports(settings)


def test_arena_larger_than_shared_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="FOREPAGE_COLDPOOL__CAPACITY_BYTES"):
        check_room(any_ports(tmp_path, capacity_bytes=1 << 60))


def test_children_get_the_bundled_valkey_only_when_no_redis_is_set(tmp_path: Path) -> None:
    bundled = child_specs(placed(any_ports(tmp_path)), tmp_path, environ={"PATH": "/bin"})
    assert [spec.name for spec in bundled] == ["valkey", *START_ORDER]
    assert bundled[1].environ["FOREPAGE_REDIS_URL"] == f"unix://{tmp_path}/valkey.sock"
    own = any_ports(tmp_path).model_copy(update={"redis_url": "redis://elsewhere"})
    specs = child_specs(placed(own), tmp_path, environ={"FOREPAGE_REDIS_URL": "redis://elsewhere"})
    assert [spec.name for spec in specs] == list(START_ORDER)
    assert specs[0].environ["FOREPAGE_REDIS_URL"] == "redis://elsewhere"


@pytest.mark.parametrize(
    ("listen", "called"),
    [
        ("0.0.0.0:7101", "127.0.0.1:7101"),
        ("[::]:7101", "[::1]:7101"),
        ("index:7101", "index:7101"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "::1"),
    ],
)
def test_wildcard_addresses_are_called_on_loopback(listen: str, called: str) -> None:
    assert dialable(listen) == called


def test_instance_lock_is_held_once_and_leaves_no_file(tmp_path: Path) -> None:
    with instance_lock(tmp_path, "a"):
        with (
            pytest.raises(LaunchError, match="already running for instance 'a'"),
            instance_lock(tmp_path, "a"),
        ):
            pass
        with instance_lock(tmp_path, "b"):
            pass
    with instance_lock(tmp_path, "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_this_instance_alone_are_removed(tmp_path: Path) -> None:
    ours = (
        "forepage-a-arena",
        "forepage-a-arena.new",
        "forepage-a-manager.lock",
        "forepage-a-holder-w.0.lock",
    )
    others = ("forepage-a-b-arena", "forepage-b-arena", "forepage-a-notes", "unrelated")
    for name in (*ours, *others):
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path, "a") == []
    assert {path.name for path in tmp_path.iterdir()} == set(others)
