"""Publishes plans on a bounded Redis stream for observers; workers obey only the gRPC stream.

Publishing never delays or fails a reply: a plan waits in a bounded queue, and is dropped and counted when
the queue is full or Redis does not take it.
"""

import asyncio

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from forepage.frames import PlanFrame
from forepage.telemetry import MetricName, Telemetry

QUEUE_PLANS = 1024
FIELD = "plan"
FALLBACK = "plan_not_published"
_log = structlog.get_logger("forepage.index")


def plan_stream(instance: str) -> str:
    """The stream's key."""
    return f"forepage:{instance}:plans"


class PlanPublisher:
    """Owns the queue; `publish` is called on the event loop, `run` is one of the process's tasks."""

    def __init__(self, redis: Redis, *, stream: str, maxlen: int, telemetry: Telemetry) -> None:
        self._redis = redis
        self._stream = stream
        self._maxlen = maxlen
        self._telemetry = telemetry
        self._queue: asyncio.Queue[PlanFrame] = asyncio.Queue(QUEUE_PLANS)
        self._is_down = False

    def publish(self, frame: PlanFrame) -> None:
        """Queue a plan, or drop and count it."""
        try:
            self._queue.put_nowait(frame)
        except asyncio.QueueFull:
            self._drop("queue_full")

    async def run(self) -> None:
        """Write queued plans until cancelled."""
        while True:
            frame = await self._queue.get()
            try:
                await self._redis.xadd(
                    self._stream, {FIELD: frame.encode()}, maxlen=self._maxlen, approximate=True
                )
            except (RedisError, OSError) as error:
                self._drop("redis_down")
                self._report(is_down=True, error=str(error))
            else:
                self._report(is_down=False, error="")
            finally:
                self._queue.task_done()

    async def flush(self, timeout_s: float) -> None:
        """Wait until every queued plan was written or dropped; what is left by then is dropped."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._queue.join()
        except TimeoutError:
            while not self._queue.empty():
                self._queue.get_nowait()
                self._drop("stopped")

    def _drop(self, reason: str) -> None:
        self._telemetry.count(MetricName.FALLBACKS, fallback=FALLBACK, reason=reason)

    def _report(self, *, is_down: bool, error: str) -> None:
        """Log when Redis goes and when it comes back, not each plan."""
        if is_down != self._is_down:
            self._is_down = is_down
            if is_down:
                _log.warning("plans are not published: Redis is down", error=error)
            else:
                _log.info("plans are published again")
