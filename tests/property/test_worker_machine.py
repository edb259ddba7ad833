"""The worker's loop against chance, over a scripted index: see the machine."""

from hypothesis import settings

from rigs.worker_machine import SETTINGS, WorkerMachine


class AheadMachine(WorkerMachine):
    """As on a GPU: steps from static buffers, each launched before the one ahead of it is read."""

    rig_settings = SETTINGS | {"padded": True, "ahead_steps": 1}


WorkerMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
AheadMachine.TestCase.settings = settings(max_examples=6, stateful_step_count=25, deadline=None)
TestWorkerMachine = WorkerMachine.TestCase
TestAheadMachine = AheadMachine.TestCase
