"""Names of the lock files that an instance keeps in its shared-memory folder, beside the arena."""

from collections.abc import Iterator
from pathlib import Path
from typing import NewType

HolderId = NewType("HolderId", str)
_PREFIX = "forepage-"
_ARENA = "-arena"
_SUFFIX = ".lock"


def holder_lock_path(shm_dir: Path, instance: str, holder_id: str) -> Path:
    """The file a holder locks for its life."""
    return shm_dir / f"{_holder_prefix(instance)}{holder_id}{_SUFFIX}"


def lock_path_beside(arena: Path, holder_id: str) -> Path:
    """The same, for a holder that was told where the arena of its instance is."""
    instance = arena.name.removeprefix(_PREFIX).removesuffix(_ARENA)
    return holder_lock_path(arena.parent, instance, holder_id)


def manager_lock_path(shm_dir: Path, instance: str) -> Path:
    """The file that the one cold pool manager of an instance locks."""
    return shm_dir / f"{_PREFIX}{instance}-manager{_SUFFIX}"


def holder_ids_on_disk(shm_dir: Path, instance: str) -> Iterator[HolderId]:
    """Holders that left a lock file, alive or not."""
    prefix = _holder_prefix(instance)
    for path in sorted(shm_dir.glob(f"{prefix}*{_SUFFIX}")):
        yield HolderId(path.name[len(prefix) : -len(_SUFFIX)])


def _holder_prefix(instance: str) -> str:
    return f"{_PREFIX}{instance}-holder-"
