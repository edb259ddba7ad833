"""The ranks a model is split over, and the one thing they exchange in a step: sums of partial results.

Every element is summed once and then handed to all, so every rank goes on with the same bits; that is what
keeps the ranks' KV pools equal without ever comparing them. Groups are plain objects over a store, not
torch's global default group: a process may hold several, a test may hold two ranks in one process.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # torch's list of names is short

RANK_TIMEOUT_S = 300.0
"""How long a rank waits for the others in one exchange; a rank that died is noticed at once."""
LOOPBACK = "127.0.0.1"


class RankLostError(Exception):
    """Another rank is gone or does not answer: this process can't take another step."""


class Collectives(Protocol):
    """What is used of a gloo or NCCL group."""

    def allreduce(self, tensors: list[Tensor], opts: Any = ...) -> dist.Work: ...
    def broadcast(self, tensors: list[Tensor], opts: Any = ...) -> dist.Work: ...


@dataclass(frozen=True)
class RankGroup:
    """This process's place among the ranks; without a group it is alone and exchanges nothing."""

    rank: int = 0
    num_ranks: int = 1
    group: Collectives | None = None

    @classmethod
    def connect(cls, store: Store, *, rank: int, num_ranks: int, device: torch.device) -> "RankGroup":
        """Meet the other ranks at `store`: NCCL for a GPU's tensors, gloo for the CPU's.

        Raises: RankLostError when one of them does not come within RANK_TIMEOUT_S.
        """
        if device.type == "cuda":
            return cls(rank, num_ranks, _nccl_group(PrefixStore("tensors", store), rank, num_ranks))
        return cls(rank, num_ranks, gloo_group(PrefixStore("tensors", store), rank, num_ranks))

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum a contiguous tensor over the ranks, in place, in its own dtype. Raises: RankLostError."""
        if self.group is not None:
            group = self.group
            exchange(lambda: group.allreduce([partial]))
        return partial


ALONE = RankGroup()
"""A model on one device."""


def exchange(start: Callable[[], dist.Work]) -> None:
    """Start an exchange and wait for it (on a GPU: let the stream wait). Raises: RankLostError."""
    try:
        start().wait()
    except RuntimeError as error:  # gloo and NCCL tell a closed connection and a timeout only by their text
        raise RankLostError(f"another rank is gone: {error}") from error


def gloo_group(store: Store, rank: int, num_ranks: int) -> Collectives:
    """Ranks joined by TCP: over loopback, unless GLOO_SOCKET_IFNAME names an interface."""
    gloo = cast("Any", dist.ProcessGroupGloo)  # its stubs lack the constructor with options
    options = gloo._Options()
    options._timeout = timedelta(seconds=RANK_TIMEOUT_S)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    where = {"interface": interface} if interface else {"hostname": LOOPBACK}
    options._devices = [gloo.create_device(**where)]
    try:
        return cast("Collectives", gloo(store, rank, num_ranks, options))
    except RuntimeError as error:
        raise RankLostError(f"the ranks did not meet: {error}") from error


def _nccl_group(store: Store, rank: int, num_ranks: int) -> Collectives:
    nccl = cast("Any", dist.ProcessGroupNCCL)
    options = nccl.Options()
    options._timeout = timedelta(seconds=RANK_TIMEOUT_S)
    return cast("Collectives", nccl(store, rank, num_ranks, options))
