"""The processes of a worker's other ranks: started, met, watched and ended by rank 0's process.

They are its children rather than siblings of a launcher: only rank 0 knows the arena, whoever starts a worker
(`forepage up`, a container, a supervisor) goes on starting one process, and a child can't outlive it. Orders
go to a follower's standard input, which stays open: its end tells the follower that rank 0 is gone, however
it ended. On standard output a follower says `here` once it may be met, `ready` once its model is loaded.
"""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch's list of names is short

from forepage.errors import DependencyError
from forepage.model.rank_group import RankLostError
from forepage.settings import Settings
from forepage.worker.rank_link import ALONE_RANKS, Ranks
from forepage.worker.rank_orders import GO, HERE, READY, RankOrders

STOP_S = 10.0
"""How long a follower that was told to stop may take."""
_log = structlog.get_logger("forepage.worker")


class RankProcesses:
    """Owner of the followers of one worker; of a worker on one device there are none."""

    def __init__(self, processes: list[asyncio.subprocess.Process], store_path: Path) -> None:
        self._processes = processes
        self._store_path = store_path
        self._num_ranks = len(processes) + 1

    async def meet(self, device: torch.device) -> Ranks:
        """Join the ranks. Raises: DependencyError when one of them ended instead."""
        if not self._processes:
            return ALONE_RANKS
        await self._all_say(HERE)
        store = FileStore(str(self._store_path), self._num_ranks)
        try:
            return await asyncio.to_thread(
                Ranks.connect, store, rank=0, num_ranks=self._num_ranks, device=device
            )
        except RankLostError as error:
            raise DependencyError(f"the ranks of this worker did not meet: {error}") from error

    async def begin(self) -> None:
        """Once every rank has loaded its part: let them follow. Raises: DependencyError, as `meet`."""
        await self._all_say(READY)
        for process in self._processes:
            _say(process, GO)

    async def watch(self, on_loss: Callable[[DependencyError], None]) -> None:
        """For ever: tell when a follower ended, which only its death or ours can bring about."""
        if self._processes:
            waits = {asyncio.create_task(process.wait()): rank for rank, process in self._ranked()}
            try:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            first = done.pop()
            _log.error("a rank of this worker is gone", rank=waits[first], code=first.result())
            on_loss(DependencyError("a rank of this worker is gone; send the request again", None, 1.0))

    async def close(self) -> None:
        """Wait for followers that were told to stop; kill those that do not."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()  # whoever was not told to stop sees that we are leaving
        for rank, process in self._ranked():
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                _log.warning("a rank did not stop: killed", rank=rank)
                process.kill()
                await process.wait()

    async def _all_say(self, word: str) -> None:
        await asyncio.gather(*(self._says(rank, process, word) for rank, process in self._ranked()))

    async def _says(self, rank: int, process: asyncio.subprocess.Process, word: str) -> None:
        assert process.stdout is not None
        said = await process.stdout.readline()
        if said.decode(errors="replace").strip() != word:
            raise DependencyError(f"rank {rank} of this worker ended before it was ready; its log says why")

    def _ranked(self) -> list[tuple[int, asyncio.subprocess.Process]]:
        return list(enumerate(self._processes, start=1))


@asynccontextmanager
async def followers(settings: Settings, arena_path: Path, arena_uuid: str) -> AsyncIterator[RankProcesses]:
    """The processes of ranks 1.. while the block runs."""
    processes: list[asyncio.subprocess.Process] = []
    with tempfile.TemporaryDirectory(prefix="forepage-ranks-") as folder:
        store_path = Path(folder) / "store"
        try:
            for rank in range(1, settings.worker.tensor_parallel):
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "forepage.worker.rank_follower"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                )
                processes.append(process)
                orders = RankOrders(
                    rank=rank,
                    store_path=store_path,
                    arena_path=arena_path,
                    arena_uuid=arena_uuid,
                    worker=settings.worker,
                    model=settings.model,
                    telemetry=settings.telemetry,
                )
                _say(process, orders.model_dump_json())
            yield RankProcesses(processes, store_path)
        finally:
            await RankProcesses(processes, store_path).close()


def _say(process: asyncio.subprocess.Process, line: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):  # it has ended: whoever waits for its answer sees that
        process.stdin.write(f"{line}\n".encode())
