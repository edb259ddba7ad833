"""Every series that a process counts from zero, so that Prometheus sees the first event.

`rate` and `increase` compare two samples: a counter that appears with its first event stands at 1 ever after,
and an alert that waits for it to grow stays silent. So each role writes a 0 when it starts. What a label says
is spelled where it is counted; a contract test compares both. Not here: `forepage.tokens`, whose label is a
model's name, known from its first answer on.
"""

from collections.abc import Mapping

from forepage.errors import ERROR_BY_CODE
from forepage.telemetry import MetricName, Telemetry

Labels = tuple[Mapping[str, str], ...]
"""By Attr member name, lower case; one mapping a series."""


def _by(label: str, *values: str) -> Labels:
    return tuple({label: value} for value in values)


_ALONE: Labels = ({},)
_GATEWAY: dict[MetricName, Labels] = {
    MetricName.REQUESTS_RUNNING: _ALONE,
    MetricName.REFUSALS: _by("reason", *ERROR_BY_CODE),
    MetricName.FALLBACKS: _by(
        "fallback",
        "other_worker",
        "last_known_workers",
        "unlisted_worker",
        "bad_worker_card",
        "resumed_stream",
    ),
}
_WORKER: dict[MetricName, Labels] = {
    MetricName.FALLBACKS: _by(
        *("fallback", "index_down", "refused", "worker_audit", "paused", "keep_newest", "lost_record"),
        *("publish_retry", "host_sampling", "eager_decode"),
        *("coldpool_reattached", "coldpool_release_deferred"),
    ),
    MetricName.ESCALATIONS: _by("reason", "repair", "raise_budget", "move_to_exact"),
    MetricName.REDONE_STEPS: _ALONE,
    MetricName.LATE_PLANS: _ALONE,
    MetricName.DISCARDED_PLANS: _ALONE,
    MetricName.STALLED: _by("reason", "first_plan", "repair", "room"),
    MetricName.ROOM_MOVES: _by("reason", "kept", "returned", "left"),
    MetricName.ROOM_BYTES: _by("reason", "loaded", "dropped"),
    MetricName.PREFETCH_BYTES: _ALONE,
    MetricName.DEMAND_BYTES: _ALONE,
    MetricName.HOST_TO_DEVICE: _by("reason", "prefetch", "demand", "prefix"),
    MetricName.DEVICE_TO_HOST: _ALONE,
    MetricName.PENDING_WRITES: _ALONE,
    MetricName.CACHE_HITS: _by("cache", "rows", "plan", "prefix"),
    MetricName.CACHE_MISSES: _by("cache", "rows", "plan", "prefix"),
    MetricName.PREFIX_TOKENS: _ALONE,
    MetricName.PREFILL_TOKENS: _ALONE,
}
_INDEX: dict[MetricName, Labels] = {
    MetricName.PREDICTIONS: _ALONE,
    MetricName.FALLBACKS: tuple(
        {"fallback": "plan_not_published", "reason": reason}
        for reason in ("queue_full", "redis_down", "stopped")
    ),
}
_COLDPOOL: dict[MetricName, Labels] = {
    MetricName.ARENA_SLOTS: _by("state", "free", "writing", "leased", "cached"),
    MetricName.EVICTIONS: _ALONE,
    MetricName.DAMAGED: _by("reason", "arena", "redis", "disk", "directory"),
    MetricName.DIRECTORY_DROPPED: _ALONE,
    MetricName.FALLBACKS: _by(
        *("fallback", "coldpool_tier_redis", "coldpool_tier_disk"),
        *("coldpool_no_room_to_load", "coldpool_stale_ref"),
    ),
}
FROM_ZERO: Mapping[str, Mapping[MetricName, Labels]] = {
    "gateway": _GATEWAY,
    "worker": _WORKER,
    "index": _INDEX,
    "coldpool": _COLDPOOL,
}
"""By role."""


def begin_at_zero(telemetry: Telemetry, role: str) -> None:
    """Write the zeros of a process of this role; once, before it counts."""
    for name, series in FROM_ZERO[role].items():
        for labels in series:
            if name in telemetry.counters:
                telemetry.count(name, 0, **labels)
            else:
                telemetry.move(name, 0, **labels)
