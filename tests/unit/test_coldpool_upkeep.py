"""What the manager says of holders whose process has ended."""

from dataclasses import dataclass, field
from typing import cast

import pytest
from structlog.testing import capture_logs

from forepage.coldpool.holders import HolderRegistry
from forepage.coldpool.lease_table import LeaseTable
from forepage.coldpool.pool import ColdPool
from forepage.coldpool.shm_names import HolderId
from forepage.coldpool.upkeep import reap_holders

KILLED, STOPPED = HolderId("killed"), HolderId("stopped")


class EndOfTestError(Exception):
    """Nobody is left."""


@dataclass
class Pool:
    """As much of a pool as holders need."""

    table: LeaseTable = field(default_factory=lambda: LeaseTable(4, first_generation=1))
    num_changes = 0

    def drop_holder(self, holder: HolderId) -> int:
        return self.table.drop_holder(holder)


@dataclass
class Registry:
    """Both have ended, one after the other."""

    left: list[list[HolderId]] = field(default_factory=lambda: [[STOPPED], [KILLED]])

    def reap_gone(self) -> list[HolderId]:
        if not self.left:
            raise EndOfTestError
        return self.left.pop()


async def test_a_holder_that_is_gone_is_a_warning_only_if_it_held_something() -> None:
    pool = Pool()
    for holder in (KILLED, STOPPED):
        pool.table.add_holder(holder)
        refs = pool.table.reserve(holder, 2)
    pool.table.release(STOPPED, refs)
    with capture_logs() as logs, pytest.raises(EndOfTestError):
        await reap_holders(cast(ColdPool, pool), cast(HolderRegistry, Registry()), interval_s=0.0)
    said = [(log["holder"], log["log_level"], log["num_slots"]) for log in logs]
    assert said == [(KILLED, "warning", 2), (STOPPED, "info", 0)]
    assert pool.table.num_free == 4
