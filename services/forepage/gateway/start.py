"""From a request body to a running generation: prompt ids, context check, worker, first event.

Everything a client can do wrong is found before a worker hears of it.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.trace import Span

from forepage.errors import ContextLengthError, DependencyError, RequestError
from forepage.gateway.generation import Generation
from forepage.gateway.residency_usage import residency_wish
from forepage.gateway.routing import rank_workers
from forepage.gateway.schemas import ChatBody, GenerationBody, TextBody
from forepage.gateway.worker_client import WorkerClient, WorkerStream
from forepage.gateway.worker_directory import WorkerDirectory
from forepage.rpc import worker_pb2 as pb
from forepage.settings import GatewaySettings
from forepage.telemetry import MetricName, Telemetry
from forepage.text.chat import encode_chat, message_from
from forepage.text.tokenizer import Tokenizer

MAX_WORKERS_TRIED = 2


@dataclass(frozen=True)
class Starter:
    """Starts generations; holds nothing of a request."""

    settings: GatewaySettings
    tokenizer: Tokenizer
    directory: WorkerDirectory
    telemetry: Telemetry

    async def prepare(self, body: GenerationBody) -> tuple[pb.GenerateRequest, list[WorkerClient]]:
        """The call to make and the workers that may take it, best first.

        Raises: RequestError and its children, DependencyError when no worker can be reached.
        """
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options")
        workers = self.directory.workers_for(body.model)
        limit = max(_context_of(worker) for worker in workers)
        prompt_ids = await asyncio.to_thread(_encode, body, self.tokenizer, limit)
        max_tokens = _answer_room(body, len(prompt_ids), limit, self.settings.default_max_tokens)
        needed = len(prompt_ids) + max_tokens
        by_id = {worker.load.worker_id: worker for worker in workers if _context_of(worker) >= needed}
        ranked = rank_workers(prompt_ids, body.cache_salt or "", [item.load for item in by_id.values()])
        request = _generate_request(body, prompt_ids, max_tokens, self.tokenizer.eos_id)
        return request, [by_id[item.worker_id] for item in ranked]

    async def start(
        self,
        request: pb.GenerateRequest,
        workers: Sequence[WorkerClient],
        *,
        stops: Sequence[str],
        span: Span,
    ) -> Generation:
        """Open the call, on the next worker if the first can't be reached, and wait until it is admitted."""
        for tried, worker in enumerate(workers[:MAX_WORKERS_TRIED], start=1):
            stream = worker.generate(request, timeout_s=self.settings.request_timeout_s, span=span)
            try:
                started = await self._started(stream)
            except DependencyError:
                if tried == min(len(workers), MAX_WORKERS_TRIED):
                    raise
                self.telemetry.count(MetricName.FALLBACKS, fallback="other_worker")
            else:
                return Generation(
                    stream,
                    started,
                    request_id=request.request_id,
                    tokenizer=self.tokenizer,
                    stops=stops,
                )
        raise DependencyError("no decode worker can be reached; try again", retry_after_s=2.0)

    async def _started(self, stream: WorkerStream) -> pb.Started:
        try:
            event = await stream.next_event()
            if event.WhichOneof("event") != "started":
                raise DependencyError(f"worker {stream.worker_id} did not say that it started")
        except BaseException:
            stream.close()
            raise
        return event.started


def _context_of(worker: WorkerClient) -> int:
    served = worker.served
    return served.max_context_tokens if served else 0


def _encode(body: GenerationBody, tokenizer: Tokenizer, limit: int) -> list[int]:
    """Prompt ids. Runs in a thread: a million tokens take seconds."""
    if isinstance(body, ChatBody):
        messages = [
            message_from(index, item.role, item.texts, item.reasoning_content)
            for index, item in enumerate(body.messages)
        ]
        _refuse_hopeless(sum(tokenizer.least_tokens(message.text) for message in messages), limit, body)
        return encode_chat(messages, tokenizer)
    assert isinstance(body, TextBody)
    if isinstance(body.prompt, str):
        _refuse_hopeless(tokenizer.least_tokens(body.prompt), limit, body)
        return tokenizer.encode_text(body.prompt)
    for index, token in enumerate(body.prompt):
        if token >= tokenizer.vocab_size:
            raise RequestError(
                f"token ids of this model are below {tokenizer.vocab_size}", f"prompt[{index}]"
            )
    return body.prompt


def _refuse_hopeless(least_tokens: int, limit: int, body: GenerationBody) -> None:
    """Before encoding: a text that can't fit isn't worth the time and memory."""
    if least_tokens >= limit:
        raise ContextLengthError(
            f"this model takes {limit} tokens in all; the prompt has more", body.prompt_field
        )


def _answer_room(body: GenerationBody, prompt_tokens: int, limit: int, default: int) -> int:
    """Tokens the answer may have. Raises: ContextLengthError when it does not fit behind the prompt."""
    wanted = body.wanted_tokens
    room = limit - prompt_tokens
    if room < (wanted or 1):
        raise ContextLengthError(
            f"this model takes {limit} tokens in all; the prompt has {prompt_tokens}"
            + (f" and {wanted} are wanted for the answer" if wanted else ""),
            body.prompt_field,
        )
    return wanted or min(default, room)


def _generate_request(
    body: GenerationBody, prompt_ids: Sequence[int], max_tokens: int, eos_id: int
) -> pb.GenerateRequest:
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
    sampling = pb.Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=() if body.ignore_eos else (eos_id,),
    )
    return pb.GenerateRequest(
        request_id=secrets.token_hex(16),
        prompt_token_ids=prompt_ids,
        sampling=sampling,
        residency=residency_wish(body.forepage),
        cache_salt=body.cache_salt or "",
        ignore_eos=bool(body.ignore_eos),
    )
