"""One answer while it is made: worker events in, what it says and calls out, and what it cost.

Text is cut at stop strings here, before reasoning and calls are told apart; the worker knows only stop
tokens. A stop string cancels the call, so does the end of the only tool call that is wanted: such an
answer has no residency report, its token counts are the gateway's own.
"""

import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass

from opentelemetry.trace import Span

from forepage.gateway.choice import Choice, Piece
from forepage.gateway.logprobs import LogprobReader, ScoredToken
from forepage.gateway.replies import FinishReason, TokenCounts
from forepage.gateway.residency_usage import Report, residency_usage
from forepage.gateway.resuming import ResumingStream
from forepage.gateway.worker_client import Served
from forepage.rpc import worker_pb2 as pb
from forepage.telemetry import MetricName, Telemetry, set_attributes
from forepage.text.answer_parser import AnswerParser, Delta
from forepage.text.detokenizer import Detokenizer
from forepage.text.messages import ThinkingMode
from forepage.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reading:
    """How an answer is read: where it stops, whether it thinks and may call tools, what it is scored by."""

    stops: Sequence[str]
    stop_tokens: Collection[int]
    mode: ThinkingMode
    with_tools: bool
    max_calls: int | None
    num_top_logprobs: int | None


class Generation:
    """Owns one stream that has started. Read `pieces` once, to their end; then the outcome is there."""

    def __init__(
        self,
        stream: ResumingStream,
        started: pb.Started,
        *,
        request_id: str,
        tokenizer: Tokenizer,
        reading: Reading,
    ) -> None:
        self.request_id = request_id
        self._stream = stream
        self._started = started
        self._detokenizer = Detokenizer(tokenizer, reading.stops, reading.stop_tokens)
        self._parser = AnswerParser(reading.mode, with_tools=reading.with_tools, max_calls=reading.max_calls)
        num_top = reading.num_top_logprobs
        self._logprobs = None if num_top is None else LogprobReader(tokenizer, num_top)
        self._unshown: list[ScoredToken] = []
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

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer; the last piece may be empty. Raises: the typed error that ended it early."""
        while True:
            deltas = self._read(await self._stream.next_event())
            if self.done:
                break
            if deltas:
                yield Piece(deltas, self._shown())
        deltas += self._parser.finish(complete=self._is_complete)
        self._stream.close()
        yield Piece(deltas, self._shown())

    async def choice(self) -> Choice:
        """All of it."""
        choice = Choice()
        async for piece in self.pieces():
            choice.add(piece)
        choice.finish_reason = self.finish_reason
        return choice

    def _read(self, event: pb.GenerateEvent) -> list[Delta]:
        kind = event.WhichOneof("event")
        if kind == "finished":
            self._finished = event.finished
            return self._parser.feed(self._detokenizer.finish())
        if kind != "tokens":
            return []
        self._mark_time()
        before = self._detokenizer.num_tokens
        text = self._detokenizer.feed(event.tokens.token_ids)
        if self._logprobs is not None:
            self._unshown += self._logprobs.read(event.tokens, self._detokenizer.num_tokens - before)
        return self._parser.feed(text)

    def _shown(self) -> list[ScoredToken]:
        shown, self._unshown = self._unshown, []
        return shown

    @property
    def done(self) -> bool:
        """Whether it came to a regular end."""
        return self._is_cut or self._finished is not None

    @property
    def _is_cut(self) -> bool:
        """Whether it ended here, at a stop string or behind the only call wanted, not at the worker."""
        return self._detokenizer.stopped or (self._parser.ended and self._finished is None)

    @property
    def _is_complete(self) -> bool:
        """Whether the model itself ended it."""
        reason = None if self._finished is None else self._finished.reason
        is_ended = reason == pb.FinishReason.FINISH_REASON_STOP and not self._detokenizer.saw_stop_token
        return is_ended and not self._is_cut

    @property
    def finish_reason(self) -> FinishReason:
        """OpenAI's: why it ended."""
        if self._detokenizer.stopped or self._detokenizer.saw_stop_token:
            return "stop"
        if self._finished is not None and self._finished.reason == pb.FinishReason.FINISH_REASON_LENGTH:
            return "length"
        return "tool_calls" if self._parser.num_calls else "stop"

    @property
    def counts(self) -> TokenCounts:
        """The worker's counts; ours where it has not said."""
        done = self._finished
        if done is None or self._detokenizer.stopped:
            started = self._started
            return TokenCounts(started.prompt_tokens, started.cached_tokens, self._detokenizer.num_tokens)
        return TokenCounts(done.prompt_tokens, done.cached_tokens, done.completion_tokens)

    @property
    def residency(self) -> Report | None:
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
        telemetry.record(MetricName.TIME_TO_FIRST_TOKEN, first_s - arrived_s, span=span, **labels)
        if counts.completion > 1:
            each_s = (last_s - first_s) / (counts.completion - 1)
            telemetry.record(MetricName.TIME_PER_OUTPUT_TOKEN, each_s, span=span, **labels)

    def _mark_time(self) -> None:
        now = time.monotonic()
        self._token_times_s = (self._token_times_s[0] if self._token_times_s else now, now)
