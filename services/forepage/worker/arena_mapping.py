"""The arena's payload area as a tensor, registered with the GPU so that copies and kernels read it."""

import torch
from torch import Tensor

from forepage.coldpool.arena import ArenaView
from forepage.errors import DependencyError

CHUNK_BYTES = 64 << 30
"""One registration of 512 GiB fails and a 700 GB one stalls every process for minutes (peers' reports)."""


def arena_tensor(view: ArenaView, device: torch.device) -> Tensor:
    """u8 [payload area bytes] over the mapping; on CUDA it is page-locked for `device`.

    Raises: DependencyError when the driver refuses the registration.
    """
    arena = torch.frombuffer(view.buffer, dtype=torch.uint8)
    if device.type == "cuda":
        _register(arena, device)
    return arena


def unregister(arena: Tensor, device: torch.device) -> None:
    """Undo the registration; before the mapping goes away."""
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    runtime = torch.cuda.cudart()
    for start in range(0, arena.numel(), CHUNK_BYTES):
        runtime.cudaHostUnregister(arena.data_ptr() + start)


def _register(arena: Tensor, device: torch.device) -> None:
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        for start in range(0, arena.numel(), CHUNK_BYTES):
            size = min(CHUNK_BYTES, arena.numel() - start)
            status = runtime.cudaHostRegister(arena.data_ptr() + start, size, 0)
            if int(status) != 0:
                raise DependencyError(
                    f"cudaHostRegister of {size} arena bytes failed ({status}); is memlock unlimited?"
                )
