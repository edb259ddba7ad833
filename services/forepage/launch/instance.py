"""One `forepage up` an instance: the lock that says so, and what an instance leaves in shared memory.

The lock is a flock, so the kernel frees it however the process ends. Only names of this instance are ever
removed, and a lock file that a live process holds is left where it is.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LaunchError(Exception):
    """`forepage up` can't go on; the text says what to do."""


@contextmanager
def instance_lock(shm_dir: Path, instance: str) -> Iterator[None]:
    """Hold the instance for the block. Raises: LaunchError while another `forepage up` holds it."""
    path = lock_path(shm_dir, instance)
    descriptor = _lock(path)
    if descriptor is None:
        raise LaunchError(
            f"`forepage up` is already running for instance {instance!r}; "
            "stop it, or set FOREPAGE_INSTANCE (and other ports) for a second one"
        )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def lock_path(shm_dir: Path, instance: str) -> Path:
    """The file whose flock `forepage up` holds; run_card.py says what is written in it."""
    return shm_dir / f"forepage-{instance}-up.lock"


def _lock(path: Path) -> int | None:
    """A descriptor that holds the flock of the file that `path` names now, or None."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LaunchError(
                f"cannot write {path}: {error.strerror}; see FOREPAGE_COLDPOOL__SHM_DIR"
            ) from error
        if not _try_flock(descriptor):
            os.close(descriptor)
            return None
        # The holder before us may have removed the file after we opened it: then we hold nothing.
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)


def remove_leftovers(shm_dir: Path, instance: str) -> list[Path]:
    """Remove the instance's arena and its processes' locks; answers what is still held, which stays."""
    ours = re.compile(
        rf"forepage-{re.escape(instance)}-(arena(\.new)?|manager\.lock|holder-[A-Za-z0-9_.-]+\.lock)"
    )
    held = []
    for path in sorted(shm_dir.glob("forepage-*")):
        if ours.fullmatch(path.name):
            if is_held(path):
                held.append(path)
            else:
                path.unlink(missing_ok=True)
    return held


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock of this file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_flock(descriptor)
    finally:
        os.close(descriptor)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
