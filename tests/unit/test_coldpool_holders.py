"""Locks and the manager's view of them; a second descriptor stands for a process, as flock is per open."""

from pathlib import Path

import pytest

from forepage.coldpool.arena import arena_path
from forepage.coldpool.holder_lock import LockProbe, ProcessLock
from forepage.coldpool.holders import HolderRegistry
from forepage.coldpool.shm_names import HolderId, holder_lock_path, lock_path_beside, manager_lock_path
from forepage.errors import DependencyError, RequestError

ANN = HolderId("ann")


def lock_of(folder: Path, name: str = "ann") -> ProcessLock:
    lock = ProcessLock.try_acquire(holder_lock_path(folder, "i", name))
    assert lock is not None
    return lock


def test_names_agree_between_manager_and_holder(tmp_path: Path) -> None:
    for instance in ("default", "a-b.c", "arena"):
        arena = arena_path(tmp_path, instance)
        assert lock_path_beside(arena, "w0") == holder_lock_path(tmp_path, instance, "w0")
    assert manager_lock_path(tmp_path, "i").name == "forepage-i-manager.lock"


def test_lock_is_exclusive_until_released(tmp_path: Path) -> None:
    lock = lock_of(tmp_path)
    assert ProcessLock.try_acquire(lock.path) is None
    probe = LockProbe.try_open(lock.path)
    assert probe is not None
    assert probe.is_held()
    lock.release()
    assert not probe.is_held()
    assert not lock.path.exists()
    probe.close()
    lock_of(tmp_path).release()


def test_lock_in_a_missing_folder_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="FOREPAGE_COLDPOOL__SHM_DIR"):
        ProcessLock.try_acquire(tmp_path / "none" / "x.lock")


def test_registry_knows_only_holders_with_a_lock(tmp_path: Path) -> None:
    registry = HolderRegistry(tmp_path, "i")
    with pytest.raises(RequestError, match="does not hold"):
        registry.attach(ANN)
    holder_lock_path(tmp_path, "i", "ann").touch()
    with pytest.raises(RequestError, match="does not hold"):
        registry.attach(ANN)
    lock = lock_of(tmp_path)
    assert not registry.attach(ANN)
    assert not registry.attach(ANN)
    assert (len(registry), registry.reap_gone()) == (1, [])
    lock.release()
    assert registry.reap_gone() == [ANN]
    assert len(registry) == 0


def test_registry_watches_the_lock_itself_not_its_name(tmp_path: Path) -> None:
    registry = HolderRegistry(tmp_path, "i")
    lock = lock_of(tmp_path)
    registry.attach(ANN)
    lock.path.unlink()
    assert registry.reap_gone() == []
    assert not registry.attach(ANN), "still the same process"
    impostor = lock_of(tmp_path)
    with pytest.raises(RequestError, match="another process"):
        registry.attach(ANN)
    lock.release()
    assert registry.attach(ANN), "now it is another process, and the first one's leases end"
    assert registry.reap_gone() == []
    impostor.release()
    registry.close()


def test_registry_finds_the_living_and_clears_up_after_the_dead(tmp_path: Path) -> None:
    lock, other = lock_of(tmp_path), ProcessLock.try_acquire(holder_lock_path(tmp_path, "j", "bob"))
    holder_lock_path(tmp_path, "i", "dead").touch()
    registry = HolderRegistry(tmp_path, "i")
    assert registry.find_live() == [ANN]
    assert not holder_lock_path(tmp_path, "i", "dead").exists()
    assert other is not None
    registry.remove_files()
    assert [path.name for path in tmp_path.iterdir()] == [other.path.name], "the other instance's stays"
    assert not lock.is_findable
    registry.close()
    lock.release()
    other.release()
