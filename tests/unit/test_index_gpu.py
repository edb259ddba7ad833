"""Scoring on a GPU that reads the keys over PCIe from the page-locked arena."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from forepage.coldpool.records import SlotRef
from forepage.errors import DependencyError
from forepage.index.key_store import KeyStore, MappedKeys
from forepage.index.scorer import BlockScores, Scorer
from forepage.model.memory_indexer import MemoryIndexer
from forepage.settings import SEEDED_MODEL
from rigs.key_arena import SPEC, KeyArena

T = TypeVar("T")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HIDDEN = torch.randn(3, SPEC.hidden_size, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: CUDA page-locks no file of a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def poll(found: Callable[[], T | None]) -> T:
    """What it finds at last, while a thread page-locks or gives back."""
    give_up_s = time.monotonic() + 30.0
    while (value := found()) is None:
        assert time.monotonic() < give_up_s
    return value


def mapped(store: KeyStore) -> MappedKeys:
    """Its arena, once all of it is page-locked."""

    def ready() -> MappedKeys | None:
        with suppress(DependencyError):
            return store.current()
        return None

    return poll(ready)


def score(made: KeyArena, refs: list[SlotRef], device: str, position: int) -> BlockScores:
    where = torch.device(device)
    keys = mapped(KeyStore(made.arena.path, made.geometry, where))
    indexer = MemoryIndexer.load(SEEDED_MODEL, SPEC, made.geometry.format, where)
    return Scorer(indexer, made.geometry, where).score_blocks(
        keys, refs, hidden=HIDDEN, position=position, threshold=0.0, check=lambda: None
    )


@pytest.mark.parametrize("position", [70, 1_048_575])
def test_gpu_scores_equal_cpu_scores(folder: Path, position: int) -> None:
    made = KeyArena.create(folder / "arena", num_slots=300)
    refs = [made.complete(slot) for slot in np.random.default_rng(2).permutation(300).tolist()]
    made.rewrite(refs[7].arena_id, generation=2)
    want, got = score(made, refs, "cpu", position), score(made, refs, "cuda", position)
    assert got.num_scored == want.num_scored == 299
    assert got.scores[7] == 0.0
    # A query value between two bf16 numbers may round either way when the sum's order differs.
    np.testing.assert_allclose(got.scores, want.scores, atol=5e-3)


def test_page_lock_ends_with_the_mapping(folder: Path) -> None:
    made = KeyArena.create(folder / "arena", num_slots=4)
    store = KeyStore(made.arena.path, made.geometry, torch.device("cuda"))
    first = mapped(store).payloads.data_ptr()
    assert is_locked(first)
    KeyArena.create(folder / "arena", num_slots=4, seed=1)
    second = mapped(store).payloads.data_ptr()
    gc.collect()
    assert is_locked(second)
    assert first == second or poll(lambda: None if is_locked(first) else True)
    assert store.close(30.0)
    assert not is_locked(second)


def is_locked(address: int) -> bool:
    """Whether CUDA would refuse to register the page because it already has.

    Asked on a thread of its own: the refusal stays that thread's last error, and torch would raise it here.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_is_refused, address).result()


def _is_refused(address: int) -> bool:
    already_registered = 712
    status = int(torch.cuda.cudart().cudaHostRegister(address, 4096, 0))
    if status == 0:
        torch.cuda.cudart().cudaHostUnregister(address)
    return status == already_registered
