"""The gateway process: the app over its parts, and serving it until told to stop.

Stopping: ready says 503 and generations are refused, running ones get `drain_timeout_s`, what is left
ends with a typed error, then the listener closes.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from forepage.errors import DependencyError, ForepageError, RequestError
from forepage.exposure import warn_if_open
from forepage.from_zero import begin_at_zero
from forepage.gateway.admission import Admission
from forepage.gateway.admitted_body import AdmittedBodyMiddleware
from forepage.gateway.api_keys import OPEN_PATHS, KeyMiddleware, read_keys
from forepage.gateway.connection import Connection
from forepage.gateway.cors import CorsMiddleware
from forepage.gateway.dashboard import FILES, PASSAGES_PATH, make_dashboard
from forepage.gateway.http_errors import MethodError, RouteError, error_of_validation, error_response
from forepage.gateway.redis_workers import RedisWorkers
from forepage.gateway.request_scope import REQUEST_ID_HEADER, RequestScopeMiddleware, request_scope
from forepage.gateway.residency_feed import ResidencyFeed
from forepage.gateway.routes import OPERATIONS, TOKENIZER_PATHS, make_router
from forepage.gateway.start import Starter
from forepage.gateway.worker_directory import FixedWorkers, WorkerDirectory, WorkerSource
from forepage.logs import open_logs
from forepage.redis_client import open_redis
from forepage.release import release_version
from forepage.rpc.tls import MutualTls, check_pair
from forepage.settings import GatewaySettings, Settings
from forepage.settings_environment import SettingsError
from forepage.span_log import span_log_processors
from forepage.telemetry import Telemetry, open_telemetry
from forepage.text.tokenizer import Tokenizer
from forepage.text.wording import Wording

CUT_TIMEOUT_S = 5
"""How long answers may take to leave once they were ended."""


def create_app(
    settings: GatewaySettings,
    *,
    tokenizer: Tokenizer,
    wording: Wording,
    directory: WorkerDirectory,
    admission: Admission,
    telemetry: Telemetry,
) -> FastAPI:
    """The ASGI app; the caller owns and closes the parts. Raises: SettingsError for a file of API keys."""
    app = FastAPI(title="forepage", version=release_version(), docs_url=None, redoc_url=None)
    starter = Starter(settings, tokenizer, wording, directory, telemetry)
    app.include_router(make_router(starter, admission))
    open_paths = OPEN_PATHS
    if settings.dashboard:
        open_paths |= FILES.keys()  # what the page shows needs a key, the page itself asks for it
        feed = ResidencyFeed(directory, is_closed=lambda: admission.draining)
        app.include_router(make_dashboard(feed, starter))
    app.add_middleware(
        AdmittedBodyMiddleware,
        admission=admission,
        max_body_bytes=settings.max_body_bytes,
        operations=OPERATIONS,
        other_paths=TOKENIZER_PATHS | {PASSAGES_PATH},
        telemetry=telemetry,
    )
    if settings.api_keys is not None:
        app.add_middleware(KeyMiddleware, keys=read_keys(settings.api_keys), open_paths=open_paths)
    app.add_middleware(RequestScopeMiddleware, telemetry=telemetry)
    if settings.cors_origins:  # the last added is the outermost: a page may read errors, too
        app.add_middleware(
            CorsMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", REQUEST_ID_HEADER],
            expose_headers=[REQUEST_ID_HEADER, "retry-after"],
        )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unrouted)
    return app


async def run(
    settings: Settings, stop: asyncio.Event, *, listening: Callable[[int], None] | None = None
) -> None:
    """Serve until `stop` is set, then drain. `listening` gets the port once it accepts.

    Raises: DependencyError when the address can't be bound, ModelFormatError for foreign texts,
    SettingsError when nothing says where workers are.
    """
    log = open_logs("gateway", settings.telemetry)
    logging.getLogger("sse_starlette").setLevel(logging.INFO)  # at DEBUG it logs every piece of every answer
    ours = settings.gateway
    if ours.tls_cert is not None and ours.tls_key is not None:
        check_pair(
            ours.tls_cert, ours.tls_key, names=("FOREPAGE_GATEWAY__TLS_CERT", "FOREPAGE_GATEWAY__TLS_KEY")
        )
    tokenizer, wording = Tokenizer.load(settings.model.path), Wording.load(settings.model.path)
    async with AsyncExitStack() as stack:
        telemetry = open_telemetry(
            "gateway",
            instance_id=f"{socket.gethostname()}-{os.getpid()}",
            prometheus=True,
            span_processors=span_log_processors("gateway", settings.telemetry),
        )
        stack.callback(telemetry.close)
        begin_at_zero(telemetry, "gateway")
        peers = MutualTls.read(settings.tls)
        directory = WorkerDirectory(_worker_source(settings, telemetry), telemetry, peers)
        stack.push_async_callback(directory.close)
        admission = Admission(ours.max_concurrent_requests)
        app = create_app(
            ours,
            tokenizer=tokenizer,
            wording=wording,
            directory=directory,
            admission=admission,
            telemetry=telemetry,
        )
        listener = stack.enter_context(_listen(ours.host, ours.port))
        port: int = listener.getsockname()[1]
        server = _Server(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                ssl_certfile=ours.tls_cert,
                ssl_keyfile=ours.tls_key,
                timeout_graceful_shutdown=CUT_TIMEOUT_S,
            )
        )
        async with asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(directory.run(ours.worker_poll_s))
            serving = tasks.create_task(server.serve(sockets=[listener]))
            log.info("listening", host=ours.host, port=port)
            warn_if_open(ours.host, lacks=_lacks(ours))
            if listening is not None:
                listening(port)
            await stop.wait()
            log.info("draining", running=admission.running)
            await _drain(admission, directory, ours.drain_timeout_s)
            server.should_exit = True
            await serving
            polling.cancel()
        log.info("stopped")


def _lacks(ours: GatewaySettings) -> str | None:
    """Settings that guard an address which others reach, and are not set."""
    missing = {
        "FOREPAGE_GATEWAY__API_KEYS": ours.api_keys is None,
        "FOREPAGE_GATEWAY__TLS_CERT": ours.tls_cert is None,
    }
    return ", ".join(name for name, is_missing in missing.items() if is_missing) or None


async def _drain(admission: Admission, directory: WorkerDirectory, timeout_s: float) -> None:
    admission.close()
    if not await admission.wait_idle(timeout_s):
        directory.cut_streams(DependencyError("this gateway is shutting down; try again", retry_after_s=1.0))
        await admission.wait_idle(CUT_TIMEOUT_S)


def _worker_source(settings: Settings, telemetry: Telemetry) -> WorkerSource:
    if settings.gateway.worker_addresses:
        return FixedWorkers(settings.gateway.worker_addresses)
    if settings.redis_url is None:
        raise SettingsError("the gateway needs FOREPAGE_GATEWAY__WORKER_ADDRESSES or FOREPAGE_REDIS_URL")
    client = open_redis(settings.redis_url.get_secret_value(), settings.tls)
    return RedisWorkers(client, settings.instance, telemetry)


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise DependencyError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    with listener:
        yield listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: stopping is our caller's business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


async def _invalid(request: Request, found: Exception) -> Response:
    assert isinstance(found, RequestValidationError)
    return _refused(request, error_of_validation(found.errors(), found.body))


async def _unrouted(request: Request, found: Exception) -> Response:
    assert isinstance(found, HTTPException)
    error: ForepageError
    if found.status_code == 404:
        error = RouteError(f"there is no {request.url.path}")
    elif found.status_code == 405:
        error = MethodError(f"{request.method} is not allowed here")
    else:
        error = RequestError("the body could not be read as JSON")
    return _refused(request, error, found.headers)


def _refused(request: Request, error: ForepageError, headers: Mapping[str, str] | None = None) -> Response:
    scope = request_scope(request.scope)
    scope.error = error
    return error_response(error, scope.request_id, headers)
