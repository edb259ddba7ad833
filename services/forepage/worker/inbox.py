"""Messages of other threads to the loop. Each is run, or once nobody will, what was left for that case is."""

import queue
import threading
from collections.abc import Callable

Message = Callable[[], None]


class Inbox:
    """`put` and `close` by any thread, `take` and `wait` by the loop's."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Message, Message | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return self._queue.empty()

    def put(self, message: Message, *, unheard: Message | None = None) -> None:
        """Leave a message. If it is never taken `unheard` runs instead, here or in `close`."""
        with self._lock:
            if not self._is_closed:
                self._queue.put((message, unheard))
                return
        if unheard is not None:
            unheard()

    def take(self) -> Message | None:
        """The oldest message; None if there is none."""
        return None if self.is_empty else self._queue.get()[0]

    def wait(self, timeout_s: float) -> Message | None:
        """The oldest message; None if none comes in time."""
        try:
            return self._queue.get(timeout=timeout_s)[0]
        except queue.Empty:
            return None

    def close(self) -> None:
        """Take nothing more; whoever sent what still waits is told."""
        with self._lock:
            self._is_closed = True
        while True:
            try:
                _, unheard = self._queue.get_nowait()
            except queue.Empty:
                return
            if unheard is not None:
                unheard()
