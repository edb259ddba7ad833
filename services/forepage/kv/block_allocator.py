"""Hands out the numbered blocks of one pool; the law is free + held = total, held <= promised <= total.

A sequence is promised, when it is admitted, as many blocks as it can come to hold; taking a promised
block can't fail. A reserve is kept back from ordinary promises: a move to `exact` must find room that
new sequences could not take.
"""

from collections.abc import Iterable

from forepage.errors import IntegrityError


class BlockAllocator:
    """Owner of the ids 0..total-1 of one pool."""

    def __init__(self, name: str, total: int, reserve: int = 0) -> None:
        """`reserve` blocks can only be promised to callers that may use it."""
        if total <= 0 or reserve < 0 or reserve >= total:
            raise ValueError(f"{name}: total {total} with reserve {reserve}")
        self.name = name
        self.total = total
        self.reserve = reserve
        self.promised = 0
        self._free = list(range(total - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        """Ids not held, the reserve included."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Ids handed out."""
        return len(self._held)

    @property
    def num_unpromised(self) -> int:
        """Blocks that could be promised now, the reserve left out."""
        return max(0, self.total - self.reserve - self.promised)

    def can_ever_promise(self, count: int) -> bool:
        """Whether an empty pool could promise that many."""
        return count <= self.total - self.reserve

    def try_promise(self, count: int, *, use_reserve: bool = False) -> bool:
        """Promise `count` more blocks (negative: take a promise back); False when there is no room."""
        limit = self.total - (0 if use_reserve or count <= 0 else self.reserve)
        if self.promised + count > limit:
            return False
        self.promised += count
        if self.promised < 0:
            raise IntegrityError(f"{self.name}: {self.promised} blocks promised")
        return True

    def allocate(self, count: int) -> list[int]:
        """Take `count` promised blocks. Raises: IntegrityError when more is taken than was promised."""
        if self.num_held + count > self.promised:
            raise IntegrityError(f"{self.name}: {count} taken, {self.promised - self.num_held} promised")
        ids = [self._free.pop() for _ in range(count)]
        self._held.update(ids)
        return ids

    def free(self, ids: Iterable[int]) -> None:
        """Give ids back. Raises: IntegrityError for one that isn't held."""
        for block_id in ids:
            if block_id not in self._held:
                raise IntegrityError(f"{self.name}: block {block_id} freed but not held")
            self._held.remove(block_id)
            self._free.append(block_id)

    def check_integrity(self) -> None:
        """Raises: IntegrityError when free + held is not total, or more is held than was promised."""
        free = set(self._free)
        if len(free) != len(self._free) or free & self._held or len(free) + len(self._held) != self.total:
            raise IntegrityError(f"{self.name}: {len(free)} free + {len(self._held)} held != {self.total}")
        if not len(self._held) <= self.promised <= self.total:
            raise IntegrityError(f"{self.name}: {len(self._held)} held, {self.promised} promised")
