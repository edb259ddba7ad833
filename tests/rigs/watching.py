"""Writing and reading the blocks that a worker shows to those who watch it."""

from collections.abc import Iterable

from forepage.rpc import worker_pb2 as pb


def blocks_of(view: pb.WatchedSequence) -> set[int]:
    """The blocks that a view says are resident; a bit beyond the last block fails."""
    bits = {
        8 * place + bit for place, byte in enumerate(view.resident) for bit in range(8) if byte >> bit & 1
    }
    assert all(block < view.num_blocks for block in bits)
    return bits


def resident_bits(blocks: Iterable[int], num_blocks: int) -> bytes:
    """A bit a block, the lowest first."""
    number = sum(1 << block for block in set(blocks))
    return number.to_bytes(-(-num_blocks // 8), "little")
