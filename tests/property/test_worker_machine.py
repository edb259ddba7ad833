"""The worker's loop against chance, over a scripted index: see the machine."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from forepage.settings import ResidencyMode
from rigs.worker_machine import MAX_TOKENS, SETTINGS, WorkerMachine

MOST_TURNS = 50
paging_modes = st.sampled_from([mode for mode in ResidencyMode if mode is not ResidencyMode.FULL])


class AheadMachine(WorkerMachine):
    """As on a GPU: steps from static buffers, each launched before the one ahead of it is read."""

    rig_settings = SETTINGS | {"padded": True, "ahead_steps": 1}


class RoomMachine(WorkerMachine):
    """Whoever finds room keeps everything, and gives it up for others: there is room for one long prompt."""

    rig_settings = SETTINGS | {
        "full_share": 1.0,
        "kv_bytes": 1_800_000,
        "key_share": 0.45,
        "escalation_reserve_bytes": 0,
    }

    @rule(first=paging_modes, second=paging_modes)
    def submit_two_long(self, first: ResidencyMode, second: ResidencyMode) -> None:
        """Long enough for paging to make room; the second comes while the first decodes."""
        self.answer_by_itself([0, 1], 1.0)
        for branch, mode in enumerate((first, second)):
            self.submit(2_600, branch, mode, MAX_TOKENS, 1, "")
            newest = self.running[-1]
            for _ in range(MOST_TURNS):
                if newest.is_over or len(newest.tokens) > 2:
                    break
                self.turn_once()


WorkerMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
AheadMachine.TestCase.settings = settings(max_examples=6, stateful_step_count=25, deadline=None)
RoomMachine.TestCase.settings = settings(max_examples=4, stateful_step_count=25, deadline=None)
TestWorkerMachine = WorkerMachine.TestCase
TestAheadMachine = AheadMachine.TestCase
TestRoomMachine = RoomMachine.TestCase
