"""What every worker's sequences hold, for those who watch: the newest snapshot, never a queue of old ones.

One watch a worker, however many watch here; none while nobody does. A slow reader skips snapshots.
"""

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from forepage.errors import DeadlineError, ForepageError, RateLimitError
from forepage.gateway.residency_usage import plain_words
from forepage.gateway.tenancy import may_watch
from forepage.gateway.worker_client import WorkerClient
from forepage.gateway.worker_directory import WorkerDirectory
from forepage.kv.geometry import BLOCK_ENTRIES, C4_RATIO
from forepage.rpc import worker_pb2 as pb

BLOCK_TOKENS = BLOCK_ENTRIES * C4_RATIO
MAX_WATCHING = 64
MAX_WATCHING_OF_KEY = 8
"""Of one API key: it can't take the places of all others."""
FRAME_S = 0.2
"""Nobody gets frames faster than this."""
RETRY_AFTER_S = 10.0
LOOK_AGAIN_S = 1.0
"""How often workers that came, left or were lost are looked for."""

Frame = dict[str, Any]
"""One snapshot as JSON; the page's `logic.js` reads it."""


class ResidencyFeed:
    """Owner of the watches; `frames` is one reader's view."""

    def __init__(self, directory: WorkerDirectory, *, is_closed: Callable[[], bool]) -> None:
        self._directory = directory
        self._is_closed = is_closed
        self._newest: dict[str, pb.WatchFrame | ForepageError] = {}
        self._version = 0
        self._num_readers = 0
        self._readers_of_key: Counter[str] = Counter()
        self._watching: asyncio.Task[None] | None = None

    async def frames(self, tenant: str | None = None, key_name: str | None = None) -> AsyncGenerator[Frame]:
        """Snapshots as they change, the first at once, until closed; of sequences only the tenant's own.

        Raises: RateLimitError for one reader too many, in all or of the key.
        """
        with self._reader(key_name):
            seen = -1
            while not self._is_closed():
                if self._watching is not None and self._watching.done():
                    self._watching.result()  # it goes on for ever: this raises what broke it
                if seen != self._version:
                    seen = self._version
                    yield self._frame(tenant)
                await asyncio.sleep(FRAME_S)

    @property
    def num_readers(self) -> int:
        """Who watches here."""
        return self._num_readers

    def _check_room(self, key_name: str | None) -> None:
        if key_name is not None and self._readers_of_key[key_name] >= MAX_WATCHING_OF_KEY:
            raise RateLimitError(
                f"{MAX_WATCHING_OF_KEY} pages are watching with this key, the most it may have; close one",
                retry_after_s=RETRY_AFTER_S,
            )
        if self._num_readers >= MAX_WATCHING:
            raise RateLimitError(
                f"{MAX_WATCHING} pages are watching already; close one", retry_after_s=RETRY_AFTER_S
            )

    @contextmanager
    def _reader(self, key_name: str | None) -> Iterator[None]:
        """Workers are watched from the first reader on until the last one leaves."""
        self._check_room(key_name)
        self._num_readers += 1
        if key_name is not None:
            self._readers_of_key[key_name] += 1
        if self._watching is None:
            self._newest.clear()
            self._watching = asyncio.create_task(self._watch_all())
        try:
            yield
        finally:
            self._num_readers -= 1
            if key_name is not None:
                self._readers_of_key[key_name] -= 1
            if self._num_readers == 0:
                self._watching.cancel()
                self._watching = None

    async def _watch_all(self) -> None:
        """One task a listed worker. Cancelled with its children when nobody looks any more."""
        async with asyncio.TaskGroup() as group:
            tasks: dict[str, asyncio.Task[None]] = {}
            while True:
                listed = {worker.address: worker for worker in self._directory.listed()}
                for address in tasks.keys() - listed.keys():
                    tasks.pop(address).cancel()
                    self._newest.pop(address, None)
                    self._version += 1
                for address in listed.keys() - tasks.keys():
                    tasks[address] = group.create_task(self._watch(listed[address]))
                await asyncio.sleep(LOOK_AGAIN_S)

    async def _watch(self, worker: WorkerClient) -> None:
        """Keep the newest snapshot of one worker, or why there is none."""
        while True:
            try:
                async with aclosing(worker.watch()) as snapshots:
                    async for snapshot in snapshots:
                        self._put(worker.address, snapshot)
            except DeadlineError:
                continue
            except ForepageError as error:
                self._put(worker.address, error)
            await asyncio.sleep(LOOK_AGAIN_S)

    def _put(self, address: str, newest: pb.WatchFrame | ForepageError) -> None:
        self._newest[address] = newest
        self._version += 1

    def _frame(self, tenant: str | None) -> Frame:
        listed = self._directory.listed()
        workers = [
            _lost(worker, newest) if isinstance(newest, ForepageError) else live_worker(newest, tenant)
            for worker in listed
            if (newest := self._newest.get(worker.address)) is not None
        ]
        return {
            "block_tokens": BLOCK_TOKENS,
            "num_listed": len(listed),  # those not in `workers` have not answered yet
            "workers": sorted(workers, key=lambda one: str(one["worker_id"])),
        }


def _lost(worker: WorkerClient, error: ForepageError) -> Frame:
    return {
        "worker_id": worker.load.worker_id,
        "model_name": worker.served.model_name if worker.served else "",
        "lost": error.message,
        "sequences": [],
    }


def live_worker(frame: pb.WatchFrame, tenant: str | None = None) -> Frame:
    """One worker's snapshot as a tenant's page gets it: fields by their names, the bitmap in base64."""
    views = [_view(one) for one in frame.sequences if may_watch(tenant, one.request_id)]
    return {**plain_words(frame.worker), "lost": None, "sequences": views}


def _view(sequence: pb.WatchedSequence) -> Frame:
    return {**plain_words(sequence), "resident": base64.b64encode(sequence.resident).decode()}
