"""Plain torch gather_blocks: one contiguous copy a block."""

from torch import Tensor


def gather_blocks(pool: Tensor, arena: Tensor, *, block_ids: Tensor, arena_offsets: Tensor) -> None:
    """See the package; a block or offset out of range raises."""
    block_bytes = pool.shape[1]
    for block_id, offset in zip(block_ids.tolist(), arena_offsets.tolist(), strict=True):
        if block_id >= 0:
            pool[block_id].copy_(arena.narrow(0, offset, block_bytes))
