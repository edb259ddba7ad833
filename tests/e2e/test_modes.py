"""The promises of the residency modes, over HTTP, on 16K tokens of real text."""

import uuid

import pytest

from rigs.chat import Answer, stream_chat
from rigs.stack import Stack, wait_until
from rigs.traced import Traced

QUESTION = "\n\nWhich exception does this module raise when an argument is wrong?"


def ask(stack: Stack, document: str, **how: object) -> Answer:
    """One turn about the document."""
    messages = [{"role": "user", "content": document + QUESTION}]
    return stream_chat(stack.url, messages, **how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def full(traced: Traced, document: str) -> Answer:
    """The oracle: everything resident. Also the first request over the document."""
    return ask(traced.stack, document, mode="full")


def test_full_serves_the_whole_document(full: Answer) -> None:
    assert full.usage["prompt_tokens"] > 16_000
    assert full.usage["completion_tokens"] == 160
    assert full.finish_reason == "length"
    assert full.forepage["full_steps"] == full.forepage["decode_steps"] == 159
    assert full.forepage["kv_footprint"] == pytest.approx(1.0)


def test_exact_gives_the_tokens_of_full(traced: Traced, document: str, full: Answer) -> None:
    exact = ask(traced.stack, document, mode="exact")
    assert exact.text == full.text
    report = exact.forepage
    assert report["exact_steps"] == 159, "rows were absent in every step"
    assert report["demand_bytes"] > 0, "and selected ones were pulled"
    assert report["kv_footprint"] < 0.8
    check_bounds(exact)


def test_exact_gives_the_tokens_of_full_without_a_cached_prefix(traced: Traced, document: str) -> None:
    salts = [uuid.uuid4().hex for _ in range(2)]
    full, exact = (
        ask(traced.stack, document, mode=mode, cache_salt=salt, max_tokens=80)
        for mode, salt in zip(("full", "exact"), salts, strict=True)
    )
    assert full.usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert exact.usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert exact.text == full.text
    assert exact.forepage["demand_bytes"] > 0


def test_exact_gives_the_tokens_of_full_when_sampling(traced: Traced, document: str) -> None:
    how = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 100}
    full, again, exact = (ask(traced.stack, document, mode=m, **how) for m in ("full", "full", "exact"))
    assert full.text == again.text, "the seed decides"
    assert exact.text == full.text
    assert ask(traced.stack, document, mode="full", **{**how, "seed": 8}).text != full.text


def test_second_request_does_not_prefill_the_document_again(
    traced: Traced, document: str, full: Answer
) -> None:
    again = ask(traced.stack, document, mode="full")
    cached = again.usage["prompt_tokens_details"]["cached_tokens"]
    assert again.usage["prompt_tokens"] - cached <= 256
    assert again.text == full.text


def test_guarded_gives_no_token_of_a_step_that_missed_evidence(
    traced: Traced, document: str, full: Answer
) -> None:
    """The seeded indexer predicts nothing useful: the first step's audit sees it, and the guard acts."""
    guarded = ask(traced.stack, document, mode="guarded", budget_blocks=4)
    report = guarded.forepage
    assert report["redone_steps"] >= 1
    assert report["escalations"] >= 2
    assert report["moves_to_exact"] >= 1
    assert report["tokens_before_escalation"] == 0
    assert report["mode_final"] == "exact"
    assert report["paged_steps"] + report["exact_steps"] + report["full_steps"] == report["decode_steps"]
    assert guarded.text == full.text
    check_bounds(guarded)


def test_lookahead_keeps_to_its_budget(traced: Traced, document: str, full: Answer) -> None:
    lookahead = ask(traced.stack, document, mode="lookahead")
    report = lookahead.forepage
    assert report["paged_steps"] == report["decode_steps"] == 159
    assert report["audited_steps"] == 0
    assert report["evidence_recall_mean"] is None
    assert report["kv_footprint"] < full.forepage["kv_footprint"]
    assert report["intervals"] >= 3
    check_bounds(lookahead)


def test_second_turn_in_exact_after_a_paged_turn_gives_the_tokens_of_full(
    traced: Traced, document: str
) -> None:
    """Blocks computed under paging never pass for clean ones."""
    salt = uuid.uuid4().hex
    first = [{"role": "user", "content": document + QUESTION}]
    paged = stream_chat(
        traced.stack.url, first, mode="lookahead", budget_blocks=4, max_tokens=520, cache_salt=salt
    )
    assert paged.forepage["paged_steps"] > 0
    second = [*first, {"role": "assistant", "content": paged.text}, {"role": "user", "content": "And then?"}]
    exact = stream_chat(traced.stack.url, second, mode="exact", cache_salt=salt)
    oracle = stream_chat(traced.stack.url, second, mode="full", cache_salt=uuid.uuid4().hex)
    assert oracle.usage["prompt_tokens_details"]["cached_tokens"] == 0
    cached = exact.usage["prompt_tokens_details"]["cached_tokens"]
    assert 16_000 < cached <= len(document) + len(QUESTION) + 16, "the prompt's blocks, not the answer's"
    assert exact.text == oracle.text


def test_everything_returns_to_the_baseline(traced: Traced) -> None:
    stack = traced.stack

    def is_idle() -> bool:
        worker, arena = stack.worker(), stack.arena()
        return (
            worker.row_blocks_free == worker.row_blocks_total
            and worker.key_blocks_free == worker.key_blocks_total
            and worker.slots_free == worker.max_running
            and worker.arena_slots_held == 0
            and arena.leased == arena.writing == 0
            and arena.free + arena.cached == arena.total
        )

    wait_until(is_idle, timeout_s=10, what=f"idle: {stack.worker()} {stack.arena()}")


def check_bounds(answer: Answer) -> None:
    """Chosen blocks within the budget; resident ones within budget, always-resident and load slack."""
    report = answer.forepage
    assert 0 < report["chosen_blocks_max"] <= report["budget_blocks"]
    most = report["budget_blocks"] + report["always_resident_blocks_max"] + report["load_slack_blocks"]
    assert report["resident_blocks_max"] <= most
