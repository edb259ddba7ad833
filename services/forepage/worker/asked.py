"""A question that is open on the stream to the index, and which replies answer it."""

import math
from dataclasses import dataclass

from forepage.rpc import index_pb2 as pb
from forepage.worker.lookahead_state import Question
from forepage.worker.sequence import Sequence


@dataclass(frozen=True)
class Asked:
    """An open question on the stream."""

    sequence: Sequence
    question: Question | None
    stamp: pb.Stamp
    audits: frozenset[tuple[int, int]]
    """(layer, position) of each."""

    def accepts(self, reply: pb.LookaheadReply) -> bool:
        """Whether this is an answer to the question, and one that can be taken at its word."""
        answered = [(audit.layer_idx, audit.position) for audit in reply.audits]
        return (
            reply.stamp == self.stamp
            and len(reply.plan.block_idx) == len(reply.plan.score)
            and self.audits.issuperset(answered)
            and len(set(answered)) == len(answered)
            and all(_is_sound(audit) for audit in reply.audits)
        )


def _is_sound(audit: pb.AuditResult) -> bool:
    """Whether the counts and shares of one audited layer can be true."""
    return (
        audit.num_evidence_resident <= audit.num_evidence
        and len(audit.missing_block_idx) == len(audit.missing_mass)
        and all(0.0 <= share <= 1.0 for share in (audit.missed_mass, audit.recall_at_k))
        and all(math.isfinite(mass) for mass in audit.missing_mass)
    )
