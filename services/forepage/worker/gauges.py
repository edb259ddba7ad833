"""What a worker's metrics show of it whenever they are collected: its blocks, and how many sequences it has.

Read from the exporter's thread; whole numbers that the loop's thread writes, each by itself.
"""

from collections.abc import Iterator

from forepage.telemetry import MetricName, Observed
from forepage.worker.loop import Loop
from forepage.worker.parts import WorkerParts


def observe_worker(parts: WorkerParts, loop: Loop) -> None:
    """Begin to show them."""
    blocks = parts.blocks
    pools = {"rows": blocks.rows, "keys": blocks.keys, "c128": blocks.c128, "slots": blocks.slots}

    def read_blocks() -> Iterator[Observed]:
        for pool, allocator in pools.items():
            yield allocator.num_held, {"pool": pool, "state": "held"}
            yield allocator.num_free, {"pool": pool, "state": "free"}

    def read_sequences() -> Iterator[Observed]:
        yield loop.num_running, {"state": "running"}
        yield loop.num_waiting, {"state": "waiting"}

    parts.telemetry.observe(MetricName.BLOCKS, read_blocks)
    parts.telemetry.observe(MetricName.SEQUENCES, read_sequences)
