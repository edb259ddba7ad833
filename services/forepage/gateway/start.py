"""From a request body to running generations: prompt ids, context check, worker, first event.

Everything a client can do wrong is found before a worker hears of it.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.trace import Span

from forepage.errors import ContextLengthError, DependencyError, RequestError
from forepage.gateway.chat_schemas import ChatBody
from forepage.gateway.conversation import conversation_of, thinking_mode
from forepage.gateway.generation import Generation, Reading
from forepage.gateway.residency_usage import residency_wish
from forepage.gateway.resuming import Resumer, ResumingStream, started_of
from forepage.gateway.routing import rank_workers
from forepage.gateway.schemas import GenerationBody, TextBody
from forepage.gateway.tenancy import new_request_id, salt_of
from forepage.gateway.token_schemas import DetokenizeBody, Detokenized, TokenizeBody, Tokens
from forepage.gateway.worker_client import WorkerClient
from forepage.gateway.worker_directory import WorkerDirectory
from forepage.rpc import worker_pb2 as pb
from forepage.settings import GatewaySettings
from forepage.telemetry import MetricName, Telemetry
from forepage.text.chat import chat_parts, encode_parts, missing_token
from forepage.text.control_tokens import ControlToken
from forepage.text.dsml import Part, to_json
from forepage.text.messages import ThinkingMode
from forepage.text.tokenizer import Tokenizer
from forepage.text.wording import Wording

MAX_WORKERS_TRIED = 2
SMALLEST_F32 = 2.0**-126
"""On the wire `top_p` has 32 bits; a smaller one would become 0, which is off."""


@dataclass(frozen=True)
class Starter:
    """Starts generations; holds nothing of a request."""

    settings: GatewaySettings
    tokenizer: Tokenizer
    wording: Wording
    directory: WorkerDirectory
    telemetry: Telemetry

    async def prepare(
        self, body: GenerationBody, *, tenant: str | None
    ) -> tuple[list[pb.GenerateRequest], list[WorkerClient]]:
        """The calls to make, one a choice, and the workers that may take them, best first.

        `tenant`: whose API key the request came with; None where no keys are asked for.
        Raises: RequestError and its children, DependencyError when no worker can be reached.
        """
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options")
        self._check_tokens(body.stop_token_ids or (), "stop_token_ids")
        workers = self.directory.workers_for(body.model)
        limit = max(_context_of(worker) for worker in workers)
        prompt_ids = await asyncio.to_thread(self._encode, body, limit)
        max_tokens = _answer_room(body, len(prompt_ids), limit, self.settings.default_max_tokens)
        needed = len(prompt_ids) + max_tokens
        by_id = {worker.load.worker_id: worker for worker in workers if _context_of(worker) >= needed}
        salt = salt_of(tenant, body.cache_salt or "")
        ranked = rank_workers(prompt_ids, salt, [item.load for item in by_id.values()])
        seed = secrets.randbits(63) if body.seed is None else body.seed
        requests = [
            _generate_request(
                body,
                prompt_ids,
                max_tokens,
                self.tokenizer,
                request_id=new_request_id(tenant),
                seed=(seed + index) % 2**64,
                salt=salt,
            )
            for index in range(body.num_choices)
        ]
        return requests, [by_id[item.worker_id] for item in ranked]

    async def start(
        self,
        request: pb.GenerateRequest,
        workers: Sequence[WorkerClient],
        *,
        reading: Reading,
        span: Span,
        deadline_s: float,
    ) -> Generation:
        """Open the call, on the next worker if the first can't be reached, and wait until it is admitted.

        `deadline_s` is on the monotonic clock; the worker frees what the request holds when it passes.
        """
        for tried, worker in enumerate(workers[:MAX_WORKERS_TRIED], start=1):
            left_s = max(0.0, deadline_s - time.monotonic())
            try:
                stream = worker.generate(request, timeout_s=left_s, span=span)
                started = await started_of(stream)
            except DependencyError:
                if tried == min(len(workers), MAX_WORKERS_TRIED):
                    raise
                self.telemetry.count(MetricName.FALLBACKS, fallback="other_worker")
            else:
                resumer = Resumer(
                    self.directory,
                    self.telemetry,
                    stream.served.model_name,
                    span,
                    deadline_s,
                    self.settings.resume_wait_s,
                    self.settings.max_resumes,
                )
                return Generation(
                    ResumingStream(stream, started, request, resumer),
                    started,
                    request_id=request.request_id,
                    tokenizer=self.tokenizer,
                    reading=reading,
                )
        raise DependencyError("no decode worker can be reached; try again", retry_after_s=2.0)

    def life_s(self, body: GenerationBody) -> float:
        """The longest this request may take: as it asks, never over the server's bound."""
        most = self.settings.request_timeout_s
        return most if body.timeout_s is None else min(most, body.timeout_s)

    async def tokenize(self, body: TokenizeBody) -> Tokens:
        """Ids of a text, which may be longer than the context. Raises: as `prepare`."""
        limit = max(_context_of(worker) for worker in self.directory.workers_for(body.model))
        ids = await asyncio.to_thread(self.tokenizer.encode_text, body.prompt)
        return Tokens(tokens=ids, count=len(ids), max_model_len=limit)

    async def detokenize(self, body: DetokenizeBody) -> Detokenized:
        """The text of ids. Raises: as `prepare`."""
        self.directory.workers_for(body.model)
        self._check_tokens(body.tokens, "tokens")
        text = await asyncio.to_thread(self.tokenizer.decode_bytes, body.tokens)
        return Detokenized(prompt=text.decode(errors="replace"))

    def _encode(self, body: GenerationBody, limit: int) -> list[int]:
        """Prompt ids. Runs in a thread: a million tokens take seconds."""
        if isinstance(body, ChatBody):
            parts = self.layout(body)
            texts = (part for part in parts if not isinstance(part, ControlToken))
            _refuse_hopeless(sum(map(self.tokenizer.least_tokens, texts)), limit, body)
            return encode_parts(parts, self.tokenizer)
        assert isinstance(body, TextBody)
        if isinstance(body.prompt, str):
            _refuse_hopeless(self.tokenizer.least_tokens(body.prompt), limit, body)
            return self.tokenizer.encode_text(body.prompt)
        self._check_tokens(body.prompt, "prompt")
        return body.prompt

    def _check_tokens(self, tokens: Sequence[int], field: str) -> None:
        for index, token in enumerate(tokens):
            if token >= self.tokenizer.vocab_size:
                raise RequestError(
                    f"token ids of this model are below {self.tokenizer.vocab_size}", f"{field}[{index}]"
                )

    def layout(self, body: ChatBody) -> list[Part]:
        """Texts and control tokens of the prompt. Raises: RequestError naming a field that gives none."""
        conversation = conversation_of(body)
        parts = chat_parts(conversation, self.wording)
        field = missing_token(conversation, self.tokenizer)
        if field is not None:
            raise RequestError("this model's tokenizer has no control token for it", field)
        return parts


def _context_of(worker: WorkerClient) -> int:
    served = worker.served
    return served.max_context_tokens if served else 0


def _constrain(sampling: pb.Sampling, body: ChatBody, tokenizer: Tokenizer) -> None:
    """What the answer must be, behind the reasoning if there is any: JSON, calls, or either."""
    tools, schema = body.forced_tools, body.answer_schema
    must_call = tools and body.tool_choice not in (None, "auto")
    if schema is not None and not must_call:
        sampling.json_schema = to_json(schema)
    for tool in tools:
        parameters = tool.function.parameters
        sampling.forced_tools.add(
            name=tool.function.name, parameters="" if parameters is None else to_json(parameters)
        )
    if tools:
        sampling.max_calls = body.max_calls or 0
    if (tools or schema is not None) and _answer_mode(body) is ThinkingMode.THINKING:
        sampling.free_until_token_id = tokenizer.token_id(ControlToken.END_THINK)


def reading_of(body: GenerationBody) -> Reading:
    """How the answers to this body are read."""
    chat = body if isinstance(body, ChatBody) else None
    return Reading(
        stops=body.stops,
        stop_tokens=body.stop_token_ids or (),
        mode=ThinkingMode.CHAT if chat is None else _answer_mode(chat),
        with_tools=chat is not None and bool(chat.offered_tools),
        max_calls=chat.max_calls if chat and not chat.forced_tools else None,  # forced ones the worker counts
        num_top_logprobs=body.num_top_logprobs,
    )


def _answer_mode(body: ChatBody) -> ThinkingMode:
    """Whether the answer begins with reasoning; that to a task holds none."""
    return ThinkingMode.CHAT if body.messages[-1].task is not None else thinking_mode(body)


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
    body: GenerationBody,
    prompt_ids: Sequence[int],
    max_tokens: int,
    tokenizer: Tokenizer,
    *,
    request_id: str,
    seed: int,
    salt: str,
) -> pb.GenerateRequest:
    sampling = pb.Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else max(SMALLEST_F32, body.top_p),
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=[*(body.stop_token_ids or ()), *(() if body.ignore_eos else (tokenizer.eos_id,))],
        logprobs=body.num_top_logprobs is not None,
        num_logprobs=body.num_top_logprobs or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 0.0,
    )
    if isinstance(body, ChatBody):
        _constrain(sampling, body, tokenizer)
    return pb.GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt_ids,
        sampling=sampling,
        residency=residency_wish(body.forepage),
        cache_salt=salt,
        ignore_eos=bool(body.ignore_eos),
        priority=body.priority or 0,
    )
