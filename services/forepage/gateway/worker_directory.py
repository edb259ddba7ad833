"""The workers this gateway knows: found by a source, polled for load and health, kept through outages.

While the source is down the last known set stays (counted). A worker that the source no longer names stays
as long as it answers and does not say that it drains (counted too): a source may lose what it was told. One
that left gets no new requests; its channel is closed when its last stream has ended.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from forepage.errors import DependencyError, ForepageError, UnknownModelError
from forepage.gateway.worker_client import Served, WorkerClient
from forepage.rpc.tls import MutualTls
from forepage.telemetry import MetricName, Telemetry

DESCRIBE_TIMEOUT_S = 2.0


class WorkerSource(Protocol):
    """Where addresses of workers come from."""

    async def addresses(self) -> Sequence[str]:
        """Workers that want requests. Raises: DependencyError while the source can't be asked."""

    async def close(self) -> None:
        """Release connections."""


class FixedWorkers:
    """Workers that the settings name."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = tuple(addresses)

    async def addresses(self) -> Sequence[str]:
        """Always the same."""
        return self._addresses

    async def close(self) -> None:
        """Nothing is open."""


class WorkerDirectory:
    """Owns one client per worker. `refresh` is one poll; `run` polls for ever."""

    def __init__(self, source: WorkerSource, telemetry: Telemetry, tls: MutualTls | None = None) -> None:
        self._source = source
        self._tls = tls
        self._telemetry = telemetry
        self._log = structlog.get_logger("forepage.gateway")
        self._workers: dict[str, WorkerClient] = {}
        self._is_source_down = False

    async def run(self, poll_s: float) -> None:
        """Poll until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(poll_s)

    async def refresh(self) -> None:
        """Update the set from the source, then every worker's load and health."""
        try:
            self._adopt(await self._source.addresses())
        except DependencyError as error:
            self._telemetry.count(MetricName.FALLBACKS, fallback="last_known_workers")
            if not self._is_source_down:  # once an outage
                self._log.warning("worker source down, keeping the last known workers", error=str(error))
            self._is_source_down = True
        else:
            self._is_source_down = False
        idle = [item for item in self._workers.values() if not item.wanted and not item.num_streams]
        for worker in idle:
            del self._workers[worker.address]
            await worker.close()
        await asyncio.gather(
            *(worker.poll(DESCRIBE_TIMEOUT_S) for worker in self._workers.values() if worker.wanted)
        )

    def _adopt(self, addresses: Sequence[str]) -> None:
        for worker in self._workers.values():
            is_named = worker.address in addresses
            if worker.usable and not is_named:
                self._telemetry.count(MetricName.FALLBACKS, fallback="unlisted_worker")
            worker.wanted = is_named or worker.usable
        for address in addresses:
            if address not in self._workers:
                self._workers[address] = WorkerClient(address, self._tls)

    @property
    def ready(self) -> bool:
        """Whether some worker takes requests."""
        return any(worker.usable for worker in self._workers.values())

    def models(self) -> list[Served]:
        """One entry a model name; of several workers the one with the longest context."""
        found: dict[str, Served] = {}
        for worker in self._workers.values():
            served = worker.served
            if worker.wanted and served is not None:
                best = found.get(served.model_name, served)
                found[served.model_name] = max(best, served, key=lambda item: item.max_context_tokens)
        return [found[name] for name in sorted(found)]

    def listed(self) -> list[WorkerClient]:
        """Every worker that the source names, reachable or not."""
        return [worker for worker in self._workers.values() if worker.wanted]

    def workers_for(self, model: str) -> list[WorkerClient]:
        """Workers that take requests for `model`.

        Raises: UnknownModelError, or DependencyError when none of those that serve it can be reached.
        """
        names = {served.model_name for served in self.models()}
        if names and model not in names:
            raise UnknownModelError(f"the model {model!r} is not served here", "model")
        usable = [
            worker
            for worker in self._workers.values()
            if worker.usable and worker.served is not None and worker.served.model_name == model
        ]
        if not usable:
            raise DependencyError("no decode worker can be reached; try again", retry_after_s=2.0)
        return usable

    def cut_streams(self, error: ForepageError) -> None:
        """End every open stream of every worker with `error`, and open no more."""
        for worker in self._workers.values():
            worker.cut_streams(error)

    async def close(self) -> None:
        """Close every channel and the source."""
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))
        self._workers.clear()
        await self._source.close()
