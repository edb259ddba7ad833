"""How every process of ours speaks to Redis: calls end soon, `rediss://` shows and asks for certificates."""

from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from forepage.settings import TlsSettings

REDIS_TIMEOUT_S = 1.0
TLS_SCHEME = "rediss://"
PLAIN = TlsSettings()


def open_redis(url: str, tls: TlsSettings = PLAIN) -> Redis:
    """A client whose every call ends soon, also when the server hangs; who needs Redis waits in its own way.

    With `rediss://` the server's certificate must be signed by `tls.ca` (none: an authority of the system)
    and name its address; `tls.cert` is shown to it. Raises: ValueError for an unknown scheme.
    """
    files = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.cert, "ssl_keyfile": tls.key}
    secured: dict[str, Any] = {name: str(path) for name, path in files.items() if path is not None}
    return Redis.from_url(
        url,
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        **(secured if url.startswith(TLS_SCHEME) else {}),
    )
