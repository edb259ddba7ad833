"""Who waits for memory is admitted by priority, then in order of arrival; who runs is left alone."""

from forepage.rpc import worker_pb2 as pb
from forepage.settings import ResidencyMode, WorkerSettings
from forepage.worker.request import Request
from rigs.worker import Running, WorkerRig, text_tokens, worker_rig

PROMPT = text_tokens(300)


def asked(rig: WorkerRig, name: str, priority: int) -> Running:
    """A request as it comes over the wire."""
    message = pb.GenerateRequest(
        request_id=name,
        prompt_token_ids=PROMPT,
        sampling=pb.Sampling(max_tokens=4),
        residency=pb.Residency(mode=pb.RESIDENCY_MODE_FULL),
        priority=priority,
        ignore_eos=True,
    )
    return rig.submit_request(Request.parse(message, WorkerSettings(), vocab_size=256, eos=0))


def order_of_first_tokens(rig: WorkerRig, running: list[Running]) -> list[str]:
    """Names, as they got their first token."""
    order: list[str] = []

    def looked() -> bool:
        for one in running:
            name = one.sequence.request.request_id
            if one.tokens and name not in order:
                order.append(name)
        return all(one.is_over for one in running)

    rig.run_until(looked)
    rig.run(*running)
    return order


def test_the_lowest_is_first_and_equals_keep_their_order() -> None:
    with worker_rig(max_running=1, admission_timeout_s=600.0) as rig:
        wishes = {"a": 0, "late": 5, "b": 0, "soon": -3, "late 2": 5, "soon 2": -3}
        running = [asked(rig, name, priority) for name, priority in wishes.items()]
        assert order_of_first_tokens(rig, running) == ["soon", "soon 2", "a", "b", "late", "late 2"]
        rig.check_baseline()


def test_one_that_runs_is_not_stopped_for_another() -> None:
    with worker_rig(max_running=1, admission_timeout_s=600.0) as rig:
        first = asked(rig, "first", 9)
        rig.run_until(lambda: bool(first.tokens))
        assert order_of_first_tokens(rig, [first, asked(rig, "urgent", -9)]) == ["first", "urgent"]


def test_one_that_goes_back_to_the_queue_keeps_its_place() -> None:
    """The arena is away when it is admitted: then no later one of its priority passes it."""
    with worker_rig(max_running=1, admission_timeout_s=600.0) as rig:
        rig.arena.is_down = True
        first = asked(rig, "a", 0)
        rig.run_until(lambda: first.sequence.last_refusal is not None)
        running = [first, *(asked(rig, name, priority) for name, priority in (("b", 1), ("c", 0)))]
        rig.arena.is_down = False
        assert order_of_first_tokens(rig, running) == ["a", "c", "b"]


def test_the_default_is_nought() -> None:
    with worker_rig() as rig:
        plain = rig.submit(PROMPT, mode=ResidencyMode.FULL, max_tokens=2)
        assert plain.sequence.request.priority == 0
        rig.run(plain)
