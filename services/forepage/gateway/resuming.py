"""One answer over as many workers as it takes: a stream that is lost goes on where it stopped.

The next worker gets the prompt and the tokens so far: no token is lost and none comes twice. Sampling depends
on seed and position alone, so it says what the first would have said, but for the rounding of a prefill where
that one decoded. It must be of the same fingerprint: other weights under the same name would end another
answer. Its report covers its own tokens, and says how many are not.
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import structlog
from opentelemetry.trace import Span

from forepage.errors import DeadlineError, DependencyError, ForepageError
from forepage.gateway.routing import rank_workers
from forepage.gateway.worker_client import Served, WorkerClient, WorkerStream
from forepage.gateway.worker_directory import WorkerDirectory
from forepage.rpc import worker_pb2 as pb
from forepage.telemetry import MetricName, Telemetry

RETRY_S = 0.1
"""Between two rounds over the workers, while none takes the answer over."""


async def started_of(stream: WorkerStream) -> pb.Started:
    """The stream's first event; it is closed if that is another. Raises: the typed error instead of it."""
    try:
        event = await stream.next_event()
        if event.WhichOneof("event") != "started":
            raise DependencyError(f"worker {stream.worker_id} did not say that it started")
    except BaseException:
        stream.close()
        raise
    return event.started


@dataclass(frozen=True)
class Resumer:
    """Finds another worker for one answer; `deadline_s` is on the monotonic clock."""

    directory: WorkerDirectory
    telemetry: Telemetry
    model: str
    span: Span
    deadline_s: float
    wait_s: float
    max_resumes: int

    async def resume(
        self, request: pb.GenerateRequest, fingerprint: str, lost_by: Collection[str]
    ) -> WorkerStream | None:
        """A started stream of a worker of this model that goes on with the answer; of `lost_by` last.

        None when none could within `wait_s`. Raises: DeadlineError.
        """
        until_s = min(self.deadline_s, time.monotonic() + self.wait_s)
        while True:
            for worker in self._workers(request, fingerprint, lost_by):
                stream = await self._try_start(request, worker)
                if stream is not None:
                    return stream
            if time.monotonic() + RETRY_S > until_s:
                return None
            await asyncio.sleep(RETRY_S)

    def _workers(
        self, request: pb.GenerateRequest, fingerprint: str, lost_by: Collection[str]
    ) -> list[WorkerClient]:
        """Those that serve the very model and have room for the whole of it, best first."""
        needed = len(request.prompt_token_ids) + request.sampling.max_tokens
        try:
            usable = self.directory.workers_for(self.model)
        except ForepageError:
            return []
        fitting = {
            worker.load.worker_id: worker
            for worker in usable
            if worker.served is not None
            and worker.served.model_fingerprint == fingerprint
            and worker.served.max_context_tokens >= needed
        }
        ranked = rank_workers(
            request.prompt_token_ids, request.cache_salt, [worker.load for worker in fitting.values()]
        )
        ids = sorted((load.worker_id for load in ranked), key=lambda name: name in lost_by)
        return [fitting[name] for name in ids]

    async def _try_start(self, request: pb.GenerateRequest, worker: WorkerClient) -> WorkerStream | None:
        left_s = max(0.0, self.deadline_s - time.monotonic())
        try:
            stream = worker.generate(request, timeout_s=left_s, span=self.span)
            await started_of(stream)
        except DeadlineError:
            raise
        except ForepageError as error:
            log = structlog.get_logger("forepage.gateway")
            log.info("could not resume there", worker=worker.load.worker_id, error=str(error))
            return None
        return stream


class ResumingStream:
    """The events of one answer, `started` left out. `close` cancels whatever call is open."""

    def __init__(
        self, stream: WorkerStream, started: pb.Started, request: pb.GenerateRequest, resumer: Resumer
    ) -> None:
        self._stream = stream
        # Of now: a worker that was restarted at its address may serve another model.
        self._fingerprint = stream.served.model_fingerprint
        self._started = started
        self._request = request
        self._resumer = resumer
        self._answered: list[int] = []
        self._lost_by: list[str] = []

    @property
    def served(self) -> Served:
        """What the worker serves."""
        return self._stream.served

    @property
    def worker_id(self) -> str:
        """Who answers now."""
        return self._stream.worker_id

    async def next_event(self) -> pb.GenerateEvent:
        """Tokens, or the end. Raises: the typed error of a failure that no other worker can make good."""
        while True:
            try:
                event = await self._stream.next_event()
            except DependencyError as lost:
                if not self._stream.may_resume:
                    raise
                end = _end_of(self._started, self._request, self._answered)
                if end is not None:
                    return end
                await self._resume(lost)
            else:
                self._answered += event.tokens.token_ids
                return event

    async def _resume(self, lost: DependencyError) -> None:
        self._stream.close()
        if len(self._lost_by) >= self._resumer.max_resumes:
            raise lost
        self._lost_by.append(self.worker_id)
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        request.answered_token_ids.extend(self._answered)
        resumed = await self._resumer.resume(request, self._fingerprint, self._lost_by)
        if resumed is None:
            raise lost
        self._stream = resumed
        self._resumer.telemetry.count(MetricName.FALLBACKS, fallback="resumed_stream")
        log = structlog.get_logger("forepage.gateway")
        log.warning(
            "went on with a lost stream",
            worker=self.worker_id,
            answered_tokens=len(self._answered),
            error=str(lost),
        )

    def close(self) -> None:
        """Cancel the call if it still runs."""
        self._stream.close()


def _end_of(
    started: pb.Started, request: pb.GenerateRequest, answered: Sequence[int]
) -> pb.GenerateEvent | None:
    """The end of an answer that has all its tokens and lost only this event; its report is lost too."""
    if answered and answered[-1] in request.sampling.stop_token_ids:
        reason = pb.FinishReason.FINISH_REASON_STOP
    elif len(answered) >= request.sampling.max_tokens:
        reason = pb.FinishReason.FINISH_REASON_LENGTH
    else:
        return None
    return pb.GenerateEvent(
        finished=pb.Finished(
            reason=reason,
            prompt_tokens=started.prompt_tokens,
            cached_tokens=started.cached_tokens,
            completion_tokens=len(answered),
        )
    )
