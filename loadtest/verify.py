"""What `coldpool.verify: always` costs: a cached prefix leased with and without checking every payload.

    python -m loadtest.verify --blocks 64 --blocks 256

Both arms lease the same records of one arena in turn, so the printed ratio holds on a busy machine too.
"""

import asyncio
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from forepage.coldpool.arena import Arena
from forepage.coldpool.counters import ColdPoolCounters
from forepage.coldpool.lease_table import LeaseTable
from forepage.coldpool.pool import ColdPool, Identity
from forepage.coldpool.prefix_lease import lease_prefix
from forepage.coldpool.records import PublishedRecord, RecordKind, payload_checksum
from forepage.coldpool.shm_names import HolderId
from forepage.coldpool.tiers import RecordTiers
from forepage.settings import Verify
from forepage.telemetry import open_telemetry

FLASH_RECORD_BYTES = 983_040
HOLDER = HolderId("verify")


def main(
    blocks: Annotated[list[int], typer.Option(help="blocks of a prefix; several may be given")],
    repeats: Annotated[int, typer.Option(min=1, help="leases of each arm")] = 9,
    record_bytes: Annotated[int, typer.Option(min=4096, help="of one block")] = FLASH_RECORD_BYTES,
) -> None:
    """Print the median time of a lease in both arms, for prefixes of these lengths."""
    typer.echo("blocks  scrub ms  always ms  always/scrub  GB/s checked")
    for count in blocks:
        plain, checked = asyncio.run(_measured(count, repeats, record_bytes))
        speed = count * record_bytes / (checked - plain) / 1e9
        typer.echo(
            f"{count:6}  {plain * 1e3:8.3f}  {checked * 1e3:9.1f}  {checked / plain:12.0f}  {speed:12.1f}"
        )


async def _measured(count: int, repeats: int, record_bytes: int) -> tuple[float, float]:
    """Median seconds of a lease, without and with the check."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        pool = _pool(Path(folder), count + 1, record_bytes)
        keys = [hashlib.sha256(f"{idx}".encode()).digest() for idx in range(count + 1)]
        await _fill(pool, keys, record_bytes)
        seconds: dict[Verify, list[float]] = {Verify.SCRUB: [], Verify.ALWAYS: []}
        for _ in range(repeats):
            for verify, taken in seconds.items():
                pool.verify = verify
                begun = time.perf_counter()
                lease = await lease_prefix(pool, HOLDER, keys[:-1], [[]] * (count - 1) + [keys[-1:]])
                taken.append(time.perf_counter() - begun)
                assert len(lease.blocks) == count
                pool.release(HOLDER, [*lease.blocks, *lease.resume_parts])
        plain, checked = (sorted(taken)[repeats // 2] for taken in seconds.values())
        return plain, checked


def _pool(folder: Path, num_slots: int, record_bytes: int) -> ColdPool:
    counters = ColdPoolCounters(open_telemetry("verify", instance_id="verify"))
    pool = ColdPool(
        Arena.create(folder / "arena", slot_bytes=record_bytes, num_slots=num_slots),
        LeaseTable(num_slots, first_generation=1),
        tiers=RecordTiers([], counters),
        directory=None,
        counters=counters,
        identity=Identity("host", "verify"),
        verify=Verify.SCRUB,
    )
    pool.add_holder(HOLDER)
    return pool


async def _fill(pool: ColdPool, keys: list[bytes], record_bytes: int) -> None:
    """All blocks of a prefix, and the resume record at its end."""
    refs = await pool.reserve(HOLDER, len(keys))
    records = []
    for place, (ref, key) in enumerate(zip(refs, keys, strict=True)):
        payload = pool.arena.payload(ref.arena_id)
        payload[:8] = place.to_bytes(8, "little")
        kind = RecordKind.RESUME if place == len(keys) - 1 else RecordKind.BLOCK
        records.append(PublishedRecord(ref, key, kind, 0, 1, record_bytes, payload_checksum(payload)))
    pool.release(HOLDER, await pool.publish(HOLDER, records))


if __name__ == "__main__":
    typer.run(main)
