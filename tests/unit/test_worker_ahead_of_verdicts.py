"""A step launched before the verdict on the one before: after a miss the device leaves it out.

Then all is as if it had not been launched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from forepage.settings import ResidencyMode
from forepage.worker.launched_step import DecodeRow
from forepage.worker.padded_decode import PaddedStep
from forepage.worker.sampler import Sampling
from rigs.worker import Running, WorkerRig, text_tokens, wants, worker_rig

GUARDED, LOOKAHEAD, FULL = ResidencyMode.GUARDED, ResidencyMode.LOOKAHEAD, ResidencyMode.FULL
EARLY = 64
DRAWN = Sampling(0.8, 0.95, 20, 0.0, 7)


@contextmanager
def early_rig(*, ahead: bool, **changes: Any) -> Iterator[WorkerRig]:
    """Every one of the first steps is audited by the device, in three layers, and its token held."""
    how: dict[str, Any] = {
        "padded": True,
        "audits_on_device": True,
        "audit_layers": 3,
        "random_audits": 0,
        "early_audit_steps": EARLY,
        "ahead_steps": 1,
        "ahead_of_verdicts": ahead,
    }
    with worker_rig(**how | changes) as rig:
        rig.index.auto = wants(*range(8))  # one too many for the budget, so that something is missed
        yield rig


def answer(rig: WorkerRig, prompt: list[int], *, min_recall: float = 0.95, **how: Any) -> Running:
    asked: dict[str, Any] = {"mode": GUARDED, "max_tokens": 40, "budget_blocks": 7}
    running = rig.submit(prompt, **asked | how)
    running.sequence.guard = replace(running.sequence.guard, min_recall=min_recall)
    return running


def seen(running: Running) -> tuple[Any, ...]:
    """What the user is told, the steps made again among it."""
    report = running.report
    return (
        running.tokens,
        report.redone_steps,
        report.repairs,
        report.escalations,
        report.audited_steps,
        report.decode_steps,
        report.evidence_recall_mean,
        report.evidence_recall_first_mean,
        report.chosen_blocks_max,
    )


class Launches:
    """Spies on a rig's decode steps: rows that ran ahead of a verdict."""

    def __init__(self, rig: WorkerRig) -> None:
        self.ahead = 0
        padded = rig.parts.device._padded
        assert padded is not None
        launch = padded.launch

        def spy(rows: list[DecodeRow]) -> PaddedStep:
            self.ahead += sum(row.awaits_verdict for row in rows)
            return launch(rows)

        padded.launch = spy  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sampling", [None, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("num_tokens", [2_400, 2_541, 2_557], ids=["inside a block", "over its end", "at it"])
def test_after_a_miss_all_is_as_if_steps_waited(
    num_tokens: int, sampling: Sampling | None, device: str
) -> None:
    """On a GPU audits have a stream of their own and steps are graphs: the next one waits for the verdict."""
    prompt, found, launches = text_tokens(num_tokens), [], []
    for ahead in (False, True):
        with early_rig(ahead=ahead, device_name=device) as rig:
            launches.append(Launches(rig))
            running = answer(rig, prompt, sampling=sampling)
            rig.run(running)
            rig.check_baseline()
            found.append(seen(running))
    assert found[0] == found[1]
    assert found[0][1] > 2, "steps were made again"
    assert launches[0].ahead == 0
    assert launches[1].ahead >= found[0][1], "and behind each of them one was left out"


def test_a_miss_that_the_guard_lets_pass_leaves_out_the_next_step_too() -> None:
    """The device knows what was missed, not what the guard makes of it."""
    found, launches = [], []
    for ahead in (False, True):
        with early_rig(ahead=ahead) as rig:
            rig.index.auto = wants(0)
            launches.append(Launches(rig))
            running = answer(rig, text_tokens(2_541), min_recall=0.0)
            rig.run(running)
            found.append(seen(running))
    assert found[0] == found[1]
    assert found[0][1] == 0, "nothing was made again"
    assert 0.0 < found[0][6] < 1.0
    assert launches[1].ahead > 20


def test_a_useless_plan_gives_the_text_of_full() -> None:
    prompt = text_tokens(2_400)
    with early_rig(ahead=True, early_audit_steps=256) as rig:
        rig.index.auto = wants(0)
        guarded = answer(rig, prompt, max_tokens=48)
        full = answer(rig, prompt, mode=FULL, max_tokens=48)
        rig.run(guarded, full)
    assert guarded.report.redone_steps > 0
    assert guarded.tokens == full.tokens


def test_sequences_of_a_batch_are_left_out_one_by_one() -> None:
    """Guarded ones that miss at different steps, one that is not held, one in full: each as alone."""
    prompts = [text_tokens(count, seed) for seed, count in enumerate((2_400, 2_300, 2_500))]
    alone = []
    for prompt in prompts:
        with early_rig(ahead=False) as rig:
            running = answer(rig, prompt)
            rig.run(running)
            alone.append(running.tokens)
    with early_rig(ahead=True, max_running=5) as rig:
        launches = Launches(rig)
        together = [answer(rig, prompt, name=f"guarded {at}") for at, prompt in enumerate(prompts)]
        free = answer(rig, prompts[0], mode=LOOKAHEAD, name="free")
        full = answer(rig, prompts[0], mode=FULL, name="full")
        rig.run(*together, free, full)
        rig.check_baseline()
    assert [running.tokens for running in together] == alone
    assert sum(running.report.redone_steps for running in together) > 5
    assert len(full.tokens) == len(free.tokens) == 40
    assert launches.ahead > 5


def test_state_is_that_of_the_steps_that_count() -> None:
    """Window, compressor state and rows of the slot after a miss: what was left out wrote nothing."""
    prompt, states = text_tokens(2_541), []
    for ahead in (False, True):
        with early_rig(ahead=ahead) as rig:
            running = answer(rig, prompt, max_tokens=30)
            rig.run_until(lambda one=running: len(one.tokens) >= 24)  # type: ignore[misc]
            rig.loop._read_steps(0)
            sequence, pools = running.sequence, rig.parts.device.local.memory.pools
            slot = sequence.holds.slot
            rows = [pools.rows[sequence.resident.row_id_by_block[idx]].clone() for idx in (8, 9)]
            num = sequence.num_processed
            states.append((num, [pools.c4_state[slot].clone(), pools.window[slot].clone(), *rows]))
            rig.run(running)
    (num, waited), (num_ahead, ran) = states
    assert num == num_ahead
    for one, other in zip(waited, ran, strict=True):
        assert one.equal(other) or one.isnan().equal(other.isnan())


def test_a_cancelled_sequence_takes_nothing_of_what_ran_ahead() -> None:
    with early_rig(ahead=True) as rig:
        running = answer(rig, text_tokens(2_400))
        other = answer(rig, text_tokens(2_300, 1), name="other")
        rig.run_until(lambda: len(running.tokens) >= 5)
        rig.loop.cancel(running.sequence)
        rig.run(other)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()
    assert len(other.tokens) == 40


def test_a_stop_token_ends_before_what_ran_ahead() -> None:
    prompt = text_tokens(2_400)
    with early_rig(ahead=True) as rig:
        whole = answer(rig, prompt)
        rig.run(whole)
        stop = whole.tokens[11]
        request = replace(whole.sequence.request, request_id="stop", stop_token_ids=frozenset({stop}))
        stopped = rig.submit_request(request)
        rig.run(stopped)
    assert stopped.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
