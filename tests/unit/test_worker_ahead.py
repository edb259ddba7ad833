"""A step launched before the last one is read: what it must not change, and what must not come of it.

The worker reads one step late here as it does on a GPU; the device is a CPU, so every order is repeatable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from forepage.model.resume import snapshot
from forepage.settings import ResidencyMode
from forepage.worker.request import Request
from forepage.worker.sampler import Sampling
from forepage.worker.sequence import Phase, Sequence
from rigs.worker import Running, WorkerRig, decode_until, plan_reply, text_tokens, wants, worker_rig

PROMPT = text_tokens(1_300)
FULL, LOOKAHEAD, GUARDED, EXACT = ResidencyMode.FULL, *list(ResidencyMode)[1:3], ResidencyMode.EXACT
UNRULY = Sampling(temperature=100.0, top_p=1.0, top_k=0, min_p=0.0, seed=3)
DRAWING = Sampling(temperature=1.0, top_p=0.9, top_k=50, min_p=0.0, seed=11)


@contextmanager
def ahead_rig(**changes: Any) -> Iterator[WorkerRig]:
    with worker_rig(padded=True, ahead_steps=1, **changes) as rig:
        yield rig


def request_of(running: Running, **changes: Any) -> Request:
    """The same request again, changed."""
    return replace(running.sequence.request, **changes)


@pytest.mark.parametrize("mode", [FULL, LOOKAHEAD, GUARDED, EXACT])
def test_tokens_and_counts_are_those_of_a_worker_that_reads_each_step(mode: ResidencyMode) -> None:
    said = []
    for ahead in (0, 1):
        with worker_rig(padded=True, ahead_steps=ahead) as rig:
            rig.index.auto = wants(1, 3)
            running = rig.submit(PROMPT, mode=mode, max_tokens=40, sampling=DRAWING)
            rig.run_until(lambda one=running: one.is_over, in_step=True)  # type: ignore[misc]
            report = running.report
            steps = (report.full_steps, report.exact_steps, report.paged_steps, report.decode_steps)
            said.append((running.tokens, steps, report.audited_steps, report.intervals))
            rig.run_until(lambda: rig.loop.num_sequences == 0)
            rig.check_baseline()
    assert said[0] == said[1]
    assert len(said[0][0]) == 40


def test_a_stop_token_ends_the_sequence_and_the_step_behind_it_leaves_nothing() -> None:
    """That step ends a block: neither the block nor a resume record may come of it."""
    prompt = text_tokens(1_264)
    with ahead_rig() as rig:
        whole = rig.submit(prompt, max_tokens=40, salt="a", sampling=UNRULY)
        rig.run(whole)
        # The step that processes token 1,279 ends a block; it is the one behind the stop token.
        stop = whole.tokens[1_279 - len(prompt)]
        count = whole.tokens.index(stop) + 1
        assert len(prompt) + count == 1_280, "choose another seed: the stop token comes before"
        published = set(rig.arena.ref_by_key)
        cut = rig.submit_request(
            request_of(whole, stop_token_ids=frozenset({stop}), cache_salt="b", request_id="cut")
        )
        rig.run(cut)
        assert cut.tokens == whole.tokens[:count]
        assert cut.finished is not None
        assert cut.finished.completion_tokens == count
        assert cut.report.decode_steps == count - 1
        geometry, new = rig.parts.geometry, set(rig.arena.ref_by_key) - published
        full_blocks = (len(prompt) + count - 1) // geometry.block_tokens
        assert len(new) == full_blocks + rig.parts.resume_parts
        rig.check_baseline()


def test_no_step_is_launched_behind_the_last_token_that_may_come() -> None:
    with ahead_rig() as rig:
        positions = spy_on_positions(rig)
        running = rig.submit(PROMPT, max_tokens=5)
        rig.run(running)
        assert positions == [len(PROMPT) + idx for idx in range(4)]
        assert len(running.tokens) == 5


def spy_on_positions(rig: WorkerRig) -> list[int]:
    """Positions of every row that is launched."""
    positions: list[int] = []
    device = rig.parts.device
    inner = device.decode

    def decode(rows: Any) -> Any:
        positions.extend(row.position for row in rows)
        return inner(rows)

    device.decode = decode  # type: ignore[method-assign]
    return positions


def test_what_an_unread_step_names_is_given_back_only_when_it_is_read() -> None:
    with ahead_rig() as rig:
        running, other = (rig.submit(PROMPT, max_tokens=60, name=str(idx)) for idx in range(2))
        decode_until(rig, other, 3)
        assert running.sequence.num_unread == 1
        rig.loop.cancel(running.sequence)
        before = len(running.tokens)
        rig.loop._take_messages()
        rig.loop._release_ended()
        assert running.sequence.phase is Phase.DONE
        assert running.sequence.device is not None, "a step under way reads and writes it"
        rig.run(other)
        assert len(running.tokens) == before
        rig.check_baseline()


def test_an_audit_is_asked_about_the_set_that_its_step_saw() -> None:
    """The plan of a boundary is committed only after the step audited behind it was read."""
    with ahead_rig(interval_steps=4, random_audits=2) as rig:
        turn = 0

        def auto(request: Any) -> Any:
            nonlocal turn
            turn += 1
            return plan_reply(request, [turn % 4, (turn + 1) % 4])

        rig.index.auto = auto
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=60)
        seen: dict[int, set[int]] = {}
        sequence, device = running.sequence, rig.parts.device
        inner = device.decode

        def decode(rows: Any) -> Any:
            seen[rows[0].position] = set(sequence.resident.key_id_by_block)
            return inner(rows)

        device.decode = decode  # type: ignore[method-assign]
        rig.run(running)
        audits = [audit for question in rig.index.questions for audit in question.audits]
        assert len(audits) > 10
        for audit in audits:
            bits = int.from_bytes(audit.resident, "little")
            told = {idx for idx in range(8 * len(audit.resident)) if bits >> idx & 1}
            candidates = range(max(told, default=-1) + 1)
            assert told == seen[audit.position].intersection(candidates)


def test_a_sequence_that_the_host_samples_never_runs_ahead() -> None:
    how = Sampling(0.0, 1.0, 0, 0.0, 0, frequency_penalty=0.5, num_logprobs=2)
    with worker_rig() as plain:
        expected = plain.submit(PROMPT, max_tokens=20, sampling=how)
        plain.run(expected)
    with ahead_rig() as rig:
        running = rig.submit(PROMPT, max_tokens=20, sampling=how, name="penalised")
        beside = rig.submit(PROMPT, max_tokens=30, name="plain")
        rig.run_until(lambda: len(running.tokens) > 3)
        assert running.sequence.num_unread == beside.sequence.num_unread == 0
        rig.run(running, beside)
        assert running.tokens == expected.tokens
        logprobs = [event.tokens.chosen[0].logprob for event in running.events if event.HasField("tokens")]
        assert len(logprobs) == 20
        assert max(logprobs) <= 0


def test_a_resume_record_holds_the_state_of_its_own_step() -> None:
    """Taken behind the step that ends a block, before the next one, which is launched before it is read."""
    with ahead_rig() as rig:
        running = rig.submit(text_tokens(1_250), max_tokens=300)
        memory, taken = rig.parts.device.local.memory, {}
        inner = rig.parts.device.decode

        def decode(rows: Any) -> Any:
            step = inner(rows)
            if (at := rows[0].position + 1) % rig.parts.geometry.block_tokens == 0:
                taken[at] = snapshot(memory.pools, rows[0].slot, at, memory.geometry)
            return step

        rig.parts.device.decode = decode  # type: ignore[method-assign]
        rig.run(running)
        assert sorted(taken) == [1_280, 1_536]
        follow = rig.submit([*text_tokens(1_250), *running.tokens, 65], max_tokens=3)
        rig.run(follow)
        assert follow.finished is not None
        assert follow.finished.cached_tokens == 1_536
        refs = [rig.arena.ref_by_key[key] for key in resume_keys(running.sequence, rig)]
        payload = b"".join(bytes(rig.arena.payload(ref).numpy()) for ref in refs)
        assert payload[: rig.parts.geometry.resume_bytes] == bytes(taken[1_536].numpy())


def resume_keys(sequence: Sequence, rig: WorkerRig) -> list[bytes]:
    return sequence.resume_part_keys(6, rig.parts.resume_parts, rig.parts.geometry)
