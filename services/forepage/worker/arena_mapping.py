"""The arena's payload area as a tensor, page-locked for the GPU so that copies and kernels read it.

Page-locking takes about 0.6 s a GiB of fresh memory, so it runs on a thread of its own while the model loads,
piece by piece; the worker is not ready before it is done. Nobody but the loop reads the arena from the GPU.
"""

import threading
from collections.abc import Callable

import structlog
import torch
from torch import Tensor

from forepage.coldpool.arena import ArenaView
from forepage.errors import DependencyError

MAX_CHUNK_BYTES = 8 << 30
"""One registration of 512 GiB fails, and a 700 GB one stalls every process for minutes (peers' reports)."""
POLL_S = 0.2
_log = structlog.get_logger("forepage.worker.arena")


class PinnedArena:
    """Owner of the registrations; from the start on `tensor` is u8 [payload area bytes] over the mapping."""

    def __init__(self, view: ArenaView, device: torch.device) -> None:
        """Start page-locking for `device`; on a CPU nothing is to be done."""
        self.tensor: Tensor = torch.frombuffer(view.buffer, dtype=torch.uint8)
        self.pinned_bytes = 0
        self._device = device
        self._chunk_bytes = chunk_bytes(view.slot_bytes)
        self._closing = False
        self._error: DependencyError | None = None
        self._thread = threading.Thread(target=self._pin, name="pin arena", daemon=True)
        if device.type == "cuda":
            self._thread.start()
        else:
            self.pinned_bytes = self.num_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes to be page-locked."""
        return self.tensor.numel()

    @property
    def is_ready(self) -> bool:
        """Whether the GPU may read all of it."""
        return self.pinned_bytes == self.num_bytes

    def wait(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Until it is ready, or nobody needs it any more. Raises: DependencyError when the driver refuses."""
        while self._thread.is_alive() and not is_stopping():
            self._thread.join(POLL_S)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Undo the registrations; before the mapping goes away."""
        if self._device.type != "cuda":
            return
        self._closing = True
        self._thread.join()
        torch.cuda.synchronize(self._device)
        runtime = torch.cuda.cudart()
        for start in range(0, self.pinned_bytes, self._chunk_bytes):
            runtime.cudaHostUnregister(self.tensor.data_ptr() + start)
        self.pinned_bytes = 0

    def _pin(self) -> None:
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            while not self.is_ready and not self._closing:
                size = min(self._chunk_bytes, self.num_bytes - self.pinned_bytes)
                status = runtime.cudaHostRegister(self.tensor.data_ptr() + self.pinned_bytes, size, 0)
                if int(status) != 0:
                    self._error = DependencyError(
                        f"cudaHostRegister of {size} arena bytes failed ({status}); is memlock unlimited?"
                    )
                    return
                self.pinned_bytes += size
                _log.info("arena page-locked", bytes=self.pinned_bytes, of_bytes=self.num_bytes)


def chunk_bytes(slot_bytes: int) -> int:
    """Bytes of one registration: whole slots, since a copy must not cross from one to the next."""
    return max(1, MAX_CHUNK_BYTES // slot_bytes) * slot_bytes
