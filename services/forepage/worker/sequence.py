"""One sequence on a worker: its tokens, what it holds, and where it is in its life.

The loop owns every Sequence; the other parts of the worker change only the fields named after them.
Life: WAITING -> GRANTING (arena) -> LOADING (cached prefix) -> PREFILL -> FIRST_PLAN -> DECODE -> DONE;
PAUSED is a decode that waits for room to escalate or to grow.
"""

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto

from opentelemetry.trace import Span
from torch import Tensor

from forepage.coldpool.client import SlotRef
from forepage.errors import ForepageError
from forepage.kv.geometry import KvGeometry
from forepage.kv.guard import Guard
from forepage.kv.plan_source import PlanSource
from forepage.kv.prefix_hash import PrefixHasher, resume_key, salted_key
from forepage.kv.resident_set import ResidentSet
from forepage.model.indexer import IndexerTap
from forepage.rpc import worker_pb2 as pb
from forepage.settings import ResidencyMode, WorkerSettings
from forepage.worker.arena_access import Grant
from forepage.worker.constraint import Constraint
from forepage.worker.device_audit import StepAudit
from forepage.worker.host_copy import HostCopy
from forepage.worker.lookahead_state import LookaheadState
from forepage.worker.reads import Reads
from forepage.worker.report import Report
from forepage.worker.request import Request
from forepage.worker.resident_history import ResidentHistory
from forepage.worker.sampler import Row

Emit = Callable[[pb.GenerateEvent], None]


@dataclass(frozen=True)
class StepTap:
    """What one step left for one sequence: attention inputs f32 [L, D], indexer taps by c4 layer, its row.

    `audit` is there if the device was asked what the step missed. Of a step on a GPU there is only what was
    wanted of it (DecodeRow): `hidden` for a plan, taps for whoever looks at them here.
    """

    hidden: Tensor | None
    indexer: Seq[IndexerTap]
    row: int
    audit: StepAudit | None = None


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    GRANTING = auto()
    LOADING = auto()
    PREFILL = auto()
    FIRST_PLAN = auto()
    DECODE = auto()
    PAUSED = auto()
    DONE = auto()


class Room(Enum):
    """Whether a sequence that could page keeps everything because there is room (full_by_room.py)."""

    PAGED = auto()
    FILLING = auto()
    KEPT = auto()
    LEAVING = auto()


@dataclass
class DeviceHoldings:
    """What a sequence holds on the device, and what it was promised."""

    slot: int
    c128_ids: list[int]
    row_promise: int
    key_promise: int
    staging_ids: list[int] = field(default_factory=list)
    resident: ResidentSet = field(default_factory=ResidentSet)


@dataclass
class ArenaHoldings:
    """What a sequence holds in the arena: leased records by block, and slots still to be written.

    `num_started` counts the blocks whose write-back has begun; `writing` are slots not yet published.
    """

    ref_by_block: dict[int, SlotRef] = field(default_factory=dict)
    empty: list[SlotRef] = field(default_factory=list)
    resume_refs: list[SlotRef] = field(default_factory=list)
    writing: list[SlotRef] = field(default_factory=list)
    num_started: int = 0
    _num_leading: int = 0

    @property
    def num_leading(self) -> int:
        """Blocks 0..n-1 that are all in the arena: what may be paged. None ever leaves it again."""
        while self._num_leading in self.ref_by_block:
            self._num_leading += 1
        return self._num_leading

    def all_refs(self) -> list[SlotRef]:
        """Every slot held."""
        return [*self.ref_by_block.values(), *self.empty, *self.writing, *self.resume_refs]


@dataclass(frozen=True)
class Snapshot:
    """Window and compressor state after `num_tokens` tokens, a multiple of 256 (model/resume.py)."""

    num_tokens: int
    payload: HostCopy


@dataclass
class Sequence:
    """State of one request; `tokens` is the prompt and what was generated."""

    request: Request
    emit: Emit
    span: Span
    hasher: PrefixHasher
    guard: Guard
    arrived_s: float = field(default_factory=time.monotonic)
    incarnation: int = field(default_factory=lambda: secrets.randbits(62))
    phase: Phase = Phase.WAITING
    room: Room = Room.PAGED
    was_full_by_room: bool = False
    """Whether that was so at any of its steps."""
    moves_since_s: float = 0.0
    """When it was decided that it leaves `full`, or returns."""
    tokens: list[int] = field(default_factory=list)
    num_processed: int = 0
    num_unread: int = 0
    """Steps launched whose tokens were not read yet; `num_processed` does not count them."""
    unread_taps: int = 0
    """Those of them whose taps are wanted: the resident set changes only after they are read."""
    cached_tokens: int = 0
    clean: bool = True
    grant: Future[Grant] | None = None
    prefix_load: Future[None] | None = None
    last_refusal: ForepageError | None = None
    failure: ForepageError | None = None
    snapshot: Snapshot | None = None
    stage_span: Span | None = None
    retry_at_s: float = 0.0
    paused_since_s: float | None = None
    blocked_since_s: float | None = None
    first_tap: StepTap | None = None
    first_plan_by_s: float = 0.0
    released: threading.Event = field(default_factory=threading.Event)
    device: DeviceHoldings | None = None
    arena: ArenaHoldings = field(default_factory=ArenaHoldings)
    lookahead: LookaheadState = field(default_factory=LookaheadState)
    report: Report = field(default_factory=Report)
    constraint: Constraint | None = None
    generated: Counter[int] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)
    _keys: list[bytes] = field(default_factory=list)

    @classmethod
    def start(
        cls, request: Request, *, emit: Emit, span: Span, hasher: PrefixHasher, settings: WorkerSettings
    ) -> "Sequence":
        """A sequence that waits for admission."""
        guard = Guard.start(
            min_recall=request.min_recall,
            budget_blocks=request.budget_blocks,
            clean_intervals=settings.clean_intervals,
        )
        seen = set(request.prompt) if request.sampling.has_penalty else set()
        report = Report(
            history=ResidentHistory() if request.audit else None, reads=Reads() if request.reads else None
        )
        started = cls(
            request, emit, span, hasher, guard, tokens=list(request.prompt), seen=seen, report=report
        )
        if request.sampling.has_penalty:
            started.generated.update(request.answered)
        return started

    @property
    def holds(self) -> DeviceHoldings:
        """What it holds on the device; only after admission."""
        assert self.device is not None
        return self.device

    @property
    def resident(self) -> ResidentSet:
        """Its resident set; only after admission."""
        return self.holds.resident

    @property
    def num_generated(self) -> int:
        """Tokens generated here so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of the answer so far, also those of a worker that was lost."""
        return self.request.num_answered + self.num_generated

    @property
    def num_launched(self) -> int:
        """Tokens processed, or being processed by steps that were launched."""
        return self.num_processed + self.num_unread

    @property
    def awaits_last_token(self) -> bool:
        """Whether the steps launched give all that it may generate."""
        return self.num_generated + self.num_unread >= self.request.max_tokens

    @property
    def is_sampled_on_host(self) -> bool:
        """Whether its next token can't be picked before the host has read the last one."""
        return self.constraint is not None or not self.request.sampling.is_plain

    def sampling_row(self, position: int) -> Row:
        """Its turn in the sampler; `position` is the one the new token will have."""
        mask = self.constraint.mask() if self.constraint is not None else None
        return Row(self.request.sampling, position, self.generated, self.seen, mask)

    def take_token(self, token: int) -> None:
        """The next token: what later ones depend on changes here alone."""
        self.tokens.append(token)
        if self.constraint is not None:
            self.constraint.take(token)
        if self.request.sampling.has_penalty:
            self.generated[token] += 1
            self.seen.add(token)

    @property
    def says_no_more(self) -> bool:
        """Whether its newest token is one that ends it, or its grammar is at its end."""
        is_complete = self.constraint is not None and self.constraint.is_complete
        return is_complete or self.tokens[-1] in self.request.stop_token_ids

    @property
    def is_exact(self) -> bool:
        """Whether rows are pulled on demand: by request, or because the guard moved it there."""
        return self.request.mode is ResidencyMode.EXACT or (
            self.request.mode is ResidencyMode.GUARDED and self.guard.exact
        )

    @property
    def keeps_keys(self) -> bool:
        """Whether `exact` is granted: every key stays, absent rows are pulled."""
        return self.is_exact and not self.lookahead.want_exact

    @property
    def uses_prompt_evidence(self) -> bool:
        """Whether its plans keep what the prompt's tail looked at: not without paging, nor for a baseline."""
        request = self.request
        return request.mode is not ResidencyMode.FULL and request.plan_source is PlanSource.MEMORY_INDEXER

    @property
    def is_full_by_room(self) -> bool:
        """Whether it is promised everything although it could page."""
        return self.room in (Room.KEPT, Room.FILLING)

    @property
    def mode_now(self) -> ResidencyMode:
        """The mode it is in, escalation included."""
        return ResidencyMode.EXACT if self.is_exact else self.request.mode

    def take_unused_grant(self) -> None:
        """The sequence ended while the arena was being asked: what came is released with the rest."""
        future, self.grant = self.grant, None
        if future is not None and future.exception() is None:
            unused = future.result()
            self.arena.empty.extend((*unused.prefix, *unused.resume_parts, *unused.empty))

    def fits_budget(self, num_candidates: int) -> bool:
        """Whether so few blocks lie outside the tail that paging could only lose."""
        return num_candidates <= self.guard.budget_blocks

    def block_key(self, block_idx: int, geometry: KvGeometry) -> bytes:
        """Plain chained key of a full block of this sequence's tokens."""
        while len(self._keys) <= block_idx:
            start = len(self._keys) * geometry.block_tokens
            parent = self._keys[-1] if self._keys else self.hasher.root
            self._keys.append(
                self.hasher.next_key(parent, self.tokens[start : start + geometry.block_tokens])
            )
        return self._keys[block_idx]

    def record_key(self, block_idx: int, geometry: KvGeometry) -> bytes:
        """Key under which a block that is finished now is published: salted once paging has touched it."""
        key = self.block_key(block_idx, geometry)
        return key if self.clean else salted_key(key, f"{self.request.request_id}/{self.incarnation}")

    def resume_part_keys(self, num_blocks: int, num_parts: int, geometry: KvGeometry) -> list[bytes]:
        """Keys of the parts of the resume record at `num_blocks` blocks."""
        last = self.block_key(num_blocks - 1, geometry)
        return [resume_key(last, part) for part in range(num_parts)]
