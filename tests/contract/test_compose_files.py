"""The compose files are valid with every overlay, and keep what docs/operations.md promises."""

import json
import os
import re
import socket
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from forepage.settings import TelemetrySettings, WorkerSettings
from forepage.settings_environment import setting_names

ROOT = Path(__file__).parents[2]
OVERLAYS = ("docker/compose.gpu.yaml", "docker/compose.observability.yaml")
COMBINATIONS = [choice for size in range(3) for choice in combinations(OVERLAYS, size)]
OURS = ("coldpool", "index", "worker", "gateway")
TORCH = {"index", "worker"}
DEFAULTS = dict.fromkeys(("BASE_IMAGE", "VALKEY_IMAGE", "GATEWAY_PORT"), "")  # whatever the shell has set
each_service = pytest.mark.parametrize("name", OURS)
each_combination = pytest.mark.parametrize(
    "overlays", COMBINATIONS, ids=lambda paths: "+".join(paths) or "plain"
)


@cache
def resolved(*overlays: str, gpus: str = "") -> dict[str, Any]:
    """The merged files, as `docker compose config` resolves them; `gpus` is WORKER_GPUS."""
    files = [part for path in ("compose.yaml", *overlays) for part in ("-f", path)]
    command = [str(Path(sys.executable).with_name("docker-compose")), *files, "config", "--format", "json"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | DEFAULTS | {"WORKER_GPUS": gpus},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def services(*overlays: str) -> dict[str, Any]:
    found: dict[str, Any] = resolved(*overlays)["services"]
    return found


def dockerfile(name: str) -> str:
    return (ROOT / "docker" / f"{name}.Dockerfile").read_text()


def size_bytes(mount_options: str) -> int:
    found = re.search(r"size=(\d+)([mg])", mount_options)
    assert found
    return int(found[1]) << {"m": 20, "g": 30}[found[2]]


def seconds(text: str) -> float:
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))


@each_combination
def test_files_are_valid_together(overlays: tuple[str, ...]) -> None:
    assert set(OURS) < set(services(*overlays))


@each_combination
def test_every_image_is_pinned(overlays: tuple[str, ...]) -> None:
    images = [service["image"] for service in services(*overlays).values() if "build" not in service]
    assert [image for image in images if not re.search(r":v?\d+\.\d+", image)] == []


@each_service
@each_combination
def test_our_services_are_confined(overlays: tuple[str, ...], name: str) -> None:
    service = services(*overlays)[name]
    assert service["user"] not in {"", "root", "0", "0:0"}
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory"}
    assert service["restart"] == "unless-stopped"


@each_service
def test_our_services_have_health_checks_of_their_own_role(name: str) -> None:
    assert services()[name]["healthcheck"]["test"] == ["CMD", "forepage", "healthy", name]
    assert f'CMD ["forepage", "healthy", "{name}"]' in dockerfile(name)


def test_services_start_after_what_they_need_is_healthy() -> None:
    needs = {name: set(services()[name]["depends_on"]) for name in OURS}
    assert needs == {
        "coldpool": {"valkey"},
        "index": {"coldpool"},
        "worker": {"coldpool", "index"},
        "gateway": {"worker"},
    }
    conditions = {need["condition"] for name in OURS for need in services()[name]["depends_on"].values()}
    assert conditions == {"service_healthy"}


@each_combination
def test_only_loopback_is_published(overlays: tuple[str, ...]) -> None:
    ports = {name: service.get("ports", []) for name, service in services(*overlays).items()}
    assert {port["host_ip"] for published in ports.values() for port in published} == {"127.0.0.1"}
    assert [name for name in OURS if ports[name]] == ["gateway"]


@pytest.mark.parametrize("overlays", [(), OVERLAYS[:1]], ids=["plain", "gpu"])
def test_arena_is_shared_and_fits(overlays: tuple[str, ...]) -> None:
    found = services(*overlays)
    for name in {"coldpool"} | TORCH:
        mounted = {volume["source"]: volume["target"] for volume in found[name]["volumes"]}
        assert mounted == {"arena": "/dev/shm", "spans": "/spans"}
    options = resolved(*overlays)["volumes"]["arena"]["driver_opts"]
    assert (options["type"], options["device"]) == ("tmpfs", "tmpfs")
    assert f"uid={found['worker']['user'].partition(':')[0]}" in options["o"]
    volume_bytes = size_bytes(options["o"])
    assert int(found["coldpool"]["environment"]["FOREPAGE_COLDPOOL__CAPACITY_BYTES"]) < volume_bytes
    assert volume_bytes < int(found["coldpool"]["deploy"]["resources"]["limits"]["memory"])


def test_spans_of_all_fit_where_forepage_trace_finds_them() -> None:
    found = services()
    for name in OURS:
        assert {"spans", found[name]["environment"]["FOREPAGE_TELEMETRY__SPAN_DIR"]} <= {
            text for volume in found[name]["volumes"] for text in (volume["source"], volume["target"])
        }
    options = resolved()["volumes"]["spans"]["driver_opts"]
    assert f"uid={found['worker']['user'].partition(':')[0]}" in options["o"]
    assert size_bytes(options["o"]) > (len(OURS) + 1) * TelemetrySettings().span_bytes


def test_replicas_of_the_worker_have_names_and_addresses_of_their_own() -> None:
    environment = services()["worker"]["environment"]
    settings = WorkerSettings(
        worker_id=environment["FOREPAGE_WORKER__WORKER_ID"],
        advertise=environment["FOREPAGE_WORKER__ADVERTISE"],
    )
    assert settings.worker_id == socket.gethostname()
    assert settings.advertise == f"{socket.gethostname()}:7103"


@each_service
def test_services_may_drain_before_they_are_killed(name: str) -> None:
    service = services()[name]
    drain_s = float(service["environment"][f"FOREPAGE_{name.upper()}__DRAIN_TIMEOUT_S"])
    assert seconds(service["stop_grace_period"]) >= drain_s + 5


@each_service
@each_combination
def test_environment_has_known_names_of_the_service_alone(overlays: tuple[str, ...], name: str) -> None:
    known = {variable for variable, _, _ in setting_names()}
    ours = {
        variable for variable in services(*overlays)[name]["environment"] if variable.startswith("FOREPAGE_")
    }
    assert ours <= known
    sections = {variable.split("__")[0] for variable in ours if "__" in variable}
    assert sections <= {f"FOREPAGE_{name.upper()}", "FOREPAGE_MODEL", "FOREPAGE_TELEMETRY"}


@each_service
def test_image_installs_one_extra_and_runs_as_nobody(name: str) -> None:
    text = dockerfile(name)
    assert re.findall(r"/source\[([\w,]+)\]", text) == [name]
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == [services()[name]["user"]]
    assert re.match(r"#.*\nARG BASE_IMAGE=python:3\.12-slim-bookworm\n", text)
    assert ("torch" in text.partition("\n")[2]) == (name in TORCH)


def test_gpu_overlay_gives_gpus_and_locked_memory() -> None:
    found = services(*OVERLAYS[:1])
    for name in TORCH:
        [device] = found[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert found[name]["ulimits"]["memlock"] == -1
        assert found[name]["build"]["dockerfile"] == f"docker/{name}.Dockerfile"
        assert found[name]["build"]["args"]["PIP_EXTRA_INDEX_URL"] == ""
        assert found[name]["tmpfs"] == ["/tmp:exec"]


@pytest.mark.parametrize(("gpus", "expected"), [("", "1"), ("4", "4")])
def test_a_model_is_split_over_the_gpus_that_the_worker_gets(gpus: str, expected: str) -> None:
    worker = resolved(*OVERLAYS[:1], gpus=gpus)["services"]["worker"]
    [device] = worker["deploy"]["resources"]["reservations"]["devices"]
    assert str(device["count"]) == worker["environment"]["FOREPAGE_WORKER__TENSOR_PARALLEL"] == expected


@each_service
def test_observability_overlay_points_our_services_at_the_collector(name: str) -> None:
    environment = services(*OVERLAYS[1:])[name]["environment"]
    assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://otel-collector:4317"
    assert environment.items() >= services()[name]["environment"].items()
