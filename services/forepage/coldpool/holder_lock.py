"""Locks that live as long as a process: how the manager knows, without time, that a holder is gone.

A holder keeps an exclusive flock on its own file. The kernel drops it when the process dies, however it
dies, and keeps it while the process is only stopped. (A forked child that does not exec inherits it.)
"""

import fcntl
import os
from pathlib import Path

from forepage.errors import DependencyError


class ProcessLock:
    """A lock this process holds until `release` or its end."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def try_acquire(cls, path: Path) -> "ProcessLock | None":
        """Take the lock, or None if another process has it. Raises: DependencyError for a wrong folder."""
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise DependencyError(
                    f"lock {path}: {error.strerror}; FOREPAGE_COLDPOOL__SHM_DIR must be the manager's folder"
                ) from error
            if not _try_flock(descriptor):
                os.close(descriptor)
                return None
            if _leads_to(path, descriptor):
                return cls(path, descriptor)
            os.close(descriptor)  # its last owner unlinked it between our open and our lock

    @property
    def is_findable(self) -> bool:
        """Whether others still find the locked file under its name (a clean shutdown removes it)."""
        return _leads_to(self.path, self._descriptor)

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if _leads_to(self.path, self._descriptor):
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


class LockProbe:
    """Another process's lock, watched through a descriptor of its own, so that an unlink can't hide it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def try_open(cls, path: Path) -> "LockProbe | None":
        """Watch the lock file at `path`; None if there is none."""
        try:
            return cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            return None

    @property
    def is_current(self) -> bool:
        """Whether `path` still leads to the watched file."""
        return _leads_to(self.path, self._descriptor)

    def is_held(self) -> bool:
        """Whether some process holds the lock; if none does, its file is removed."""
        if not _try_flock(self._descriptor):
            return True
        if self.is_current:
            self.path.unlink(missing_ok=True)  # under the lock, so no new owner can be in between
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        """Stop watching."""
        os.close(self._descriptor)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    locked = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (locked.st_dev, locked.st_ino)
