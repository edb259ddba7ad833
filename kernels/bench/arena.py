"""A registered arena as the worker has it: shared memory, page-locked for the GPU, filled with noise."""

import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

SHM = Path("/dev/shm")
_PATTERN_BYTES = 64 << 20


@contextmanager
def registered_arena(num_bytes: int) -> Iterator[Tensor]:
    """u8 [num_bytes] over a file in shared memory, readable by kernels; gone at the end."""
    with tempfile.TemporaryFile(dir=SHM) as file:
        file.truncate(num_bytes)
        with mmap.mmap(file.fileno(), num_bytes) as view:
            arena = torch.frombuffer(view, dtype=torch.uint8)
            _fill(arena)
            runtime = torch.cuda.cudart()
            status = runtime.cudaHostRegister(arena.data_ptr(), num_bytes, 0)
            if int(status) != 0:
                raise RuntimeError(f"cudaHostRegister of {num_bytes} bytes failed: {status}")
            try:
                yield arena
            finally:
                torch.cuda.synchronize()
                runtime.cudaHostUnregister(arena.data_ptr())
                del arena


def _fill(arena: Tensor) -> None:
    """Bytes that are valid rows and keys: e4m3 values without NaN, whatever they are read as."""
    pattern = torch.randint(0, 120, (_PATTERN_BYTES,), dtype=torch.uint8)
    for start in range(0, arena.numel(), _PATTERN_BYTES):
        part = arena[start : start + _PATTERN_BYTES]
        part.copy_(pattern[: part.numel()])
