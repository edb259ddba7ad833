"""`forepage status`: who answers, who is down, and what a worker's sequences hold."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from forepage import __main__ as cli
from forepage.console.status import GpuStatus, ProcessStatus, Status, WorkerStatus, parse_gpus, read_status
from forepage.console.status_view import status_json, status_view
from forepage.launch.health import Role
from forepage.launch.instance import instance_lock, lock_path
from forepage.launch.run_card import RunCard, running_card
from forepage.rpc import coldpool_pb2
from forepage.rpc import worker_pb2 as pb
from forepage.settings import ColdpoolSettings, GatewaySettings, IndexSettings, Settings, WorkerSettings
from rigs.fake_worker import MODEL, StartWorker
from rigs.watching import resident_bits

NOBODY = "127.0.0.1:1"
SEQUENCE = pb.WatchedSequence(
    request_id="r-1",
    phase=pb.SEQUENCE_PHASE_DECODE,
    mode=pb.RESIDENCY_MODE_GUARDED,
    prompt_tokens=12_000,
    generated_tokens=64,
    num_blocks=47,
    resident=resident_bits(range(17), 47),
    evidence_recall=0.5,
    kv_footprint=0.361,
)


def settings(shm_dir: Path, **gateway: object) -> Settings:
    return Settings(
        gateway=GatewaySettings(port=1, **gateway),
        index=IndexSettings(listen=NOBODY),
        worker=WorkerSettings(listen=NOBODY),
        coldpool=ColdpoolSettings(listen=NOBODY, shm_dir=shm_dir),
    )


def card(**addresses: str) -> RunCard:
    return RunCard(7, 0.0, "/run", "/run/spans", dict.fromkeys(Role, NOBODY) | addresses)


def text_of(status: Status) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(status_view(status))
    return console.export_text()


async def test_a_worker_is_described_with_its_sequences(start_worker: StartWorker, tmp_path: Path) -> None:
    worker = await start_worker(running=1, shown=[SEQUENCE])
    found = await read_status(settings(tmp_path, worker_addresses=(worker.address,)))
    [seen] = found.workers
    assert seen.described is not None
    assert (seen.described.model_name, list(seen.sequences)) == (MODEL, [SEQUENCE])
    assert found.models == (MODEL,), "though no gateway tells"
    states = {process.role: process.ready for process in found.processes}
    assert states == {Role.GATEWAY: False, Role.INDEX: False, Role.COLDPOOL: False, Role.WORKER: True}
    assert not found.all_ready
    text = text_of(found)
    for said in ("worker-0: forepage-test, 1 of 4 sequences", "17 of 47", "36%", "0.50", "decode", "guarded"):
        assert said in text
    assert text.count("down") == 3


async def test_a_draining_worker_is_not_ready(start_worker: StartWorker, tmp_path: Path) -> None:
    worker = await start_worker(draining=True)
    found = await read_status(settings(tmp_path, worker_addresses=(worker.address,)))
    assert {process.role: process.ready for process in found.processes}[Role.WORKER] is False
    assert "draining" in text_of(found)


async def test_the_addresses_of_forepage_up_are_used_while_it_runs(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = await start_worker()
    with instance_lock(tmp_path, "default"):
        card(worker=worker.address).leave(tmp_path, "default")
        found = await read_status(settings(tmp_path))
    assert found.card == card(worker=worker.address)
    assert [one.described is not None for one in found.workers] == [True]
    gone = await read_status(settings(tmp_path))
    assert (gone.card, [one.described for one in gone.workers]) == (None, [None])


def test_a_card_counts_only_while_its_lock_is_held(tmp_path: Path) -> None:
    with instance_lock(tmp_path, "a"):
        assert running_card(tmp_path, "a") is None  # not written yet
        card().leave(tmp_path, "a")
        assert running_card(tmp_path, "a") == card()
        text = lock_path(tmp_path, "a").read_text()
    assert running_card(tmp_path, "a") is None
    lock_path(tmp_path, "a").write_text(text)  # left behind by a process that was killed
    assert running_card(tmp_path, "a") is None


def test_json_holds_what_the_table_shows() -> None:
    described = pb.DescribeReply(worker_id="worker-0", row_blocks_total=9)
    status = Status(
        instance="default",
        version="0.1.0",
        models=(MODEL,),
        card=None,
        processes=(ProcessStatus(Role.GATEWAY, NOBODY, ready=True),),
        workers=(WorkerStatus(NOBODY, described, (SEQUENCE,)),),
        gpus=(GpuStatus("0", "H100", 1 << 30, 80 << 30, "7"),),
        arena=coldpool_pb2.StatReply(total=100, free=60, leased=30, cached=10, evictions=5),
        arena_bytes=2 << 30,
    )
    found = json.loads(json.dumps(status_json(status)))
    assert found["ready"] is True
    assert found["arena"] == {
        "total": 100,
        "free": 60,
        "leased": 30,
        "cached": 10,
        "evictions": "5",
        "bytes": 2 << 30,
    }
    assert found["workers"][0]["sequences"][0]["phase"] == "SEQUENCE_PHASE_DECODE"
    text = text_of(status)
    for said in (
        "2.00 GiB",
        "30 leased, 10 cached, 0 writing, 60 free",
        "5 evicted",
        "1.0 of 80.0 GiB",
        "7 %",
    ):
        assert said in text
    assert (text.count("█"), text.count("░")) == (12, 18)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0, NVIDIA H100, 1024, 81559, 7\n1, NVIDIA H100, 0, 81559, [N/A]\n", ["NVIDIA H100"] * 2),
        ("NVIDIA-SMI has failed\n", []),
        ("0, NVIDIA H100, [N/A], 81559, 7\n", []),
        ("", []),
    ],
)
def test_gpus_are_what_the_driver_lists(text: str, names: list[str]) -> None:
    gpus = parse_gpus(text)
    assert [gpu.name for gpu in gpus] == names
    assert all(gpu.total_bytes == 81559 << 20 for gpu in gpus)


def test_command_is_1_when_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("GATEWAY__PORT", "1"),
        ("INDEX__LISTEN", NOBODY),
        ("WORKER__LISTEN", NOBODY),
        ("COLDPOOL__LISTEN", NOBODY),
        ("COLDPOOL__SHM_DIR", str(tmp_path)),
    ):
        monkeypatch.setenv(f"FOREPAGE_{name}", value)
    result = CliRunner().invoke(cli.app, ["status"], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.output.count("down") == 4
    result = CliRunner().invoke(cli.app, ["status", "--json"], catch_exceptions=False)
    assert (result.exit_code, json.loads(result.output)["ready"]) == (1, False)
