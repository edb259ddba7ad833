"""A worker's rank other than 0: a process that maps the arena, loads its part of the model, and follows.

Started by rank 0 (rank_processes.py); it serves nobody, decides nothing and writes nothing to the arena. It
ends when it is told to, and at once when rank 0 is gone: its standard input ends then, wherever it waits.
SIGTERM and SIGINT go to whole process groups; the worker drains on them, so a follower leaves them to rank 0.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import structlog
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch's list of names is short

from forepage.coldpool.arena import ArenaView
from forepage.errors import DependencyError, ForepageError
from forepage.logs import open_logs
from forepage.model.rank_group import RankLostError
from forepage.worker.arena_mapping import PinnedArena
from forepage.worker.assembly import ModelFolder, assemble_rank, device_of
from forepage.worker.device import follow
from forepage.worker.rank_link import Ranks
from forepage.worker.rank_orders import GO, HERE, READY, RankOrders

FAILED = 1
_log = structlog.get_logger("forepage.worker.rank")


def main() -> int:
    """Follow rank 0 until it says stop; the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    hears = FileIO(0, closefd=False)  # raw: a thread may be reading it while the interpreter ends
    line = hears.readline()
    if not line:
        return FAILED
    orders = RankOrders.model_validate_json(line)
    open_logs("worker", orders.telemetry)
    may_follow = threading.Event()
    threading.Thread(target=_listen, args=(hears, may_follow), name="rank 0", daemon=True).start()
    try:
        _run(orders, may_follow, _own_output())
    except RankLostError as error:
        _log.warning("rank 0 is gone", rank=orders.rank, reason=str(error))
        return FAILED
    except ForepageError as error:
        _log.error("this rank failed", rank=orders.rank, error=str(error), code=error.code)
        return FAILED
    return 0


def _run(orders: RankOrders, may_follow: threading.Event, say: Callable[[str], None]) -> None:
    num_ranks = orders.worker.tensor_parallel
    device = device_of(orders.model, rank=orders.rank, num_ranks=num_ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    folder = ModelFolder.read(orders.model)
    arena = PinnedArena(_shared_arena(orders.arena_path, orders.arena_uuid), device)
    say(HERE)
    store = FileStore(str(orders.store_path), num_ranks)
    ranks = Ranks.connect(store, rank=orders.rank, num_ranks=num_ranks, device=device)
    assert ranks.commands is not None
    local = assemble_rank(orders.worker, folder, device, arena.tensor, ranks=ranks.tensors)
    arena.wait()
    say(READY)
    may_follow.wait()
    _log.info("following", rank=orders.rank, num_ranks=num_ranks, device=str(device))
    follow(local, ranks.commands)
    local.copies.close()


def _shared_arena(path: Path, uuid: str) -> ArenaView:
    """Rank 0's arena; mapped writable because a GPU registers no other mapping."""
    view = ArenaView.open(path, writable=True)
    if view.uuid != uuid:
        raise DependencyError(f"arena {path} is not the one that rank 0 has mapped")
    return view


def _listen(hears: FileIO, may_follow: threading.Event) -> None:
    """Rank 0's further words; their end is its own, and nothing here is worth a clean exit."""
    while line := hears.readline():
        if line.strip() == GO.encode():
            may_follow.set()
    os._exit(FAILED)


def _own_output() -> Callable[[str], None]:
    """Keep standard output for what rank 0 waits for; what libraries print goes to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)

    def say(word: str) -> None:
        os.write(kept, f"{word}\n".encode())

    return say


if __name__ == "__main__":
    sys.exit(main())
