"""One answer while it is made: worker events in, text out, and what it cost.

Text is cut at stop strings here; the worker knows only stop tokens. A stop string cancels the call, so
such an answer has no residency report: its token counts are the gateway's own.
"""

import time
from collections.abc import AsyncIterator, Sequence

from opentelemetry.trace import Span

from forepage.gateway.replies import FinishReason, TokenCounts
from forepage.gateway.residency_usage import JsonScalar, residency_usage
from forepage.gateway.worker_client import Served, WorkerStream
from forepage.rpc import worker_pb2 as pb
from forepage.telemetry import MetricName, Telemetry, set_attributes
from forepage.text.detokenizer import Detokenizer
from forepage.text.tokenizer import Tokenizer


class Generation:
    """Owns one stream that has started. Read `text` once, to its end; then the outcome is there."""

    def __init__(
        self,
        stream: WorkerStream,
        started: pb.Started,
        *,
        request_id: str,
        tokenizer: Tokenizer,
        stops: Sequence[str],
    ) -> None:
        self.request_id = request_id
        self._stream = stream
        self._started = started
        self._detokenizer = Detokenizer(tokenizer, stops)
        self._finished: pb.Finished | None = None
        self._token_times_s: tuple[float, float] | None = None

    @property
    def served(self) -> Served:
        """The model that answers."""
        return self._stream.served

    @property
    def worker_id(self) -> str:
        """Who answers."""
        return self._stream.worker_id

    async def text(self) -> AsyncIterator[str]:
        """Pieces of the answer. Raises: the typed error that ended it early."""
        while not self._detokenizer.stopped and self._finished is None:
            event = await self._stream.next_event()
            kind = event.WhichOneof("event")
            if kind == "tokens":
                self._mark_time()
                piece = self._detokenizer.feed(event.tokens.token_ids)
            elif kind == "finished":
                self._finished = event.finished
                piece = self._detokenizer.finish()
            else:
                continue
            if piece:
                yield piece
        self._stream.close()

    async def whole_text(self) -> str:
        """All of it."""
        return "".join([piece async for piece in self.text()])

    @property
    def done(self) -> bool:
        """Whether it came to a regular end."""
        return self._detokenizer.stopped or self._finished is not None

    @property
    def finish_reason(self) -> FinishReason:
        """OpenAI's: stop, or length."""
        length = pb.FinishReason.FINISH_REASON_LENGTH
        ended = self._finished is not None and self._finished.reason == length
        return "length" if ended and not self._detokenizer.stopped else "stop"

    @property
    def counts(self) -> TokenCounts:
        """The worker's counts; ours where it has not said."""
        done = self._finished
        if done is None or self._detokenizer.stopped:
            started = self._started
            return TokenCounts(started.prompt_tokens, started.cached_tokens, self._detokenizer.num_tokens)
        return TokenCounts(done.prompt_tokens, done.cached_tokens, done.completion_tokens)

    @property
    def residency(self) -> dict[str, JsonScalar] | None:
        """The worker's report; None when the answer ended before it came."""
        if self._finished is None or not self._finished.HasField("residency"):
            return None
        return residency_usage(self._finished.residency)

    def close(self, telemetry: Telemetry, span: Span, *, operation: str, arrived_s: float) -> None:
        """Let the worker go if it still runs, and record what came."""
        self._stream.close()
        counts, model = self.counts, self.served.model_name
        telemetry.count(MetricName.TOKENS, counts.prompt, token_type="input", request_model=model)
        telemetry.count(MetricName.TOKENS, counts.completion, token_type="output", request_model=model)
        set_attributes(
            span,
            worker_id=self.worker_id,
            input_tokens=counts.prompt,
            cached_tokens=counts.cached,
            output_tokens=counts.completion,
        )
        if self.done:
            set_attributes(span, finish_reasons=[self.finish_reason])
        if self._token_times_s is None:
            return
        first_s, last_s = self._token_times_s
        labels = {"operation": operation, "request_model": model}
        telemetry.record(MetricName.TIME_TO_FIRST_TOKEN, first_s - arrived_s, **labels)
        if counts.completion > 1:
            each_s = (last_s - first_s) / (counts.completion - 1)
            telemetry.record(MetricName.TIME_PER_OUTPUT_TOKEN, each_s, **labels)

    def _mark_time(self) -> None:
        now = time.monotonic()
        self._token_times_s = (self._token_times_s[0] if self._token_times_s else now, now)
