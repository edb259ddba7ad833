"""What one streamed answer and a whole run come to, against streams and samples written by hand."""

import json
from dataclasses import replace

import pytest

from loadtest.load.conversation import documents
from loadtest.load.figures import WHY_NO_REPORT, WHY_NOTHING, rows_of
from loadtest.load.sample import Sample, failed_sample, sample_of

ITEM = documents(1024, count=1, seed=0)[0].items[0]
USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 40},
    "forepage": {"kv_footprint": 0.5},
}
Line = tuple[float, str]


def said(at_s: float, text: str) -> Line:
    return at_s, "data: " + json.dumps({"choices": [{"delta": {"content": text}}]})


def ended(at_s: float) -> list[Line]:
    return [(at_s, "data: " + json.dumps({"choices": [], "usage": USAGE})), (at_s, "data: [DONE]")]


def test_times_are_of_pieces_of_text_alone() -> None:
    opening = (0.5, 'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}')
    lines = [
        opening,
        (0.6, ""),
        (0.7, ": ping"),
        said(1.0, "It is "),
        said(1.25, ITEM.question.answer),
        *ended(2.0),
    ]
    sample = sample_of(ITEM, 0, 200, 3.0, lines)
    assert (sample.ttft_s, sample.gaps_s, sample.total_s, sample.sent_s) == (1.0, (0.25,), 2.0, 3.0)
    assert sample.tpot_s == pytest.approx((2.0 - 1.0) / 4)
    assert (sample.prompt_tokens, sample.cached_tokens, sample.completion_tokens) == (100, 40, 5)
    assert (sample.error, sample.score, sample.residency) == (None, 1.0, {"kv_footprint": 0.5})


def test_a_stream_that_ends_early_is_an_error_and_scores_nothing() -> None:
    sample = sample_of(ITEM, 0, 200, 0.0, [said(1.0, ITEM.question.answer)])
    assert (sample.error, sample.score) == ("stream_cut", 0.0)


def test_an_error_event_is_named_by_its_code() -> None:
    event = (1.5, 'data: {"error": {"code": "dependency_unavailable", "message": "gone"}}')
    sample = sample_of(ITEM, 0, 200, 0.0, [said(1.0, "It"), event, said(9.0, "never")])
    assert (sample.error, sample.total_s, sample.text) == ("dependency_unavailable", 1.5, "It")


def answered(**changes: object) -> Sample:
    sample = sample_of(ITEM, 0, 200, 0.0, [said(1.0, "a"), said(1.1, "b"), *ended(2.0)])
    return replace(sample, **changes)  # type: ignore[arg-type]


def test_rows_tell_refused_from_failed() -> None:
    refused = failed_sample(ITEM, 0, 429, 0.0, "rate_limit_exceeded", total_s=0.1)
    broken = failed_sample(ITEM, 0, 0, 0.0, "ReadError", total_s=0.1)
    [row] = rows_of("ci", [answered(), refused, refused, broken], seconds=10.0)
    assert (row["requests"], row["answered"], row["refused"], row["failed"]) == (4, 1, 2, 1)
    assert row["errors"] == {"rate_limit_exceeded": 2, "ReadError": 1}
    assert (row["tokens_per_s"], row["requests_per_s"]) == (0.5, 0.1)
    assert (row["ttft_p50_ms"], row["itl_p50_ms"], row["cached_share"]) == (1000, 100, 0.4)


def test_rows_of_subsets_are_those_there_are() -> None:
    samples = [
        answered(needs_past=True, length_tokens=65_536, residency={"evidence_recall_mean": 0.5}),
        answered(needs_past=False, turn=1, residency={"evidence_recall_mean": 1.0}),
    ]
    rows = rows_of("mostly-recent", samples, seconds=1.0)
    found = {(row["subset"], row["length_tokens"]): row["evidence_recall"] for row in rows}
    assert found == {
        ("all", None): 0.75,
        ("needs_the_past", None): 0.5,
        ("last_8k", None): 1.0,
        ("length", 1024): 1.0,
        ("length", 65_536): 0.5,
        ("first_turn", None): 0.5,
        ("later_turns", None): 1.0,
    }


def test_missing_figures_say_why() -> None:
    [nothing] = rows_of("ci", [failed_sample(ITEM, 0, 503, 0.0, "no", total_s=0.1)], seconds=1.0)
    assert (nothing["ttft_p50_ms"], nothing["why"]) == (None, WHY_NOTHING)
    [plain] = rows_of("ci", [answered(residency={})], seconds=1.0)
    assert (plain["kv_footprint"], plain["why"]) == (None, WHY_NO_REPORT)
