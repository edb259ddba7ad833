"""API keys: who asks, whose prefixes may be shared, and how much each may ask.

A key is 256 random bits, so its SHA-256 is all that is kept, and looking that up tells nothing of the key.
The file is JSON lines, one key each, as `forepage new-key` writes them.
"""

import hashlib
import math
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from forepage.errors import AuthenticationError, RateLimitError
from forepage.gateway.request_scope import request_scope
from forepage.settings_environment import SettingsError

KEY_PREFIX = "fp-"
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/version", "/metrics"})
"""What probes and scrapers ask, without a key; none of it tells of a prompt."""


class ApiKey(BaseModel):
    """One line of the file. Keys of the same tenant share prefixes; limits of None are none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tenant: str = Field("", max_length=64)
    max_concurrent: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)


def new_key(
    name: str, *, tenant: str = "", max_concurrent: int | None = None, requests_per_minute: int | None = None
) -> tuple[str, ApiKey]:
    """A key to hand out, and what is kept of it."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    kept = ApiKey(
        name=name,
        sha256=_digest(key),
        tenant=tenant,
        max_concurrent=max_concurrent,
        requests_per_minute=requests_per_minute,
    )
    return key, kept


def read_keys(path: Path) -> dict[str, ApiKey]:
    """The file's keys by digest. Raises: SettingsError naming the line, never quoting it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"FOREPAGE_GATEWAY__API_KEYS: {path} can't be read as text") from error
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key = ApiKey.model_validate_json(line)
        except ValidationError as error:
            where = ", ".join(".".join(map(str, item["loc"])) or "JSON" for item in error.errors())
            raise SettingsError(
                f"FOREPAGE_GATEWAY__API_KEYS: line {number} of {path}: {where} (`forepage new-key` writes it)"
            ) from None
        if key.sha256 in keys or any(key.name == other.name for other in keys.values()):
            raise SettingsError(f"FOREPAGE_GATEWAY__API_KEYS: line {number} of {path} is there twice")
        keys[key.sha256] = key
    if not keys:
        raise SettingsError(f"FOREPAGE_GATEWAY__API_KEYS: {path} has no key: nobody could ask anything")
    return keys


class KeyMiddleware:
    """Lets through who shows a key and keeps within its limits; everything but `open_paths` asks for one."""

    def __init__(self, app: ASGIApp, keys: Mapping[str, ApiKey], open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)
        self._running: Counter[str] = Counter()
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises: AuthenticationError, RateLimitError with the seconds to wait."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        key = self._key_of(Headers(scope=scope))
        if key is None:
            raise AuthenticationError("show an API key of this server: `Authorization: Bearer fp-...`")
        ours = request_scope(scope)
        ours.tenant, ours.key_name = key.tenant, key.name
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with self._slot(key):
            self._count(key)
            await self._app(scope, receive, send)

    def _key_of(self, headers: Headers) -> ApiKey | None:
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        return self._keys.get(_digest(shown.strip())) if scheme.lower() == "bearer" else None

    @contextmanager
    def _slot(self, key: ApiKey) -> Iterator[None]:
        if key.max_concurrent is not None and self._running[key.name] >= key.max_concurrent:
            raise RateLimitError(
                f"{key.max_concurrent} requests of this key are running, the most it may have; try again",
                retry_after_s=1.0,
            )
        self._running[key.name] += 1
        try:
            yield
        finally:
            self._running[key.name] -= 1

    def _count(self, key: ApiKey) -> None:
        if key.requests_per_minute is None:
            return
        limit = RateLimitItemPerMinute(key.requests_per_minute)
        if not self._limiter.hit(limit, key.name):
            wait_s = self._limiter.get_window_stats(limit, key.name).reset_time - time.time()
            raise RateLimitError(
                f"this key may ask {key.requests_per_minute} times a minute; try again",
                retry_after_s=float(max(1, math.ceil(wait_s))),
            )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
