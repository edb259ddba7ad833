"""The ids of blocks and sequences as distinct types, so that a logical index never addresses memory.

A block has one place in its sequence, and up to three places where its bytes lie: a row block and a key
block on the GPU, and a slot of the host's arena.
"""

from typing import NewType

BlockIdx = NewType("BlockIdx", int)
"""Logical: which block of a sequence, 0 being its first 256 tokens."""

RowBlockId = NewType("RowBlockId", int)
"""Physical: a block of the GPU pool of compressed KV rows."""

KeyBlockId = NewType("KeyBlockId", int)
"""Physical: a block of the GPU pool of indexer keys."""

ArenaId = NewType("ArenaId", int)
"""Physical: a slot of the host's arena; means a record only together with its generation."""

SequenceId = NewType("SequenceId", str)
"""Names a sequence across processes; never a metric label."""
