"""Copy whole blocks from the host arena into a GPU pool."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_arena, check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.gather_blocks import reference
from forepage_kernels.layout import LANE_BYTES


def gather_blocks(pool: Tensor, arena: Tensor, *, block_ids: Tensor, arena_offsets: Tensor) -> None:
    """Copy `block_bytes` from each arena offset into its pool block, in place.

    Shapes: pool u8 [P, block_bytes], arena u8 [A], block_ids i64 [n], arena_offsets i64 [n] (bytes,
    multiples of 8). A negative block id skips its entry; the others are distinct.
    With a CUDA pool the arena may be host memory registered with CUDA. Where the ids lie says who copies:
    on the GPU a kernel, which a graph can capture; on the CPU the copy engines, on the current stream.
    """
    check_tensor("pool", pool, dtype=torch.uint8, shape=[None, None])
    check_arena("arena", arena, device=pool.device)
    by_engine = pool.is_cuda and not block_ids.is_cuda
    where = block_ids.device if by_engine else pool.device
    check_tensor("block_ids", block_ids, dtype=torch.int64, shape=[None], device=where)
    check_tensor("arena_offsets", arena_offsets, dtype=torch.int64, shape=block_ids.shape, device=where)
    if pool.shape[1] % LANE_BYTES:
        raise ShapeError(f"pool: block_bytes must be a multiple of {LANE_BYTES}, got {pool.shape[1]}")
    if by_engine:
        from forepage_kernels.gather_blocks.copies import gather_blocks as copy

        copy(pool, arena, block_ids=block_ids, arena_offsets=arena_offsets)
    elif pool.is_cuda:
        from forepage_kernels.gather_blocks.kernel import gather_blocks as launch

        launch(pool, arena, block_ids=block_ids, arena_offsets=arena_offsets)
    else:
        reference.gather_blocks(pool, arena, block_ids=block_ids, arena_offsets=arena_offsets)
