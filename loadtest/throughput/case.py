"""What is measured: a context and an arm, what a sequence of it holds, and how many fit."""

from dataclasses import dataclass
from enum import StrEnum

from forepage.kv.geometry import BLOCK_ENTRIES, KvGeometry

RECENT_SPARE_BLOCKS = 4
"""As the worker counts the tail's ragged ends (worker/parts.py)."""


class Arm(StrEnum):
    """What is on the GPU. `demand`: all keys and the newest rows; other rows are pulled when wanted."""

    FULL = "full"
    DEMAND = "demand"
    LOOKAHEAD = "lookahead"
    GUARDED = "guarded"
    EXACT = "exact"


@dataclass(frozen=True)
class Plan:
    """What every case of a run shares."""

    kv_bytes: int
    answer_tokens: int
    recent_tokens: int
    slack_blocks: int
    overlap: float
    interval_steps: int
    topk: int


@dataclass(frozen=True)
class Case:
    """One arm at one context; `footprint` is the share of its c4 blocks that it is to have on the GPU."""

    arm: Arm
    context_tokens: int
    footprint: float
    plan: Plan
    geometry: KvGeometry

    @property
    def prompt_blocks(self) -> int:
        """Whole blocks of history; one token follows, which is the prompt's last."""
        return (self.context_tokens - self.plan.answer_tokens - 1) // self.geometry.block_tokens

    @property
    def prompt_tokens(self) -> int:
        """History and that token."""
        return self.prompt_blocks * self.geometry.block_tokens + 1

    @property
    def total_blocks(self) -> int:
        """Of history and answer."""
        return self.geometry.num_blocks(self.prompt_tokens + self.plan.answer_tokens - 1)

    @property
    def budget_blocks(self) -> int:
        """Kept by score: the footprint less the tail."""
        tail = -(-self.plan.recent_tokens // self.geometry.block_tokens)
        return max(1, round(self.footprint * self.total_blocks) - tail)

    @property
    def rows(self) -> int:
        """Row blocks a decoding sequence is promised."""
        if self.arm is Arm.FULL:
            return self.total_blocks
        staging = -(-self.plan.topk // BLOCK_ENTRIES) if self.keeps_keys else 0
        return self._paged + staging

    @property
    def keys(self) -> int:
        """Key blocks a decoding sequence is promised."""
        return self.total_blocks if self.arm is Arm.FULL or self.keeps_keys else self._paged

    @property
    def host_bytes(self) -> int:
        """Its records in the arena, were no block shared."""
        resume_parts = -(-self.geometry.resume_bytes // self.geometry.slot_bytes)
        return (self.total_blocks + 3 * resume_parts) * self.geometry.slot_bytes

    def concurrency(self) -> int:
        """Sequences that fit in `kv_bytes` while one of them, just admitted, still holds its whole prompt."""
        geometry = self.geometry
        one = self.rows * geometry.rows_bytes + self.keys * geometry.keys_bytes
        one += self.total_blocks * geometry.c128_bytes
        rest = self.plan.kv_bytes - self._admission_bytes()
        return max(0, rest // one)

    def shares(self, sequences: int) -> tuple[float, float]:
        """key_share and c128_share of the worker for so many; rows get the rest."""
        geometry, kv_bytes = self.geometry, self.plan.kv_bytes
        keys = sequences * self.keys + max(0, self._admitted - self.keys) + 1
        c128 = sequences * self.total_blocks + 1
        return keys * geometry.keys_bytes / kv_bytes, c128 * geometry.c128_bytes / kv_bytes

    @property
    def keeps_keys(self) -> bool:
        """Whether every key is on the GPU, so that rows can be pulled."""
        return self.arm in (Arm.EXACT, Arm.DEMAND)

    @property
    def _paged(self) -> int:
        tail = -(-self.plan.recent_tokens // self.geometry.block_tokens) + RECENT_SPARE_BLOCKS
        return min(self.total_blocks, self.budget_blocks + tail + self.plan.slack_blocks)

    @property
    def _admitted(self) -> int:
        """Blocks of the prompt, its last token's included."""
        return self.prompt_blocks + 1

    def _admission_bytes(self) -> int:
        """What the newest sequence holds besides, and a block of each kind lost to rounding."""
        geometry = self.geometry
        staging = -(-self.plan.topk // BLOCK_ENTRIES) if self.keeps_keys else 0
        rows = max(0, self._admitted + staging - self.rows) + 2
        keys = max(0, self._admitted - self.keys) + 2
        return rows * geometry.rows_bytes + keys * geometry.keys_bytes + 2 * geometry.c128_bytes
