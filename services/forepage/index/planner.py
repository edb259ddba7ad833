"""One question, answered: the plan of the next interval and the audits of the last.

Stateless and synchronous: everything comes with the question, so an index that was restarted answers the
same. Runs in a thread; what it decides is decided by pure functions of `kv/`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from forepage.index.audit import AuditOutcome, audit_layer
from forepage.index.key_store import MappedKeys
from forepage.index.question import (
    AuditQuestion,
    Prediction,
    Question,
    QuestionLimits,
    parse_request,
)
from forepage.index.scorer import BlockScorer
from forepage.kv.plan_source import baseline_choice
from forepage.kv.prefetch_plan import PrefetchPlan, choose_blocks
from forepage.rpc import index_pb2 as pb


@dataclass(frozen=True)
class PlanAnswer:
    """A plan, and how many candidate blocks it could look at."""

    plan: PrefetchPlan
    num_scored: int


@dataclass(frozen=True)
class Answer:
    """What one question gets."""

    plan: PlanAnswer | None  # None when no prediction was asked
    audits: tuple[tuple[AuditQuestion, AuditOutcome], ...]  # in the order asked


class Planner:
    """Answers requests for one model; used from several threads."""

    def __init__(self, scorer: BlockScorer, limits: QuestionLimits) -> None:
        self._scorer = scorer
        self._limits = limits

    def answer(self, request: pb.LookaheadRequest, keys: MappedKeys, check: Callable[[], None]) -> Answer:
        """Plan first, then audits; `check` may raise between parts to give up.

        Raises: RequestError naming the field that is wrong, and whatever `check` raises.
        """
        question = parse_request(request, self._limits)
        asked = question.prediction
        plan = None if asked is None else self._plan(question, asked, keys, check)
        audits = tuple((audit, audit_layer(keys, question.blocks, audit, check)) for audit in question.audits)
        return Answer(plan, audits)

    def _plan(
        self, question: Question, asked: Prediction, keys: MappedKeys, check: Callable[[], None]
    ) -> PlanAnswer:
        """Score the candidates, keep those above the threshold, cut to the budget."""
        scored = self._scorer.score_blocks(
            keys,
            question.blocks[: asked.num_candidates],
            hidden=asked.hidden,
            position=asked.position,
            threshold=asked.threshold,
            check=check,
        )
        choice = baseline_choice(
            choose_blocks(scored.scores, threshold=asked.threshold, budget_blocks=asked.budget_blocks),
            asked.source,
            num_candidates=asked.num_candidates,
            seed=asked.position,
        )
        plan = PrefetchPlan(question.stamp, choice.blocks, choice.scores, choice.num_above_threshold)
        return PlanAnswer(plan, scored.num_scored)
