"""A load is lent blocks that nobody was promised: a plan is one commit, and what was lent comes back."""

from typing import Any

import pytest

from forepage.settings import ResidencyMode
from rigs.worker import Running, WorkerRig, decode_until, text_tokens, wants, worker_rig

PROMPT = text_tokens(4_000)
BUDGET = 7
FIRST, NEXT = tuple(range(7)), tuple(range(7, 14))
UNUSED = 4
"""Of its promise: a place of slack, and three that the tail has not needed so far."""


def promised(rig: WorkerRig) -> tuple[int, int]:
    return rig.parts.blocks.rows.promised, rig.parts.blocks.keys.promised


def commits_of_a_new_plan(rig: WorkerRig) -> tuple[Running, list[frozenset[int]], list[tuple[int, int]]]:
    """The sets seen while all of the set is exchanged, and what was promised meanwhile."""
    rig.index.auto = wants(*FIRST)
    running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=60, budget_blocks=BUDGET)
    decode_until(rig, running, 4)
    sets, promises = [chosen(running)], [promised(rig)]
    rig.index.auto = wants(*NEXT)

    def look() -> bool:
        if chosen(running) != sets[-1]:
            sets.append(chosen(running))
        promises.append(promised(rig))
        return sets[-1] == frozenset(NEXT) and running.sequence.lookahead.load is None

    rig.run_until(look)
    return running, sets, promises


def chosen(running: Running) -> frozenset[int]:
    resident = running.sequence.resident
    return frozenset(idx for idx in resident.row_id_by_block if idx < resident.pinned_from)


@pytest.mark.parametrize(
    ("lent", "num_commits", "loan"), [(0, 7, 0), (2, 3, 0), (5, 2, 6 - UNUSED), (100, 1, 7 - UNUSED)]
)
def test_a_plan_takes_as_many_commits_as_slack_and_loan_make_it(
    lent: int, num_commits: int, loan: int
) -> None:
    """What the promise has unused is taken before anything is lent."""
    with worker_rig(load_slack_blocks=1, load_lent_blocks=lent, interval_steps=16) as rig:
        running, sets, promises = commits_of_a_new_plan(rig)
        assert len(sets) == 1 + num_commits
        assert promised(rig) == promises[0], "all of it came back"
        assert max(promises) == (promises[0][0] + loan, promises[0][1] + loan)
        rig.run(running)
        rig.check_baseline()
    assert running.report.load_slack_blocks == 1 + lent
    assert running.report.resident_blocks_max <= BUDGET + rig.parts.recent_blocks + 1 + lent


def test_tokens_do_not_depend_on_loans_where_nothing_is_missed() -> None:
    tokens = []
    for lent in (0, 9):
        with worker_rig(load_slack_blocks=1, load_lent_blocks=lent) as rig:
            rig.index.auto = wants(*FIRST)
            running = rig.submit(PROMPT, mode=ResidencyMode.EXACT, max_tokens=40, budget_blocks=BUDGET)
            rig.run(running)
            tokens.append(running.tokens)
    assert tokens[0] == tokens[1]


def test_nothing_is_lent_while_a_request_waits_for_room() -> None:
    with worker_rig(load_slack_blocks=1, load_lent_blocks=100, max_running=1) as rig:
        rig.index.auto = wants(*FIRST)
        first = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=60, budget_blocks=BUDGET)
        decode_until(rig, first, 4)
        waiting = rig.submit(text_tokens(300, 1), max_tokens=4)
        rig.run_until(lambda: rig.loop.num_waiting == 1)
        rig.index.auto = wants(*NEXT)
        assert most_promised(rig, first) == promised(rig)
        rig.run(first, waiting)
        rig.check_baseline()


def test_a_sequence_that_ends_under_a_loan_gives_it_back() -> None:
    with worker_rig(load_slack_blocks=1, load_lent_blocks=100) as rig:
        rig.index.auto = wants(*FIRST)
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=60, budget_blocks=BUDGET)
        decode_until(rig, running, 4)
        rig.index.auto = wants(*NEXT)
        rig.run_until(lambda: has_loan(running))
        rig.loop.cancel(running.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()


def has_loan(running: Any) -> bool:
    load = running.sequence.lookahead.load
    return load is not None and load.lent_rows > 0 and load.lent_keys > 0


def test_a_full_pool_lends_what_there_is() -> None:
    with worker_rig(load_slack_blocks=1, load_lent_blocks=100) as rig:
        rig.index.auto = wants(*FIRST)
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=60, budget_blocks=BUDGET)
        decode_until(rig, running, 4)
        taken = rig.parts.blocks.rows.num_unpromised - 4
        assert rig.parts.blocks.rows.try_promise(taken)
        rig.index.auto = wants(*NEXT)
        before = promised(rig)
        assert most_promised(rig, running) == (before[0] + 5 - UNUSED, before[1] + 5 - UNUSED)
        rig.parts.blocks.rows.try_promise(-taken)
        rig.run(running)
        rig.check_baseline()


def most_promised(rig: WorkerRig, running: Running) -> tuple[int, int]:
    """Until the next plan is there."""
    seen: list[tuple[int, int]] = []

    def look() -> bool:
        seen.append(promised(rig))
        return chosen(running) == frozenset(NEXT)

    rig.run_until(look)
    return max(seen)
