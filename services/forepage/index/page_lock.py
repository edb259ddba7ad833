"""Page-locks mapped host memory, so that kernels on a GPU read it over PCIe."""

import weakref

import torch
from torch import Tensor

from forepage.errors import DependencyError

CHUNK_BYTES = 64 << 30
"""One registration of hundreds of GiB fails or stalls the host for minutes (reports of other servers)."""


def page_lock(owner: object, memory: Tensor, device: torch.device) -> None:
    """Register `memory` (u8, host) with CUDA until `owner`, who keeps it mapped, is gone.

    Raises: DependencyError when the driver refuses; what was registered by then is given back.
    """
    with torch.cuda.device(device):
        for start in range(0, memory.numel(), CHUNK_BYTES):
            address = memory.data_ptr() + start
            size = min(CHUNK_BYTES, memory.numel() - start)
            status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            if status != 0:
                raise DependencyError(
                    f"CUDA can't page-lock {size} bytes of the arena (error {status}): is memlock unlimited, "
                    "and FOREPAGE_COLDPOOL__SHM_DIR a folder in memory?"
                )
            weakref.finalize(owner, _unlock, address, device)


def _unlock(address: int, device: torch.device) -> None:
    """Runs before the owner lets go of its mapping, behind any kernel that still reads it."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)
