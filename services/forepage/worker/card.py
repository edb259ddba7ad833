"""Keeps this worker's card in the directory, so that gateways find it; Redis may come and go."""

import asyncio
import contextlib

import structlog
from redis.exceptions import RedisError

from forepage.frames import WorkerFrame
from forepage.redis_client import open_redis
from forepage.settings import Settings

TTL_S = 5
PERIOD_S = 1.0


def card_key(instance: str, worker_id: str) -> str:
    """Redis key of a worker's card."""
    return f"forepage:{instance}:worker:{worker_id}"


async def keep_card(settings: Settings, identity: WorkerFrame) -> None:
    """Renew the card every second until cancelled, then take it away."""
    if settings.redis_url is None:
        return
    log = structlog.get_logger("forepage.worker.card")
    key, card = card_key(settings.instance, identity.worker_id), identity.encode()
    client = open_redis(settings.redis_url.get_secret_value(), settings.tls)
    is_written = True
    try:
        while True:
            try:
                await client.set(key, card, ex=TTL_S)
                is_written = True
            except (RedisError, OSError) as error:
                if is_written:
                    log.warning("card not written; gateways keep the workers they know", error=str(error))
                is_written = False
            await asyncio.sleep(PERIOD_S)
    finally:
        with contextlib.suppress(RedisError, OSError):
            await client.delete(key)
        await client.aclose()
