"""Keys of blocks and resume records: a hash chained over token ids, so equal keys mean equal prefixes.

A block computed by prefill (or decoded with nothing missed) carries the plain key; one decoded under
paging carries a key salted with its sequence and can serve only that sequence's continuation.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

KEY_BYTES = 32


@dataclass(frozen=True)
class PrefixHasher:
    """Hashes for one model: `fingerprint` covers config, weights and KV format; `salt` isolates tenants."""

    fingerprint: str
    block_tokens: int
    salt: str = ""

    @property
    def root(self) -> bytes:
        """The parent of block 0."""
        return _digest(b"root", self.fingerprint.encode(), self.salt.encode())

    def block_keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """Plain keys of every full block of `token_ids`, in order."""
        keys: list[bytes] = []
        parent = self.root
        for start in range(0, len(token_ids) - self.block_tokens + 1, self.block_tokens):
            parent = self.next_key(parent, token_ids[start : start + self.block_tokens])
            keys.append(parent)
        return keys

    def next_key(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """Key of the block that follows `parent` and holds exactly these tokens."""
        return _digest(b"block", parent, struct.pack(f"<{len(token_ids)}I", *token_ids))


def salted_key(key: bytes, sequence_id: str) -> bytes:
    """Key of the same tokens decoded under paging: found only by who knows the sequence."""
    return _digest(b"salted", key, sequence_id.encode())


def resume_key(block_key: bytes, part: int) -> bytes:
    """Key of one part of the resume record taken right after the block `block_key`."""
    return _digest(b"resume", block_key, part.to_bytes(4, "little"))


def _digest(*parts: bytes) -> bytes:
    """blake2b over length-prefixed parts, so that no two part lists collide by concatenation."""
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()
