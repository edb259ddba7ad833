"""Every sequence of a worker moves to `exact` at once: an allocation each, out of one reserve."""

import pytest
import torch

from forepage.settings import OnIndexDown, ResidencyMode
from forepage.worker.sequence import Phase
from rigs.seen import Seen
from rigs.worker import Running, WorkerRig, text_tokens, wants, worker_rig

NUM_SEQUENCES = 4
MAX_TOKENS = 40
KV_BYTES = {"for all": 6 << 20, "for some": 4_089_446}
"""60 and 40 key blocks: the sequences are promised 28 in all under paging, 44 in `exact`."""
PROMPTS = [[*text_tokens(2_560), *text_tokens(20, 1 + number)] for number in range(NUM_SEQUENCES)]


def escalate_all(rig: WorkerRig) -> list[Running]:
    """All decode under paging; then the index is lost, and each wants `exact` at its next boundary."""
    rig.index.auto = wants(1, 3)
    answers = []
    for at, prompt in enumerate(PROMPTS):
        answers.append(
            rig.submit(
                prompt, mode=ResidencyMode.GUARDED, max_tokens=MAX_TOKENS, budget_blocks=1, name=str(at)
            )
        )
        rig.run_until(lambda: answers[-1].sequence.phase is Phase.DECODE)
    assert not any(one.sequence.is_exact for one in answers)
    rig.index.is_up = False
    rig.loop.index_down()
    return answers


@pytest.mark.parametrize("room", ["for all", "for some"])
def test_everybody_escalates_at_once(seen: Seen, room: str) -> None:
    """With room all of them go on; without, some wait for others to end. None is lost, nothing leaks."""
    num_waited = 0
    with worker_rig(
        on_index_down=OnIndexDown.EXACT,
        interval_steps=4,
        max_running=NUM_SEQUENCES,
        load_slack_blocks=1,
        kv_bytes=KV_BYTES[room],
        escalation_reserve_bytes=128 << 10,
        admission_timeout_s=900.0,
    ) as rig:
        answers = escalate_all(rig)
        with torch.inference_mode():
            while not all(one.is_over for one in answers):
                rig.loop.turn()
                rig.parts.blocks.check_integrity()
                waiting = sum(one.sequence.phase is Phase.PAUSED for one in answers)
                num_waited = max(num_waited, waiting)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
        rig.check_baseline()
    assert (num_waited > 0) is (room == "for some")
    for one in answers:
        assert one.report.moves_to_exact == 1
        assert one.report.exact_steps > 0
        assert len(one.tokens) == MAX_TOKENS
    seen(
        f"every sequence escalates at once, room {room}",
        "worker",
        promised="each is granted its keys, or waits for others to end; none is lost",
        recovery_s=None,
        requests=NUM_SEQUENCES,
        recovery_s_why="measured in steps of one process, not in seconds",
    )
