"""The endpoints: bodies in, answers out; what happens between is in `start` and `answering`."""

import time
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse
from opentelemetry.trace import Span, SpanKind
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder

from forepage.errors import RequestError, UnknownModelError
from forepage.gateway.admission import Admission
from forepage.gateway.answering import AnswerStream, all_or_first_error, usage_of, while_connected
from forepage.gateway.chat_schemas import ChatBody
from forepage.gateway.generation import Generation
from forepage.gateway.http_errors import RouteError
from forepage.gateway.openapi import KEYED, TOKENIZER_ERRORS, errors, every, generated
from forepage.gateway.replies import ChatCompletion, Completion, ModelCard, ModelList
from forepage.gateway.request_scope import RequestScope, request_scope
from forepage.gateway.schemas import GenerationBody, TextBody
from forepage.gateway.shapes import AnswerShape, ChatShape, TextShape
from forepage.gateway.start import Starter, reading_of
from forepage.gateway.token_schemas import DetokenizeBody, Detokenized, TokenizeBody, Tokens
from forepage.release import release_version
from forepage.rpc import worker_pb2 as pb
from forepage.telemetry import SpanName, fail_span

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
OPERATIONS = {CHAT_PATH: "chat", TEXT_PATH: "text_completion"}
"""Paths that generate, by the operation names of the GenAI conventions."""
TOKENIZE_PATH, DETOKENIZE_PATH = "/tokenize", "/detokenize"
TOKENIZER_PATHS = frozenset({TOKENIZE_PATH, DETOKENIZE_PATH})

REFUSED = {
    "/v1/responses": "the Responses API is not served here: use /v1/chat/completions",
    "/v1/embeddings": "no model here makes embeddings: ask a server of an embedding model",
}
"""What OpenAI's clients may ask and nobody answers, with what to do."""
_NOT_READY = {"model": dict[str, str], "description": "draining, or no worker"}
_TEXT = {"schema": {"type": "string"}}
_METRICS = {"content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT}}


def make_router(starter: Starter, admission: Admission) -> APIRouter:
    """Every route, over one starter and its admission."""
    router = APIRouter(responses=every())
    started = int(time.time())

    @router.post(CHAT_PATH, response_model=None, responses=generated(ChatCompletion), dependencies=KEYED)
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        return await _answer(starter, request, body, ChatShape)

    @router.post(TEXT_PATH, response_model=None, responses=generated(Completion), dependencies=KEYED)
    async def completions(request: Request, body: TextBody) -> Response:
        """Continue a text or token ids."""
        return await _answer(starter, request, body, TextShape)

    async def refuse(request: Request) -> Response:
        """Not there; says what is."""
        raise RouteError(REFUSED[request.url.path])

    for path in REFUSED:
        router.add_api_route(path, refuse, methods=["POST"], include_in_schema=False)

    @router.post(TOKENIZE_PATH, responses=errors(*TOKENIZER_ERRORS), dependencies=KEYED)
    async def tokenize(body: TokenizeBody) -> Tokens:
        """Token ids of a text."""
        return await starter.tokenize(body)

    @router.post(DETOKENIZE_PATH, responses=errors(*TOKENIZER_ERRORS), dependencies=KEYED)
    async def detokenize(body: DetokenizeBody) -> Detokenized:
        """The text of token ids."""
        return await starter.detokenize(body)

    def cards() -> list[ModelCard]:
        return [
            ModelCard(id=item.model_name, created=started, max_model_len=item.max_context_tokens)
            for item in starter.directory.models()
        ]

    @router.get("/v1/models", responses=errors(401), dependencies=KEYED)
    async def models() -> ModelList:
        """The models that some worker serves."""
        return ModelList(data=cards())

    @router.get("/v1/models/{model:path}", responses=errors(401, 404), dependencies=KEYED)
    async def model_card(model: Annotated[str, Path(description="its name, slashes and all")]) -> ModelCard:
        """One of them."""
        found = [card for card in cards() if card.id == model]
        if not found:
            raise UnknownModelError("no worker serves this model: /v1/models lists those there are", "model")
        return found[0]

    @router.get("/health/live")
    async def live() -> dict[str, str]:
        """This process answers."""
        return {"status": "live"}

    @router.get("/health", include_in_schema=False)
    async def health() -> dict[str, str]:
        """This process answers, by the name that load generators probe."""
        return {"status": "live"}

    @router.get("/ping")
    async def ping() -> dict[str, str]:
        """This process answers, by the name that hosting platforms probe."""
        return {"status": "live"}

    @router.get("/load", responses=errors(401), dependencies=KEYED)
    async def load() -> dict[str, int]:
        """Generations that this gateway runs now, and the most that it takes."""
        return {"running": admission.running, "max_running": admission.max_running}

    @router.get("/health/ready", response_model=dict[str, str], responses={503: _NOT_READY})
    async def ready() -> Response:
        """Whether requests are taken: a worker can be reached, and we are not draining."""
        if admission.draining:
            return JSONResponse({"status": "draining"}, 503)
        if not starter.directory.ready:
            return JSONResponse({"status": "no_worker"}, 503)
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", response_class=Response, responses={200: _METRICS})
    async def metrics(request: Request) -> Response:
        """Prometheus text; OpenMetrics, with exemplars, for those who accept it."""
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(REGISTRY), media_type=media_type)

    @router.get("/version")
    async def show_version() -> dict[str, str]:
        """The version of forepage."""
        return {"version": release_version()}

    return router


async def _answer(
    starter: Starter, request: Request, body: GenerationBody, shape_of: type[AnswerShape]
) -> Response:
    scope = request_scope(request.scope)
    generations = await while_connected(request, _start(starter, body, scope))
    shape = shape_of(
        request_id=generations[0].request_id,
        created=int(time.time()),
        model=body.model,
        fingerprint=generations[0].served.model_fingerprint,
    )
    if body.stream:
        options = body.stream_options
        return AnswerStream(
            generations, shape, scope, with_usage=options is not None and bool(options.include_usage)
        )
    choices = await while_connected(request, all_or_first_error([item.choice() for item in generations]))
    return JSONResponse(shape.whole(choices, usage_of(generations)).model_dump())


async def _start(starter: Starter, body: GenerationBody, scope: RequestScope) -> list[Generation]:
    """Start a generation for each choice, and bind their ends to the request's."""
    requests, workers = await starter.prepare(body, tenant=scope.tenant)
    scope.model = body.model
    reading = reading_of(body)
    deadline_s = scope.started_s + starter.life_s(body)

    async def start(request: pb.GenerateRequest) -> Generation:
        span = starter.telemetry.start_span(
            SpanName.GATEWAY_GENERATE,
            scope.span,
            kind=SpanKind.CLIENT,
            operation=scope.operation or "",
            request_model=body.model,
            request_id=scope.request_id,
        )
        scope.stack.callback(_end_span, span, scope)
        generation = await starter.start(request, workers, reading=reading, span=span, deadline_s=deadline_s)
        scope.stack.callback(
            generation.close,
            starter.telemetry,
            span,
            operation=scope.operation or "",
            arrived_s=scope.started_s,
        )
        return generation

    try:
        return await all_or_first_error([start(request) for request in requests])
    except RequestError as error:
        if error.param == "prompt_token_ids":  # the worker's name of what the client calls otherwise
            error.param = body.prompt_field
        raise


def _end_span(span: Span, scope: RequestScope) -> None:
    if scope.error is not None:
        fail_span(span, scope.error)
    span.end()
