"""A decode worker that answers from a script: what a gateway talks to in tests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import tokenizers

from forepage.rpc import worker_pb2 as pb
from forepage.rpc.worker_pb2_grpc import DecodeWorkerServicer, add_DecodeWorkerServicer_to_server
from forepage.settings import SEEDED_MODEL
from forepage.text.tokenizer import TOKENIZER_FILE

MODEL = "forepage-test"
ANSWER = "The answer is 42 🙂."

Script = Callable[[pb.GenerateRequest], AsyncIterator[pb.GenerateEvent]]
StartWorker = Callable[..., Awaitable["FakeWorker"]]


def started(request: pb.GenerateRequest, cached: int = 0) -> pb.GenerateEvent:
    """The first event of an answer."""
    return pb.GenerateEvent(
        started=pb.Started(prompt_tokens=len(request.prompt_token_ids), cached_tokens=cached)
    )


def tokens(ids: bytes | list[int]) -> pb.GenerateEvent:
    """Tokens; bytes are their own ids."""
    return pb.GenerateEvent(tokens=pb.Tokens(token_ids=list(ids)))


def answer_ids(text: str) -> list[int]:
    """Ids of an answer in which control tokens are spelled."""
    encoder = tokenizers.Tokenizer.from_file(str(SEEDED_MODEL / TOKENIZER_FILE))
    ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
    return ids


def saying(text: str, *, reason: str = "STOP", width: int = 3) -> "Script":
    """A worker that answers `text`, in which control tokens are spelled, `width` tokens an event."""
    ids = answer_ids(text)

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
        yield started(request)
        for start in range(0, len(ids), width):
            yield tokens(ids[start : start + width])
        yield finished(request, len(ids), reason=reason)

    return script


def scored(request: pb.GenerateRequest, ids: list[int]) -> pb.GenerateEvent:
    """Tokens with log-probabilities as asked: -0.5 for each, -1, -2 … for tokens 65, 66 …"""
    asked = request.sampling
    chosen = [pb.TokenLogprob(token_id=token, logprob=-0.5) for token in ids]
    top = [pb.TokenLogprob(token_id=65 + rank, logprob=-1.0 - rank) for rank in range(asked.num_logprobs)]
    return pb.GenerateEvent(
        tokens=pb.Tokens(
            token_ids=ids,
            chosen=chosen if asked.logprobs else [],
            top=top * len(ids) if asked.logprobs else [],
        )
    )


def finished(
    request: pb.GenerateRequest, completion_tokens: int, *, reason: str = "STOP", cached: int = 0
) -> pb.GenerateEvent:
    """The last event, with a report."""
    return pb.GenerateEvent(
        finished=pb.Finished(
            reason=f"FINISH_REASON_{reason}",
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=cached,
            completion_tokens=completion_tokens,
            residency=pb.ResidencyReport(
                mode_requested="RESIDENCY_MODE_GUARDED",
                mode_final="RESIDENCY_MODE_EXACT",
                audited_steps=3,
                evidence_recall_mean=0.95,
            ),
        )
    )


async def answer(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """ANSWER, two bytes an event, cut to max_tokens."""
    data = ANSWER.encode()
    shown = data[: request.sampling.max_tokens]
    yield started(request, cached=2)
    for start in range(0, len(shown), 2):
        yield tokens(shown[start : start + 2])
    yield finished(request, len(shown), reason="STOP" if shown == data else "LENGTH", cached=2)


async def endless(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """Tokens for ever."""
    yield started(request)
    while True:
        yield tokens(b"x")
        await asyncio.sleep(0.002)


async def silent(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """Starts, then says nothing."""
    yield started(request)
    await asyncio.Event().wait()


async def queued(_: pb.GenerateRequest) -> AsyncIterator[pb.GenerateEvent]:
    """Never starts."""
    await asyncio.Event().wait()
    yield pb.GenerateEvent()


@dataclass
class FakeWorker(DecodeWorkerServicer):
    """Answers by `script`; remembers what it was asked and how many calls were cancelled."""

    worker_id: str = "worker-0"
    model_name: str = MODEL
    model_fingerprint: str = "fp-1"
    max_context_tokens: int = 1000
    running: int = 0
    waiting: int = 0
    max_running: int = 4
    draining: bool = False
    script: Script = answer
    address: str = ""
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    cancelled: int = 0
    shown: list[pb.WatchedSequence] = field(default_factory=list)
    """What those who watch see; change it with `show`."""
    watching: int = 0
    watched: int = 0

    def __post_init__(self) -> None:
        self._server = grpc.aio.server()
        self._changed = asyncio.Event()
        add_DecodeWorkerServicer_to_server(self, self._server)

    async def start(self, port: int = 0) -> None:
        """Listen."""
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await self._server.start()

    async def stop(self) -> None:
        """Gone at once."""
        await self._server.stop(None)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:  # noqa: ARG002, N802
        """Load."""
        return self._description()

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchFrame]:  # noqa: ARG002, N802
        """What is shown, whenever it changes."""
        self.watching += 1
        self.watched += 1
        try:
            while True:
                yield pb.WatchFrame(worker=self._description(), sequences=self.shown)
                await self._changed.wait()
        finally:
            self.watching -= 1

    def show(self, *sequences: pb.WatchedSequence) -> None:
        """Those who watch get these."""
        self.shown = list(sequences)
        self._changed.set()
        self._changed = asyncio.Event()

    def _description(self) -> pb.DescribeReply:
        return pb.DescribeReply(
            worker_id=self.worker_id,
            model_name=self.model_name,
            model_fingerprint=self.model_fingerprint,
            max_context_tokens=self.max_context_tokens,
            running=self.running,
            waiting=self.waiting,
            max_running=self.max_running,
            draining=self.draining,
        )

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvent]:  # noqa: N802
        """By the script."""
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            async for event in self.script(request):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
