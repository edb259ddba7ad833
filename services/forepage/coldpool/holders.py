"""The manager's view of the processes that hold leases: their lock files, watched, never timed.

A holder is gone when its lock can be taken. One that is stopped, slow or disconnected keeps its lock and
with it everything it leases.
"""

import re
from pathlib import Path

from forepage.coldpool.holder_lock import LockProbe
from forepage.coldpool.lease_table import UNKNOWN_HOLDER
from forepage.coldpool.shm_names import HolderId, holder_ids_on_disk, holder_lock_path
from forepage.errors import RequestError

_HOLDER_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class HolderRegistry:
    """Owner of one lock probe per known holder."""

    def __init__(self, shm_dir: Path, instance: str) -> None:
        self._shm_dir = shm_dir
        self._instance = instance
        self._probes: dict[HolderId, LockProbe] = {}

    def __len__(self) -> int:
        return len(self._probes)

    def find_live(self) -> list[HolderId]:
        """Holders alive at the manager's start; lock files of dead ones are removed."""
        for holder in list(holder_ids_on_disk(self._shm_dir, self._instance)):
            probe = LockProbe.try_open(self._path(holder))
            if probe is not None and probe.is_held():
                self._probes[holder] = probe
            elif probe is not None:
                probe.close()
        return list(self._probes)

    def attach(self, holder: HolderId) -> bool:
        """Know a holder by its lock; True if an earlier process of that name is gone and this is another.

        Raises: RequestError for an impossible name, one whose lock is not held, or one in use.
        """
        if not _HOLDER_ID.fullmatch(holder):
            raise RequestError("holder_id must be 1-64 letters, digits, '_', '.' or '-'", UNKNOWN_HOLDER)
        known = self._probes.get(holder)
        probe = LockProbe.try_open(self._path(holder))
        if probe is not None and not probe.is_held():
            probe.close()
            probe = None
        if known is not None and known.is_held():
            if probe is not None:
                probe.close()
            if probe is not None and not known.is_current:
                raise RequestError(f"holder {holder!r} is another process", UNKNOWN_HOLDER)
            return False  # also if somebody removed its file: the lock itself is what counts
        if probe is None:
            raise RequestError(
                f"holder {holder!r} does not hold {self._path(holder)}; "
                "FOREPAGE_COLDPOOL__SHM_DIR and FOREPAGE_INSTANCE must be the same in every process",
                UNKNOWN_HOLDER,
            )
        if known is not None:
            known.close()
        self._probes[holder] = probe
        return known is not None

    def reap_gone(self) -> list[HolderId]:
        """Forget holders whose process has ended; answers them."""
        gone = [holder for holder, probe in self._probes.items() if not probe.is_held()]
        for holder in gone:
            self._probes.pop(holder).close()
        return gone

    def remove_files(self) -> None:
        """A clean shutdown: the arena goes, so nothing is left to protect."""
        for holder in list(holder_ids_on_disk(self._shm_dir, self._instance)):
            self._path(holder).unlink(missing_ok=True)

    def close(self) -> None:
        """Stop watching."""
        for probe in self._probes.values():
            probe.close()
        self._probes.clear()

    def _path(self, holder: HolderId) -> Path:
        return holder_lock_path(self._shm_dir, self._instance, holder)
