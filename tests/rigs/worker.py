"""A worker without processes: the real loop, model and pools, an arena in memory and a scripted index.

The test drives the loop turn by turn, so every order of events can be made to happen.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from forepage.kv.prefix_hash import PrefixHasher
from forepage.model.kv_pools import NAN_BYTE, KvPools
from forepage.model.rank_group import RankGroup
from forepage.rpc import index_pb2
from forepage.rpc import worker_pb2 as pb
from forepage.settings import (
    SEEDED_MODEL,
    ModelSettings,
    ResidencyMode,
    Settings,
    WeightDtype,
    WorkerSettings,
)
from forepage.telemetry import SpanName, Telemetry, open_telemetry
from forepage.worker.assembly import ModelFolder, assemble, assemble_rank
from forepage.worker.device import Device
from forepage.worker.device_audit import DeviceAudit
from forepage.worker.loop import Loop
from forepage.worker.padded_decode import PaddedDecode
from forepage.worker.parts import WorkerParts
from forepage.worker.rank_device import RankDevice
from forepage.worker.request import Request
from forepage.worker.sampler import Sampling
from forepage.worker.sequence import Sequence
from rigs.memory_arena import MemoryArena
from rigs.ranks import following_threads

TURNS = 20_000


@dataclass
class ScriptedIndex:
    """An IndexPort: keeps the questions, answers when the test says so (or at once with `auto`)."""

    is_up: bool = True
    auto: Callable[[index_pb2.LookaheadRequest], index_pb2.LookaheadReply | None] | None = None
    questions: list[index_pb2.LookaheadRequest] = field(default_factory=list)
    deliver: Callable[[index_pb2.LookaheadReply], None] | None = None

    def ask(self, request: index_pb2.LookaheadRequest) -> bool:
        if not self.is_up:
            return False
        self.questions.append(request)
        reply = self.auto(request) if self.auto is not None else None
        if reply is not None:
            self.answer(reply)
        return True

    def answer(self, reply: index_pb2.LookaheadReply) -> None:
        """Deliver a reply."""
        assert self.deliver is not None
        self.deliver(reply)


def plan_reply(
    request: index_pb2.LookaheadRequest, blocks: Seq[int], *, recall: float = 1.0, missing: Seq[int] = ()
) -> index_pb2.LookaheadReply:
    """These blocks by falling score; every audit asked says `recall` of 20 evidence entries."""
    reply = index_pb2.LookaheadReply(request_id=request.request_id, stamp=request.stamp)
    if request.HasField("predict"):
        reply.plan.block_idx.extend(blocks)
        reply.plan.score.extend(1.0 - place / 1000 for place in range(len(blocks)))
    for audit in request.audits:
        reply.audits.add(
            layer_idx=audit.layer_idx,
            position=audit.position,
            num_evidence=20,
            num_evidence_resident=round(20 * recall),
            missed_mass=1 - recall,
            recall_at_k=recall,
            missing_block_idx=missing,
            missing_mass=[0.1] * len(missing),
        )
    return reply


@dataclass
class Running:
    """A submitted request and what it said."""

    sequence: Sequence
    events: list[pb.GenerateEvent]

    @property
    def tokens(self) -> list[int]:
        """Generated so far."""
        return [token for event in self.events for token in event.tokens.token_ids]

    @property
    def finished(self) -> pb.Finished | None:
        """The end, if it ended well."""
        return next((e.finished for e in self.events if e.HasField("finished")), None)

    @property
    def failed(self) -> pb.Failed | None:
        """The typed error, if it ended in one."""
        return next((e.failed for e in self.events if e.HasField("failed")), None)

    @property
    def is_over(self) -> bool:
        """Whether the stream has ended."""
        return self.finished is not None or self.failed is not None

    @property
    def report(self) -> pb.ResidencyReport:
        """usage.forepage of a finished request."""
        assert self.finished is not None, self.failed
        return self.finished.residency


class WorkerRig:
    """The loop and its fakes."""

    def __init__(
        self, parts: WorkerParts, arena: MemoryArena, index: ScriptedIndex, followers: Seq[RankDevice] = ()
    ) -> None:
        self.parts = parts
        self.ranks = [parts.device.local, *followers]
        self.arena, self.index = arena, index
        self.fingerprint = "rig"  # the model's, in the keys of what is submitted from now on
        self.loop = Loop(parts, arena.payloads)
        index.deliver = self.loop.take_reply

    def submit(
        self,
        prompt: Seq[int],
        *,
        mode: ResidencyMode = ResidencyMode.FULL,
        max_tokens: int = 8,
        budget_blocks: int = 2,
        sampling: Sampling | None = None,
        salt: str = "",
        name: str = "r",
        audit: bool = False,
        asks_to_page: bool = False,
        reads: bool = False,
    ) -> Running:
        """Queue a request."""
        request = Request(
            request_id=name,
            prompt=tuple(prompt),
            sampling=sampling or Sampling(0.0, 1.0, 0, 0.0, 0),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(),
            mode=mode,
            min_recall=0.95,
            budget_blocks=budget_blocks,
            cache_salt=salt,
            audit=audit,
            asks_to_page=asks_to_page,
            reads=reads,
        )
        return self.submit_request(request)

    def submit_request(self, request: Request) -> Running:
        """Queue a request as it is."""
        events: list[pb.GenerateEvent] = []
        sequence = Sequence.start(
            request,
            emit=events.append,
            span=self.parts.telemetry.start_span(SpanName.WORKER_GENERATE),
            hasher=PrefixHasher(self.fingerprint, self.parts.geometry.block_tokens, request.cache_salt),
            settings=self.parts.settings,
        )
        self.loop.submit(sequence)
        return Running(sequence, events)

    def settle_copies(self) -> None:
        """Until every copy that any rank was asked for is over, so that a run can be repeated exactly."""
        for rank in self.ranks:
            rank.copies._executor.submit(int).result()

    def run_until(self, condition: Callable[[], bool], *, in_step: bool = False) -> None:
        """Turn the loop until the condition holds; every law is checked on the way.

        `in_step`: copies never overlap turns.
        """
        with torch.inference_mode():
            for _ in range(TURNS):
                if condition():
                    return
                if in_step:
                    self.settle_copies()
                self.loop.turn()
                self.parts.blocks.check_integrity()
        raise AssertionError(f"not within {TURNS} turns")

    def run(self, *running: Running) -> None:
        """Until these are over and everything they held is back."""
        self.run_until(lambda: all(one.is_over for one in running))
        self.run_until(lambda: self.loop.num_sequences == 0)

    def check_baseline(self) -> None:
        """Nothing is held on the device or leased in the arena."""
        self.parts.blocks.check_idle()
        assert self.arena.num_leases == 0


@contextmanager
def worker_rig(
    *,
    key_format: str = "fp8",
    kv_format: str = "fp8",
    weight_dtype: WeightDtype = WeightDtype.FP32,
    num_ranks: int = 1,
    padded: bool = False,
    audits_on_device: bool = False,
    device_name: str = "cpu",
    model_path: Path = SEEDED_MODEL,
    arena_slots: int = 200,
    arena: MemoryArena | None = None,
    metrics: InMemoryMetricReader | None = None,
    **changes: Any,
) -> Iterator[WorkerRig]:
    """A rig with small pools; `changes` go to WorkerSettings. Ranks other than 0 are threads.

    `arena` is one that outlives the rig, as an arena outlives a worker.
    `padded`: decode steps go through static buffers, as on a GPU; `audits_on_device`: so do audits.
    """
    defaults: dict[str, Any] = {
        "recent_tokens": 256,
        "early_audit_steps": 0,  # audited at boundaries and at random, unless a test is about the first steps
        "prompt_tokens": 0,  # plans are what the scripted index says, unless a test is about the others
        "interval_steps": 16,
        "kv_bytes": 16 << 20,
        "max_running": 4,
        "load_slack_blocks": 4,
        "load_lent_blocks": 0,  # changes come in waves of what is promised, unless a test is about loans
        "full_share": 0.0,  # sequences page although there is room, unless a test is about that
        "prefill_chunk_tokens": 512,
        "prefill_share": 1.0,  # chunks at once: which turn does what is then no matter of time
        "admission_timeout_s": 5.0,
        "escalation_reserve_bytes": 1 << 20,
    }
    model = ModelSettings(
        path=model_path,
        key_format=key_format,
        kv_format=kv_format,
        weight_dtype=weight_dtype,
        device=device_name,
    )
    settings = Settings(worker=WorkerSettings(**{**defaults, **changes}), model=model)
    folder, device = ModelFolder.read(settings.model), torch.device(device_name)
    if arena is None:
        arena = MemoryArena(folder.geometry, num_slots=arena_slots, is_pinned=device.type == "cuda")
    index = ScriptedIndex()
    readers = [] if metrics is None else [metrics]
    telemetry: Telemetry = open_telemetry("rig", instance_id="rig", metric_readers=readers)

    def follower(ranks: RankGroup) -> RankDevice:
        return _poisoned(assemble_rank(settings.worker, folder, device, arena.payloads, ranks=ranks))

    with following_threads(num_ranks, follower) as (ranks, followers):
        parts = assemble(
            settings,
            folder,
            device,
            arena.payloads,
            arena_port=arena,
            index=index,
            telemetry=telemetry,
            ranks=ranks,
        )
        local = _poisoned(parts.device.local)
        if device.type == "cpu" and num_ranks == 1:
            rows = settings.worker.max_running
            audit = DeviceAudit(local.memory, arena.payloads, topk=parts.topk) if audits_on_device else None
            steps = PaddedDecode(local, max_rows=rows, max_graphs=0, telemetry=telemetry, audit=audit)
            parts = replace(parts, device=Device(local, padded=steps if padded else None))
        try:
            yield WorkerRig(parts, arena, index, followers)
        finally:
            parts.device.close()
            telemetry.close()


def _poisoned(rank: RankDevice) -> RankDevice:
    """What nobody wrote must never be read: every byte is NaN, and the same on every rank."""
    for item in fields(KvPools):
        getattr(rank.memory.pools, item.name).view(torch.uint8).fill_(NAN_BYTE)
    return rank


def text_tokens(count: int, seed: int = 0) -> list[int]:
    """Bytes that look like text: words from a small vocabulary, so that positions repeat."""
    generator = torch.Generator().manual_seed(seed)
    words = ["the", "page", "ahead", "of", "need", "block", "row", "key", "is", "read", "\n"]
    picks = torch.randint(0, len(words), (count,), generator=generator).tolist()
    return list(" ".join(words[pick] for pick in picks).encode()[:count])


def wants(*blocks: int, recall: float = 1.0) -> Callable[[index_pb2.LookaheadRequest], Any]:
    """An index that always wants these blocks."""
    return lambda request: plan_reply(request, blocks, recall=recall)


def decode_until(rig: WorkerRig, running: Running, num_tokens: int) -> None:
    """Turn until so many tokens were generated."""
    rig.run_until(lambda: len(running.tokens) >= num_tokens)
