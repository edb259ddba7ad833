"""When a guarded sequence escalates, and when it steps back."""

from forepage.kv.guard import Guard, GuardAction


def start(clean_intervals: int = 2) -> Guard:
    return Guard.start(min_recall=0.9, budget_blocks=8, clean_intervals=clean_intervals)


def test_guard_leaves_a_good_step_alone() -> None:
    guard = start()
    assert guard.on_audit(0.9) == (guard, GuardAction.NONE)


def test_guard_repairs_what_fits_half_the_budget() -> None:
    guard, action = start().on_audit(0.5, num_repairs=4)
    assert (action, guard.budget_blocks, guard.repaired, guard.raised) == (GuardAction.REPAIR, 8, True, False)
    assert guard.on_audit(0.5, num_repairs=4)[1] is GuardAction.REPAIR
    guard, action = guard.on_audit(0.5, num_repairs=5)
    assert (action, guard.budget_blocks, guard.raised) == (GuardAction.RAISE_BUDGET, 16, True)
    assert guard.on_audit(0.5, num_repairs=8)[1] is GuardAction.REPAIR
    assert guard.on_audit(0.5, num_repairs=9)[1] is GuardAction.MOVE_TO_EXACT


def test_guard_escalates_when_what_was_repaired_is_missed_again() -> None:
    guard, _ = start().on_audit(0.5, num_repairs=1)
    guard, action = guard.on_audit(0.5, num_repairs=None)
    assert action is GuardAction.RAISE_BUDGET
    assert guard.on_audit(0.5, num_repairs=None)[1] is GuardAction.MOVE_TO_EXACT


def test_guard_forgets_repairs_after_clean_intervals() -> None:
    guard, _ = start().on_audit(0.5, num_repairs=1)
    for _ in range(2):
        guard, _ = guard.on_boundary()
        assert guard.repaired, "the interval of the miss was not clean"
    guard, _ = guard.on_boundary()
    assert not guard.repaired


def test_guard_first_raises_the_budget_then_moves_to_exact() -> None:
    guard, action = start().on_audit(0.5)
    assert (action, guard.budget_blocks, guard.exact) == (GuardAction.RAISE_BUDGET, 16, False)
    guard, action = guard.on_audit(0.5)
    assert (action, guard.exact) == (GuardAction.MOVE_TO_EXACT, True)
    assert guard.on_audit(0.0)[1] is GuardAction.NONE, "there is nothing beyond exact"


def test_guard_steps_back_after_enough_clean_intervals() -> None:
    guard = start().to_exact()
    guard, action = guard.on_boundary()
    assert action is GuardAction.NONE, "the interval of the escalation was not clean"
    guard, action = guard.on_boundary()
    assert action is GuardAction.NONE
    guard, action = guard.on_boundary()
    assert (action, guard.exact, guard.raised) == (GuardAction.STEP_BACK, False, True)


def test_guard_a_miss_in_exact_starts_the_count_again() -> None:
    guard, _ = start().to_exact().on_boundary()
    guard, _ = guard.on_boundary()
    guard, _ = guard.on_audit(0.1)
    for _ in range(2):
        guard, action = guard.on_boundary()
        assert action is GuardAction.NONE


def test_guard_lowers_the_budget_after_clean_intervals() -> None:
    guard, _ = start().on_audit(0.5)
    for _ in range(3):
        guard, action = guard.on_boundary()
        assert action is GuardAction.NONE
    assert (guard.raised, guard.budget_blocks) == (False, 8)
