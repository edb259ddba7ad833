"""gather_blocks by the device's copy engines: one batched call, no kernel and no SM.

Needs the ids on the host, and a stream of the caller's own (a batch is refused on the legacy default
stream and can't be captured in a graph). Without `cudaMemcpyBatchAsync` there is one copy a block.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


class CopyError(RuntimeError):
    """The CUDA runtime refused a batch of copies."""


def gather_blocks(pool: Tensor, arena: Tensor, *, block_ids: Tensor, arena_offsets: Tensor) -> None:
    """See the package; CUDA pool, ids and offsets on the CPU. An id or offset out of range raises."""
    block_bytes, num_blocks = pool.shape[1], pool.shape[0]
    wanted = [(b, o) for b, o in zip(block_ids.tolist(), arena_offsets.tolist(), strict=True) if b >= 0]
    for block_id, offset in wanted:
        if block_id >= num_blocks or not 0 <= offset <= arena.shape[0] - block_bytes:
            raise IndexError(f"block {block_id} of {num_blocks}, arena offset {offset} of {arena.shape[0]}")
    stream = torch.cuda.current_stream(pool.device)
    runtime = _runtime()
    if runtime is None or stream.cuda_stream == 0 or len(wanted) < 2:
        for block_id, offset in wanted:
            pool[block_id].copy_(arena[offset : offset + block_bytes], non_blocking=True)
        return
    first, base = pool.data_ptr(), arena.data_ptr()
    targets = [first + block_id * block_bytes for block_id, _ in wanted]
    sources = [base + offset for _, offset in wanted]
    with torch.cuda.device(pool.device):
        _copy_batch(runtime, targets, sources, block_bytes, stream.cuda_stream)


def _copy_batch(
    runtime: Any, targets: Sequence[int], sources: Sequence[int], num_bytes: int, stream: int
) -> None:
    """One cudaMemcpyBatchAsync, sources read in stream order."""
    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
    count = len(targets)
    (status,) = runtime.cudaMemcpyBatchAsync(
        list(targets), list(sources), [num_bytes] * count, count, [attributes], [0], 1, stream
    )
    if int(status) != 0:
        raise CopyError(f"cudaMemcpyBatchAsync of {count} blocks of {num_bytes} bytes: {status}")


@cache
def _runtime() -> Any | None:
    """CUDA 13's runtime bindings, which torch brings along; None where they are missing or older."""
    try:
        runtime = import_module("cuda.bindings.runtime")
    except ImportError:
        return None
    supported = hasattr(runtime, "cudaMemcpyBatchAsync") and int(runtime.CUDART_VERSION) >= 13_000
    return runtime if supported else None
