"""A gateway over a fake worker in a thread of their own, for tests that ask without an event loop."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import httpx

from forepage.gateway.app import run
from forepage.settings import GatewaySettings, Settings
from rigs.fake_worker import FakeWorker
from rigs.gateways import DEADLINE_S
from rigs.stack import wait_until


@contextmanager
def gateway_thread(make_worker: Callable[[], FakeWorker], **fields: Any) -> Iterator[str]:
    """Its URL, once it is ready; `fields` are of GatewaySettings. A worker belongs to its loop."""
    served: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        worker = make_worker()
        await worker.start()
        settings = GatewaySettings(port=0, worker_addresses=(worker.address,), worker_poll_s=0.05, **fields)
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def listening(port: int) -> None:
            served.set_result((f"http://127.0.0.1:{port}", loop, stop))

        await run(Settings(gateway=settings), stop, listening=listening)
        await worker.stop()

    def target() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not served.done():
                served.set_exception(error)
            raise

    thread = threading.Thread(target=target)
    thread.start()
    try:
        url, loop, stop = served.result(DEADLINE_S)
        wait_until(lambda: _is_ready(url), timeout_s=DEADLINE_S, what="the gateway is ready")
        yield url
    finally:
        if served.done() and not served.exception():
            loop.call_soon_threadsafe(stop.set)
        thread.join()


def _is_ready(url: str) -> bool:
    return httpx.get(f"{url}/health/ready").status_code == 200
