"""The worker's process: whatever it does beside its loop ends it when it breaks, and says why."""

import asyncio
from pathlib import Path

import pytest

from forepage.coldpool import server as coldpool
from forepage.coldpool.client import ColdPoolClient
from forepage.rpc.edge import is_serving
from forepage.settings import SEEDED_MODEL, ColdpoolSettings, ModelSettings, Settings, WorkerSettings
from forepage.worker import server as worker
from forepage.worker.index_client import IndexClient
from rigs.stack import free_port

WAIT_S = 60.0


async def ready(settings: Settings) -> None:
    """Until the worker serves."""
    while not await is_serving(settings.worker.listen, None, timeout_s=1):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    arena, index = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    return Settings(
        instance="test",
        model=ModelSettings(path=SEEDED_MODEL, device="cpu"),
        coldpool=ColdpoolSettings(listen=arena, shm_dir=tmp_path, capacity_bytes=16 << 20),
        worker=WorkerSettings(
            listen=f"127.0.0.1:{free_port()}",
            coldpool_address=arena,
            index_address=index,
            kv_bytes=16 << 20,
            max_context_tokens=4096,
            drain_timeout_s=1.0,
        ),
    )


@pytest.mark.parametrize(
    ("owner", "task"),
    [(IndexClient, "run"), (ColdPoolClient, "watch"), (worker, "keep_card")],
    ids=["index", "coldpool", "card"],
)
async def test_a_task_that_breaks_ends_the_worker(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, owner: object, task: str
) -> None:
    """It went on without, and nobody knew: no plans, a cold pool that is not looked for, or no card."""
    is_due, stop, stop_manager = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def breaks(*_: object) -> None:
        await is_due.wait()
        raise ValueError("a defect")

    monkeypatch.setattr(owner, task, breaks)
    managing = asyncio.create_task(coldpool.run(settings, stop_manager))
    running = asyncio.create_task(worker.run(settings, stop))
    async with asyncio.timeout(WAIT_S):
        await ready(settings)
        is_due.set()
        with pytest.raises(ValueError, match="a defect"):
            await running
        stop_manager.set()
        await managing


async def test_a_worker_that_is_told_to_stop_ends_well(settings: Settings) -> None:
    stop, stop_manager = asyncio.Event(), asyncio.Event()
    managing = asyncio.create_task(coldpool.run(settings, stop_manager))
    running = asyncio.create_task(worker.run(settings, stop))
    async with asyncio.timeout(WAIT_S):
        await ready(settings)
        stop.set()
        await running
        stop_manager.set()
        await managing
