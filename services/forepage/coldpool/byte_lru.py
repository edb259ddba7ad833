"""The account of a bounded tier: which keys it stores, how large, and which was used least recently."""

from collections import OrderedDict


class ByteLru:
    """Owner of sizes and order; the tier does what it decides."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.stored_bytes = 0
        self._size_by_key: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._size_by_key

    def add(self, key: bytes, size: int) -> None:
        """A value was stored (or replaced)."""
        self.remove(key)
        self._size_by_key[key] = size
        self.stored_bytes += size

    def touch(self, key: bytes) -> None:
        """A value was used."""
        if key in self._size_by_key:
            self._size_by_key.move_to_end(key)

    def remove(self, key: bytes) -> None:
        """A value is gone, or never was."""
        self.stored_bytes -= self._size_by_key.pop(key, 0)

    def clear(self) -> None:
        """Forget everything, to count anew."""
        self._size_by_key.clear()
        self.stored_bytes = 0

    def overflow(self) -> bytes | None:
        """The key to delete next, while there is more than allowed."""
        return next(iter(self._size_by_key)) if self.stored_bytes > self.max_bytes else None
