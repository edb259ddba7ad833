"""Page-locks mapped host memory, so that kernels on a GPU read it over PCIe.

Registering takes about 0.6 s a GiB and giving back is no quicker, so both happen piece by piece on a thread
of the lock's own: nobody waits for them on an event loop, and a stop waits for one piece.
"""

import threading
import weakref

import torch
from torch import Tensor

from forepage.errors import DependencyError

CHUNK_BYTES = 8 << 30
"""One registration of hundreds of GiB fails or stalls the host for minutes (reports of other servers)."""
RETRY_S = 5.0
"""After a refusal of the driver."""
GIB = 1 << 30


class PageLock:
    """Registers `memory` (u8, host) with CUDA until `owner`, who hands it out, is gone."""

    def __init__(self, owner: object, memory: Tensor, device: torch.device) -> None:
        """Begins at once; `check` says how far it is."""
        self._memory = memory  # keeps it mapped until it is given back
        self._device = device
        self._locked_bytes = 0
        self._refusal = ""
        self._let_go = threading.Event()
        weakref.finalize(owner, self._let_go.set).atexit = False  # a process that ends gives all back
        self._thread = threading.Thread(target=self._run, name="page-lock arena", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises: DependencyError while the GPU can't read all of it: how far it is, or why it is refused."""
        if self._refusal:
            raise DependencyError(self._refusal, retry_after_s=RETRY_S)
        if self._locked_bytes < self._memory.numel():
            raise DependencyError(
                f"the arena is being page-locked for the GPU, {self._locked_bytes / GIB:.0f} of "
                f"{self._memory.numel() / GIB:.0f} GiB so far: ask again",
                retry_after_s=1.0,
            )

    def wait_end(self, timeout_s: float) -> bool:
        """Whether, once the owner is gone, everything was given back within that time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._let_go.is_set() and not self._try_lock():
            self._unlock()
            self._let_go.wait(RETRY_S)
        self._let_go.wait()
        self._unlock()

    def _try_lock(self) -> bool:
        """False when the driver refuses. Stops between two pieces once nobody wants it any more."""
        try:
            with torch.cuda.device(self._device):
                while self._locked_bytes < self._memory.numel() and not self._let_go.is_set():
                    if not self._try_lock_piece():
                        return False
        except RuntimeError as error:
            self._refusal = f"CUDA can't page-lock the arena: {error}"
            return False
        self._refusal = ""
        return True

    def _try_lock_piece(self) -> bool:
        size = min(CHUNK_BYTES, self._memory.numel() - self._locked_bytes)
        address = self._memory.data_ptr() + self._locked_bytes
        status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if status != 0:
            self._refusal = (
                f"CUDA can't page-lock {size} bytes of the arena (error {status}): is memlock unlimited, "
                "and FOREPAGE_COLDPOOL__SHM_DIR a folder in memory?"
            )
            return False
        self._locked_bytes += size
        return True

    def _unlock(self) -> None:
        """Give back what is registered, behind any kernel that still reads it."""
        if self._locked_bytes == 0:
            return
        num_bytes, self._locked_bytes = self._locked_bytes, 0
        with torch.cuda.device(self._device):
            torch.cuda.synchronize(self._device)
            for start in range(0, num_bytes, CHUNK_BYTES):
                torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr() + start)
