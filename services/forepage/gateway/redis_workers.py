"""Workers that have registered in Redis: one expiring card each, `forepage:{instance}:worker:{id}`.

Known cards are read with one MGET a poll. A scan for new ones walks every key of the database, so it is
done only now and then, and at every poll while no worker is known.
"""

from collections.abc import Iterator, Sequence

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from forepage.errors import DependencyError, IntegrityError
from forepage.frames import WorkerFrame
from forepage.telemetry import MetricName, Telemetry

SCAN_EVERY_POLLS = 5
SCAN_COUNT = 10_000


class RedisWorkers:
    """A worker source; owns its Redis connection and the keys seen so far."""

    def __init__(self, client: Redis, instance: str, telemetry: Telemetry) -> None:
        self._client = client
        self._pattern = f"forepage:{instance}:worker:*"
        self._telemetry = telemetry
        self._log = structlog.get_logger("forepage.gateway")
        self._keys: list[bytes] = []
        self._polls_until_scan = 0

    async def addresses(self) -> Sequence[str]:
        """Addresses of the workers whose card is there and not draining.

        Raises: DependencyError while Redis can't be reached.
        """
        try:
            if not self._keys or self._polls_until_scan <= 0:
                scan = self._client.scan_iter(match=self._pattern, count=SCAN_COUNT)
                self._keys = sorted([key async for key in scan])
                self._polls_until_scan = SCAN_EVERY_POLLS
            self._polls_until_scan -= 1
            values = await self._client.mget(self._keys) if self._keys else []
        except (RedisError, OSError) as error:
            raise DependencyError(f"Redis: {type(error).__name__}: {error}", retry_after_s=1.0) from error
        cards = list(self._cards([value for value in values if isinstance(value, bytes)]))
        self._keys = [key for key, value in zip(self._keys, values, strict=True) if value is not None]
        return [card.address for card in cards if not card.draining]

    def _cards(self, values: Sequence[bytes]) -> Iterator[WorkerFrame]:
        for value in values:
            try:
                yield WorkerFrame.decode(value)
            except IntegrityError as error:
                self._telemetry.count(MetricName.FALLBACKS, fallback="bad_worker_card")
                self._log.warning("unreadable worker card", error=error.message)

    async def close(self) -> None:
        """Close the connection."""
        await self._client.aclose()
