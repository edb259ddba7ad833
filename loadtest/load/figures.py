"""Samples as rows: how long users waited, what came a second, and what paging did, by subset and length."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any

from loadtest.load.sample import Sample
from loadtest.quality.intervals import percentile

Row = dict[str, Any]
WHY_NOT_PAGED = "evidence_recall: no audited step had evidence, or nothing was absent"
WHY_NO_PREFETCH = "prefetch_ms: no plan was committed"
WHY_NO_REPORT = "footprint, recall, prefetch: the endpoint sends no usage.forepage"
WHY_NOTHING = "all times: no request was answered"


def rows_of(shape: str, samples: Sequence[Sample], *, seconds: float) -> list[Row]:
    """All requests; then, where there are both, those that need the past and those that don't; then lengths.

    `seconds` is how long the load took.
    """
    rows = [_row(shape, "all", None, samples, seconds)]
    past = [one for one in samples if one.needs_past]
    recent = [one for one in samples if one.needs_past is False]
    if past and recent:
        rows.append(_row(shape, "needs_the_past", None, past, seconds))
        rows.append(_row(shape, "last_8k", None, recent, seconds))
    lengths = sorted({one.length_tokens for one in samples})
    if len(lengths) > 1:
        for length in lengths:
            chosen = [one for one in samples if one.length_tokens == length]
            rows.append(_row(shape, "length", length, chosen, seconds))
    if any(one.turn for one in samples):
        rows.append(_row(shape, "first_turn", None, [one for one in samples if not one.turn], seconds))
        rows.append(_row(shape, "later_turns", None, [one for one in samples if one.turn], seconds))
    return rows


def _row(shape: str, subset: str, length: int | None, samples: Sequence[Sample], seconds: float) -> Row:
    whole = [one for one in samples if one.error is None]
    failed = [one for one in samples if one.error is not None]
    refused = [one for one in failed if one.is_refused]
    gaps = [gap for one in whole for gap in one.gaps_s]
    recalls = list(_reported(whole, "evidence_recall_mean"))
    row: Row = {
        "shape": shape,
        "subset": subset,
        "length_tokens": length,
        "requests": len(samples),
        "answered": len(whole),
        "refused": len(refused),
        "failed": len(failed) - len(refused),
        "errors": dict(Counter(one.error for one in failed)),
        "accuracy": _mean(one.score for one in whole),
        "ttft_p50_ms": _ms([one.ttft_s for one in whole], 0.50),
        "ttft_p95_ms": _ms([one.ttft_s for one in whole], 0.95),
        "itl_p50_ms": _ms(gaps, 0.50),
        "itl_p99_ms": _ms(gaps, 0.99),
        "tpot_p50_ms": _ms([one.tpot_s for one in whole], 0.50),
        "total_p50_ms": _ms([one.total_s for one in whole], 0.50),
        "total_p95_ms": _ms([one.total_s for one in whole], 0.95),
        "tokens_per_s": sum(one.completion_tokens for one in whole) / seconds,
        "requests_per_s": len(whole) / seconds,
        "prompt_tokens": _mean(one.prompt_tokens for one in whole),
        "cached_share": _share(
            sum(one.cached_tokens for one in whole), sum(one.prompt_tokens for one in whole)
        ),
        "evidence_recall": _mean(recalls),
        "evidence_recall_min": min(_reported(whole, "evidence_recall_min"), default=None),
        "missed_mass": _mean(_reported(whole, "missed_mass_mean")),
        "audited_share": _share(sum(_reported(whole, "audited_steps")), sum(_reported(whole, "paged_steps"))),
        "kv_footprint": _mean(_reported(whole, "kv_footprint")),
        "footprint_flash": _mean(_reported(whole, "footprint_flash")),
        "prefetch_ms_mean": _mean(_reported(whole, "prefetch_latency_ms_mean")),
        "prefetch_ms_max": max(_reported(whole, "prefetch_latency_ms_max"), default=None),
        "late_plans": _share(sum(_reported(whole, "late_plans")), sum(_reported(whole, "intervals"))),
        "escalations": _mean(_reported(whole, "escalations")),
        "demand_bytes_per_token": _share(
            sum(_reported(whole, "demand_bytes")), sum(one.completion_tokens for one in whole)
        ),
    }
    row = {name: _rounded(value) for name, value in row.items()}
    return {**row, "why": "; ".join(_why(row, whole)) or None}


def _why(row: Row, whole: Sequence[Sample]) -> Iterator[str]:
    """The reason for each missing figure."""
    if not whole:
        yield WHY_NOTHING
    elif not any(one.residency for one in whole):
        yield WHY_NO_REPORT
    else:
        if row["evidence_recall"] is None:
            yield WHY_NOT_PAGED
        if row["prefetch_ms_mean"] is None:
            yield WHY_NO_PREFETCH


def _reported(samples: Iterable[Sample], name: str) -> Iterator[float]:
    for one in samples:
        value = one.residency.get(name)
        if value is not None:
            yield float(value)


def _ms(seconds: Iterable[float | None], share: float) -> float | None:
    known = [value for value in seconds if value is not None]
    return percentile(known, share) * 1e3 if known else None


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
