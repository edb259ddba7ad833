"""How the ranks of a worker talk: rank 0 broadcasts batches of commands, all join small answers.

Bytes of msgpack over gloo, never pickled objects. A batch travels in one broadcast of FRAME_BYTES if it
fits, with the rest of a longer one in a second:

    0   i64   length of the batch
    8   u8    the batch, as far as it fits
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch's list of names is short

from forepage.model.rank_group import ALONE, Collectives, RankGroup, exchange, gloo_group

FRAME_BYTES = 4096
HEAD_BYTES = 8


class RankLink:
    """One rank's end of the channel; used by one thread at a time."""

    def __init__(self, group: Collectives) -> None:
        self._group = group

    def send(self, batch: bytes) -> None:
        """From rank 0 to all others, which must be receiving. Raises: RankLostError."""
        frame = bytearray(FRAME_BYTES)
        frame[:HEAD_BYTES] = len(batch).to_bytes(HEAD_BYTES, "little")
        first, rest = batch[: FRAME_BYTES - HEAD_BYTES], batch[FRAME_BYTES - HEAD_BYTES :]
        frame[HEAD_BYTES : HEAD_BYTES + len(first)] = first
        self._broadcast(frame)
        if rest:
            self._broadcast(bytearray(rest))

    def receive(self) -> bytes:
        """The next batch. Raises: RankLostError when rank 0 is gone, or silent for RANK_TIMEOUT_S."""
        frame = bytearray(FRAME_BYTES)
        self._broadcast(frame)
        length = int.from_bytes(frame[:HEAD_BYTES], "little")
        batch = bytes(frame[HEAD_BYTES : HEAD_BYTES + length])
        rest = bytearray(length - len(batch))
        if rest:
            self._broadcast(rest)
        return batch + bytes(rest)

    def least(self, values: list[int]) -> list[int]:
        """The least of all ranks' values, place by place; each brings as many, perhaps none.

        Also a meeting: it ends only when every rank has carried out what was sent before. So it is an
        exchange even without values, of a place of its own. Raises: RankLostError.
        """
        joined = torch.tensor([0, *values], dtype=torch.int32)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        exchange(lambda: self._group.allreduce([joined], options))
        return joined[1:].tolist()

    def _broadcast(self, data: bytearray) -> None:
        """From rank 0, in place."""
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        exchange(lambda: self._group.broadcast([tensor]))


@dataclass(frozen=True)
class Ranks:
    """How a rank reaches the others: sums of tensors in a step, commands between steps; alone: neither."""

    tensors: RankGroup = ALONE
    commands: RankLink | None = None

    @classmethod
    def connect(cls, store: Store, *, rank: int, num_ranks: int, device: torch.device) -> "Ranks":
        """Meet the others. Raises: RankLostError when one of them does not come."""
        tensors = RankGroup.connect(store, rank=rank, num_ranks=num_ranks, device=device)
        return cls(tensors, RankLink(gloo_group(PrefixStore("commands", store), rank, num_ranks)))


ALONE_RANKS = Ranks()
"""A worker on one device."""
