"""A stream of copies on a GPU: one thread issues them in order, another waits for their events in order.

So a copy is under way before the one ahead of it has ended, and what is done with its bytes on the host (a
checksum) holds up no other copy. Two lanes, one each way, use both directions of the link.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class CopyLane:
    """Law: a copy starts after everything that its caller's stream was given before it was asked for."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._issuing = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name} issue")
        self._waiting = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name} wait")

    def start(self, copy: Callable[[], None], finish: Callable[[], T]) -> Future[T]:
        """Launch `copy` on the lane's stream; done, with what `finish` gives, when its event has fired."""
        after = torch.cuda.Event()
        after.record(torch.cuda.current_stream(self._device))
        future: Future[T] = Future()
        self._issuing.submit(self._issue, copy, finish, after, future)
        return future

    def close(self) -> None:
        """Wait for what was started, then stop the threads."""
        self._issuing.shutdown(wait=True)
        self._waiting.shutdown(wait=True)

    def _issue(
        self, copy: Callable[[], None], finish: Callable[[], T], after: torch.cuda.Event, future: Future[T]
    ) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                self._stream.wait_event(after)
                copy()
                done = torch.cuda.Event(blocking=True)
                done.record(self._stream)
        except BaseException as error:
            future.set_exception(error)
            return
        self._waiting.submit(_finish, done, finish, future)


def _finish(done: torch.cuda.Event, finish: Callable[[], T], future: Future[T]) -> None:
    try:
        done.synchronize()
        future.set_result(finish())
    except BaseException as error:
        future.set_exception(error)
