"""What went wrong in other servers while they page-locked host memory, made to happen to a worker's arena.

`peers.md` beside this file says whose failure each is; numbers are its rows.
"""

import threading

import pytest
import torch

from forepage.errors import DependencyError
from forepage.worker import arena_mapping
from forepage.worker.arena_mapping import PinnedArena, chunk_bytes
from rigs.fake_cuda import FakeRuntime


class View:
    """An arena of 1,000 bytes in slots of 30."""

    slot_bytes = 30

    def __init__(self) -> None:
        self.buffer = bytearray(1_000)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime.install(monkeypatch)
    monkeypatch.setattr(arena_mapping, "MAX_CHUNK_BYTES", 100)
    return fake


def pinned(view: View) -> PinnedArena:
    return PinnedArena(view, torch.device("cuda"))  # type: ignore[arg-type]  # what it uses of an ArenaView


@pytest.mark.parametrize("slot_bytes", [1 << 16, 983_040, 3_932_160, 5 << 30])
def test_11_no_registration_is_larger_than_drivers_take(slot_bytes: int) -> None:
    """One of 512 GiB always failed, and the error was blamed on another call."""
    size = chunk_bytes(slot_bytes)
    assert 0 < size <= 64 << 30
    assert size % slot_bytes == 0


def test_12_the_arena_is_pinned_in_pieces_beside_what_else_starts(runtime: FakeRuntime) -> None:
    """One pin of 700 GB held the driver's lock for twelve minutes."""
    runtime.go_on.clear()
    arena = pinned(View())
    assert runtime.entered.wait(10.0)
    assert not arena.is_ready  # and whoever asks is told so, at once
    runtime.go_on.set()
    arena.wait()
    assert arena.is_ready
    assert runtime.sizes == [90] * 11 + [10]
    arena.close()
    assert len(runtime.unregistered) == 12


def test_14_a_stop_while_pinning_waits_for_one_piece_only(runtime: FakeRuntime) -> None:
    """Killed while it unpinned hundreds of GiB, a process hung in the kernel."""
    runtime.go_on.clear()
    arena = pinned(View())
    assert runtime.entered.wait(10.0)
    closing = threading.Thread(target=arena.close)
    closing.start()
    while not arena._closing:
        pass
    runtime.go_on.set()
    closing.join(10.0)
    assert not closing.is_alive()
    assert len(runtime.sizes) == len(runtime.unregistered) == 1


def test_19_a_pin_that_is_refused_stops_the_start_and_leaves_nothing(runtime: FakeRuntime) -> None:
    runtime.refuse_from = 3
    arena = pinned(View())
    with pytest.raises(DependencyError, match="memlock"):
        arena.wait()
    assert not arena.is_ready
    arena.close()
    assert len(runtime.unregistered) == 3
