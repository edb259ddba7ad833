"""A window as a row of throughput.json; what could not be measured is null, with the reason in `why`."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from forepage.worker.stalls import Stall
from loadtest.quality.intervals import percentile
from loadtest.throughput.case import Arm, Case
from loadtest.throughput.measure import Phase, Window

Row = dict[str, Any]
LATENCY = "forepage_prefetch_latency_milliseconds"
COMMIT_STEPS = "forepage_prefetch_commit_steps"
STALLED = "forepage_decode_stalled_seconds_total"
STALLS = tuple(stall.value for stall in Stall)
LATE = "forepage_lookahead_late_plans_total"
FROM_HOST = "forepage_host_to_device_bytes_total"
TWO_TB = 2 * 10**12
HOST_SHARE = 0.8
"""Of a host's memory, for the arena."""
WINDOW_COLUMNS = (
    "ttft_ms",
    "tokens_per_s",
    "itl_p50_ms",
    "itl_p99_ms",
    "gpu_kv_bytes_c4",
    "gpu_kv_bytes_index",
    "gpu_kv_bytes_other",
    "prefetch_ms_predict",
    "prefetch_ms_queue",
    "prefetch_ms_load",
    "prefetch_ms_wait",
    "boundary_to_commit_steps_p50",
    "boundary_to_commit_steps_p99",
    "stall_share",
    "late_plans",
    "itl_p99_vs_frozen",
    "demand_bytes_per_token",
)
PAGING_COLUMNS = (
    "prefetch_ms_predict",
    "prefetch_ms_queue",
    "prefetch_ms_load",
    "prefetch_ms_wait",
    "boundary_to_commit_steps_p50",
    "boundary_to_commit_steps_p99",
    "stall_share",
    "late_plans",
    "itl_p99_vs_frozen",
)
"""What only a paged sequence has."""


def row_of(
    case: Case,
    found: Window | str,
    *,
    sequences: int,
    batch1: bool,
    as_shipped: bool,
    index_placement: str,
    experts_stored: int,
    host_bytes: int,
) -> Row:
    """`found` is what was seen, or how it failed."""
    fits = int(host_bytes * HOST_SHARE // case.host_bytes)
    why: dict[str, str] = {"phase": "every step is alike", "early_share": "not an early window"}
    row: Row = {
        "measures": "decode",
        "context_tokens": case.context_tokens,
        "arm": case.arm.value,
        "batch1": batch1,
        "paging": _paging(case, as_shipped=as_shipped),
        "phase": None,
        "early_share": None,
        "index_placement": index_placement,
        "kv_budget_bytes": case.plan.kv_bytes,
        "experts_stored": experts_stored,
        "concurrency": sequences,
        **dict.fromkeys(WINDOW_COLUMNS),
        "host_bytes_per_sequence": case.host_bytes,
        "limited_by": _limit(case, sequences, fits, batch1=batch1),
        "host_concurrency": min(sequences, fits),
        "host_concurrency_2tb": min(sequences, int(TWO_TB * HOST_SHARE // case.host_bytes)),
    }
    if isinstance(found, str):
        why |= dict.fromkeys(WINDOW_COLUMNS, found)
    else:
        why |= dict.fromkeys(WINDOW_COLUMNS, "no plan was committed, or no token came, in the window")
        row |= _measured(case, found, sequences)
        if case.arm is Arm.FULL or as_shipped:
            why |= dict.fromkeys(PAGING_COLUMNS, "nothing is paged")
        elif found.phase is Phase.EARLY:
            why["itl_p99_vs_frozen"] = "in the steady phase's row"
    return row | {"why": {name: reason for name, reason in why.items() if row[name] is None}}


def _measured(case: Case, window: Window, sequences: int) -> Row:
    geometry, held = case.geometry, window.held
    rows = held.row_blocks_total - held.row_blocks_free
    keys = held.key_blocks_total - held.key_blocks_free
    late, plans = window.grew(LATE), window.grew(f"{LATENCY}_count", "total")
    gaps = window.gaps_ms
    stalled_s = sum(window.grew(STALLED, stall) for stall in STALLS)
    return {
        "phase": window.phase,
        "early_share": window.early_share,
        "ttft_ms": fmean(window.ttft_ms),
        "tokens_per_s": window.num_tokens / window.seconds,
        "itl_p50_ms": percentile(gaps, 0.50) if gaps else None,
        "itl_p99_ms": _p99(gaps) if gaps else None,
        "gpu_kv_bytes_c4": rows * geometry.rows_bytes / sequences,
        "gpu_kv_bytes_index": keys * geometry.keys_bytes / sequences,
        "gpu_kv_bytes_other": geometry.fixed_bytes(case.prompt_tokens + case.plan.answer_tokens - 1),
        "prefetch_ms_predict": _phase(window, "predict"),
        "prefetch_ms_queue": _phase(window, "queue"),
        "prefetch_ms_load": _phase(window, "load"),
        "prefetch_ms_wait": _phase(window, "wait"),
        "boundary_to_commit_steps_p50": window.quantile(COMMIT_STEPS, 0.50),
        "boundary_to_commit_steps_p99": window.quantile(COMMIT_STEPS, 0.99),
        "stall_share": None if case.arm is Arm.FULL else stalled_s / (window.seconds * sequences),
        "late_plans": late / (late + plans) if late + plans else None,
        "itl_p99_vs_frozen": _p99(gaps) / _p99(window.frozen_gaps_ms)
        if gaps and window.frozen_gaps_ms
        else None,
        "demand_bytes_per_token": window.grew(FROM_HOST, "demand") / max(1, window.num_tokens),
    }


def _paging(case: Case, *, as_shipped: bool) -> str:
    """Whether sequences page, and why."""
    if case.arm is Arm.FULL:
        return "none"
    return "as shipped" if as_shipped else "asked for"


def _limit(case: Case, sequences: int, host_fits: int, *, batch1: bool) -> str:
    """What keeps the batch from being larger."""
    if batch1:
        return "batch 1"
    if host_fits < sequences:
        return "host"
    return "gpu" if sequences == case.concurrency() else "--max-sequences"


def _phase(window: Window, phase: str) -> float | None:
    count = window.grew(f"{LATENCY}_count", phase)
    return window.grew(f"{LATENCY}_sum", phase) / count if count else None


def _p99(gaps_ms: Sequence[float]) -> float:
    return percentile(gaps_ms, 0.99)
