"""The gRPC side of the index: one stream a worker, questions answered as they finish.

Every question ends in exactly one reply of its id, an answer or a typed error; a bad question never ends
the stream. Questions run concurrently up to `max_inflight` a stream (then reading stops, and the sender is
held back by flow control), their scoring in threads, a few at a time.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import structlog
from opentelemetry.trace import Span, SpanKind

from forepage.errors import ForepageError
from forepage.frames import PlanFrame
from forepage.index.audit import AuditOutcome
from forepage.index.deadline import Deadline, deadline_error
from forepage.index.key_store import KeyStore, MappedKeys
from forepage.index.planner import Answer, Planner
from forepage.index.publisher import PlanPublisher
from forepage.index.question import AuditQuestion
from forepage.rpc import index_pb2 as pb
from forepage.rpc.index_pb2_grpc import LookaheadIndexServicer
from forepage.telemetry import MetricName, SpanName, Telemetry, set_attributes
from forepage.trace_context import context_of_traceparent, traceparent_of

SCORING_THREADS = 4
"""Questions scored at once in the process, each on one core."""
_log = structlog.get_logger("forepage.index")

Context = grpc.aio.ServicerContext[pb.LookaheadRequest, pb.LookaheadReply]


class LookaheadServicer(LookaheadIndexServicer):
    """Answers the streams of all workers; owns the bound on scoring threads."""

    def __init__(
        self,
        store: KeyStore,
        planner: Planner,
        *,
        publisher: PlanPublisher | None,
        telemetry: Telemetry,
        max_inflight: int,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._planner = planner
        self._publisher = publisher
        self._telemetry = telemetry
        self._max_inflight = max_inflight
        self._clock = clock
        self._threads = asyncio.Semaphore(SCORING_THREADS)
        self._readers: set[asyncio.Task[None]] = set()

    async def Lookahead(  # noqa: N802 (the name in the .proto)
        self, request_iterator: AsyncIterator[pb.LookaheadRequest], context: Context
    ) -> None:
        """Serve one worker's stream until it ends it, or `drain` does."""
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read(request_iterator, context, tasks))
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)

    def drain(self) -> None:
        """Read no more questions; streams end once what was read is answered."""
        for reader in self._readers:
            reader.cancel()

    async def _read(
        self, requests: AsyncIterator[pb.LookaheadRequest], context: Context, tasks: asyncio.TaskGroup
    ) -> None:
        inflight = asyncio.Semaphore(self._max_inflight)
        writing = asyncio.Lock()  # gRPC sends one message at a time
        while True:
            await inflight.acquire()  # before reading: a question that was read is always answered
            try:
                request = await anext(requests)
            except StopAsyncIteration:
                return
            deadline = Deadline.after_ms(request.deadline_ms, self._clock)
            task = tasks.create_task(self._serve(request, deadline, context, writing))
            task.add_done_callback(lambda _: inflight.release())

    async def _serve(
        self, request: pb.LookaheadRequest, deadline: Deadline, context: Context, writing: asyncio.Lock
    ) -> None:
        reply = await self._reply(request, deadline)
        async with writing:
            await context.write(reply)

    async def _reply(self, request: pb.LookaheadRequest, deadline: Deadline) -> pb.LookaheadReply:
        started = self._clock()
        reply = pb.LookaheadReply(request_id=request.request_id, stamp=request.stamp)
        try:
            with self._telemetry.span(
                SpanName.INDEX_LOOKAHEAD,
                context_of_traceparent(request.traceparent),
                kind=SpanKind.SERVER,
                sequence_id=request.stamp.sequence_id,
                interval=request.stamp.interval,
                num_blocks=len(request.arena_ids) // 4,
                num_audits=len(request.audits),
            ) as span:
                found = await self._answer(request, self._store.current(), deadline)
                self._fill(reply, found, request, span)
        except ForepageError as error:
            reply.error_code, reply.error_message = error.code, error.message
        except Exception:
            _log.exception("question failed", request_id=request.request_id)
            reply.error_code, reply.error_message = ForepageError.code, "the index failed; see its log"
        self._telemetry.record(
            MetricName.INDEX_LATENCY, (self._clock() - started) * 1e3, outcome=reply.error_code or "ok"
        )
        return reply

    async def _answer(self, request: pb.LookaheadRequest, keys: MappedKeys, deadline: Deadline) -> Answer:
        """Parse and answer in a thread. Raises: DeadlineError as soon as the deadline passes.

        A thread can't be interrupted: one that is still at work keeps its place until it sees, between
        two chunks, that its question has run out of time.
        """

        def work() -> Answer:
            deadline.check()
            return self._planner.answer(request, keys, deadline.check)

        try:
            async with asyncio.timeout(deadline.remaining_s()):
                await self._threads.acquire()
        except TimeoutError as error:
            raise deadline_error() from error
        scoring = asyncio.ensure_future(asyncio.to_thread(work))
        scoring.add_done_callback(self._thread_ended)
        done, _ = await asyncio.wait({scoring}, timeout=deadline.remaining_s())
        if not done:
            raise deadline_error()
        return scoring.result()

    def _thread_ended(self, scoring: "asyncio.Future[Answer]") -> None:
        self._threads.release()
        if not scoring.cancelled():
            scoring.exception()  # of a question nobody waits for any more: seen, so asyncio is quiet

    def _fill(
        self, reply: pb.LookaheadReply, found: Answer, request: pb.LookaheadRequest, span: Span
    ) -> None:
        """Write the answer into the reply, count it and publish its plan."""
        reply.audits.extend(_audit_result(*item) for item in found.audits)
        if found.plan is None:
            return
        plan = found.plan.plan
        reply.plan.block_idx.extend(plan.blocks)
        reply.plan.score.extend(plan.scores)
        reply.plan.num_scored = found.plan.num_scored
        reply.plan.num_above_threshold = plan.num_above_threshold
        set_attributes(span, desired_blocks=len(plan.blocks))
        self._telemetry.count(MetricName.PREDICTIONS)
        if self._publisher is not None:
            self._publisher.publish(
                PlanFrame(
                    sequence_id=plan.stamp.sequence_id,
                    incarnation=plan.stamp.incarnation,
                    interval=plan.stamp.interval,
                    num_tokens=request.num_tokens,
                    block_idx=plan.blocks,
                    score=plan.scores,
                    num_above_threshold=plan.num_above_threshold,
                    traceparent=traceparent_of(span),
                )
            )


def _audit_result(question: AuditQuestion, outcome: AuditOutcome) -> pb.AuditResult:
    verdict = outcome.verdict
    return pb.AuditResult(
        layer_idx=question.layer_idx,
        position=question.position,
        num_evidence=verdict.num_evidence,
        num_evidence_resident=verdict.num_evidence_resident,
        missed_mass=verdict.missed_mass,
        recall_at_k=verdict.recall_at_k,
        missing_block_idx=[block for block, _ in verdict.missing],
        missing_mass=[mass for _, mass in verdict.missing],
        num_unread=outcome.num_unread,
    )
