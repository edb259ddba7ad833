"""Replies of the index that are wrong or missing: refused whole, and their audits counted as lost."""

from collections.abc import Callable

import pytest

from forepage.rpc import index_pb2
from forepage.settings import ResidencyMode
from rigs.worker import plan_reply, text_tokens, worker_rig

PROMPT = text_tokens(1_300)
GUARDED = ResidencyMode.GUARDED
Spoil = Callable[[index_pb2.LookaheadReply], None]


def _other_interval(reply: index_pb2.LookaheadReply) -> None:
    reply.stamp.interval += 1


def _more_resident_evidence_than_evidence(reply: index_pb2.LookaheadReply) -> None:
    reply.audits[0].num_evidence_resident = 21


def _masses_missing(reply: index_pb2.LookaheadReply) -> None:
    reply.audits[0].missing_block_idx.append(1)


def _not_a_number(reply: index_pb2.LookaheadReply) -> None:
    reply.audits[0].missed_mass = float("nan")


def _an_audit_twice(reply: index_pb2.LookaheadReply) -> None:
    reply.audits.append(reply.audits[0])


def _an_audit_nobody_asked(reply: index_pb2.LookaheadReply) -> None:
    reply.audits[0].position += 1


def _scores_missing(reply: index_pb2.LookaheadReply) -> None:
    reply.plan.block_idx.append(1)


@pytest.mark.parametrize(
    "spoil",
    [
        _other_interval,
        _more_resident_evidence_than_evidence,
        _masses_missing,
        _not_a_number,
        _an_audit_twice,
        _an_audit_nobody_asked,
        _scores_missing,
    ],
)
def test_a_bad_reply_is_refused_whole_and_its_audits_are_lost(spoil: Spoil) -> None:
    def answer(request: index_pb2.LookaheadRequest) -> index_pb2.LookaheadReply:
        reply = plan_reply(request, [1, 3])
        if request.audits:
            spoil(reply)
        return reply

    with worker_rig(random_audits=0, interval_steps=4) as rig:
        rig.index.auto = answer
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=12)
        rig.run(running)
        report = running.report
        assert report.audited_steps == 0
        asked = sum(len(question.audits) for question in rig.index.questions)
        assert report.audits_lost == asked > 0
        rig.check_baseline()


def test_audits_that_are_open_at_the_end_are_lost_and_forgotten() -> None:
    with worker_rig(interval_steps=4, random_audits=0) as rig:
        rig.index.auto = lambda request: None if request.audits else plan_reply(request, [1, 3])
        running = rig.submit(PROMPT, mode=GUARDED, max_tokens=12)
        rig.run(running)
        asked = sum(len(question.audits) for question in rig.index.questions)
        assert running.report.audits_lost == asked > 0
        for question in rig.index.questions:
            rig.index.answer(plan_reply(question, [1, 3]))
        rig.loop.turn()
        assert running.report.audits_lost == asked
