"""Tensor-parallel ranks as threads of the test, joined by real gloo groups over loopback."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # torch's list of names is short

from forepage.model.rank_group import RankGroup, RankLostError
from forepage.worker.commands import Stop, encode_batch
from forepage.worker.device import follow
from forepage.worker.rank_device import RankDevice
from forepage.worker.rank_link import ALONE_RANKS, Ranks

T = TypeVar("T")
CPU = torch.device("cpu")
JOIN_S = 120.0


def meeting_point() -> Store:
    """A store that threads of this process share."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=JOIN_S))
    return store


def on_ranks(num_ranks: int, body: Callable[[RankGroup], T]) -> list[T]:
    """Run `body` on every rank at once; what each gave, by rank. Raises: what the first of them raised."""
    store, results, errors = meeting_point(), dict[int, T](), dict[int, BaseException]()

    def run(rank: int) -> None:
        try:
            with torch.inference_mode():
                ranks = RankGroup.connect(store, rank=rank, num_ranks=num_ranks, device=CPU)
                results[rank] = body(ranks)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    for error in errors.values():
        raise error
    assert len(results) == num_ranks, f"ranks {sorted(results)} of {num_ranks} came back"
    return [results[rank] for rank in range(num_ranks)]


@contextmanager
def following_threads(
    num_ranks: int, build: Callable[[RankGroup], RankDevice]
) -> Iterator[tuple[Ranks, list[RankDevice]]]:
    """Rank 0's way to the others, which follow in threads until the block ends; and their devices."""
    if num_ranks == 1:
        yield ALONE_RANKS, []
        return
    store, devices, errors = meeting_point(), dict[int, RankDevice](), list[BaseException]()
    built = threading.Barrier(num_ranks)

    def run(rank: int) -> None:
        try:
            ranks = Ranks.connect(store, rank=rank, num_ranks=num_ranks, device=CPU)
            devices[rank] = build(ranks.tensors)
            built.wait(JOIN_S)
            assert ranks.commands is not None
            with suppress(RankLostError):  # rank 0 leaves without a word
                follow(devices[rank], ranks.commands)
            devices[rank].copies.close()
        except BaseException as error:
            errors.append(error)
            built.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(1, num_ranks)]
    for thread in threads:
        thread.start()
    ranks = Ranks.connect(store, rank=0, num_ranks=num_ranks, device=CPU)
    built.wait(JOIN_S)
    assert ranks.commands is not None
    try:
        yield ranks, [devices[rank] for rank in range(1, num_ranks)]
    finally:
        with suppress(RankLostError):
            ranks.commands.send(encode_batch([Stop()]))
        for thread in threads:
            thread.join(JOIN_S)
    assert not errors, errors
