"""A made-up document in the cold pool, as if it had been prefilled: every sequence's cached prefix.

Its records are random bytes that are finite and small in every format. All sequences lease the same records,
as requests over one document do; what they hold on the GPU is loaded for each of them, into its own blocks.
"""

from collections.abc import Sequence as Seq
from random import Random

import numpy as np

from forepage.coldpool.client import ColdPoolClient, PublishedRecord, RecordKind
from forepage.coldpool.records import payload_checksum
from forepage.kv.geometry import KvGeometry
from forepage.kv.prefix_hash import PrefixHasher, resume_key
from loadtest.decode.synthetic import HIGH_BYTE, LOW_BYTE

PLAIN_TOKENS = 256
"""Every vocabulary has these ids."""
RECORDS_AT_ONCE = 256
SEED = 0


def prompt_of(num_tokens: int) -> list[int]:
    """The document's token ids."""
    return Random(SEED).choices(range(PLAIN_TOKENS), k=num_tokens)


async def write_history(
    client: ColdPoolClient, geometry: KvGeometry, fingerprint: str, prompt: Seq[int]
) -> None:
    """Write and publish every full block of the prompt, and the resume record behind the last.

    `client` is attached, and keeps them leased. Raises: CapacityError when the arena is too small.
    """
    keys = PrefixHasher(fingerprint, geometry.block_tokens).block_keys(prompt)
    parts = -(-geometry.resume_bytes // geometry.slot_bytes)
    wanted = [(key, RecordKind.BLOCK, 0, 1, geometry.record_bytes) for key in keys]
    for part in range(parts):
        size = min(geometry.slot_bytes, geometry.resume_bytes - part * geometry.slot_bytes)
        wanted.append((resume_key(keys[-1], part), RecordKind.RESUME, part, parts, size))
    random = np.random.default_rng(SEED)
    for start in range(0, len(wanted), RECORDS_AT_ONCE):
        batch = wanted[start : start + RECORDS_AT_ONCE]
        records = []
        for slot, (key, kind, part, num_parts, size) in zip(
            await client.reserve(len(batch)), batch, strict=True
        ):
            payload = client.view.payload(slot.arena_id)[:size]
            payload[:] = random.integers(LOW_BYTE, HIGH_BYTE, size, np.uint8).tobytes()
            checksum = payload_checksum(payload)
            records.append(PublishedRecord(slot, key, kind, part, num_parts, size, checksum))
        await client.publish(records)
