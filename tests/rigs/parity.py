"""Our transformer beside the oracle on one text: what is run, and how far its logits are from the oracle's.

`test_model_parity` asserts what `parity_table` prints: both take SUBJECTS and CASES from here. Pools start
as NaN everywhere, so a read of a place that nothing was stored in fails every case.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.kv_pools import NAN_BYTE, DecodeBatch, KvPools, PoolCapacity, PrefillChunk
from forepage.model.spec import ModelSpec
from forepage.model.transformer import Transformer
from forepage.model.weights import seeded_weights
from rigs.parity_configs import FLASH, MIXED, PRO, SLIM
from rigs.parity_oracle import run_oracle
from rigs.tie_breaker import TieBreaker

CPU = torch.device("cpu")
ATOL = 2e-5
"""Largest difference of a logit of unit scale; the oracle's own paths differ by up to 7e-6."""
NUM_TOKENS = 700
LONG_TOKENS = 4096
EDGES = (*range(1, 20), 63, 64, 65, *range(126, 133), *range(255, 259))
STEPS_PAST_EDGE = 6
STEPS = 262
"""Past the second block boundary, where tokens are taken one by one."""
SEED = 9


@dataclass(frozen=True)
class Subject:
    """Our model, one text, and the oracle's logits f32 [S, vocab] and choices, in `ties`, for all of it."""

    transformer: Transformer
    tokens: Tensor
    expected: Tensor
    ties: TieBreaker

    @classmethod
    def build(cls, config: dict[str, object], num_tokens: int) -> "Subject":
        """The same seeded weights for both sides; the oracle runs once."""
        spec = ModelSpec.from_config(config)
        weights = seeded_weights(spec, SEED, dtype=torch.float32, device=CPU)
        geometry = KvGeometry.from_config(config, KvFormat.FP32)
        tokens = torch.randint(spec.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(SEED))
        run = run_oracle(config, weights, tokens)
        transformer = Transformer(spec, geometry, weights, CPU)
        return cls(transformer, tokens, run.logits, TieBreaker(run.choices, run.routing))

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return self.tokens.shape[0]

    def difference(self, logits: Tensor, positions: Tensor | slice) -> float:
        """Largest difference from the oracle's at these positions; NaN if any logit is."""
        return float((logits - self.expected[positions]).abs().max())


class Sequences:
    """Several sequences of a subject's text in pools of their own, every block at a place of its own."""

    def __init__(self, subject: Subject, count: int, num_tokens: int) -> None:
        geometry, topk = subject.transformer.geometry, subject.transformer.spec.index_topk
        blocks, staging = geometry.num_blocks(num_tokens), -(-topk // geometry.block_entries)
        capacity = PoolCapacity(
            count,
            row_blocks=count * (blocks + staging),
            key_blocks=count * blocks,
            c128_blocks=count * blocks,
        )
        self.subject = subject
        self.pools = KvPools.poisoned(geometry, capacity, CPU)
        # In reverse, so that a block's place says nothing about its order.
        self.table = torch.arange(count * blocks, dtype=torch.int32).flip(0).view(count, blocks)
        self.row_table = self.table.clone()
        self.staging = count * blocks + torch.arange(count * staging).view(count, staging)
        self.arena_offsets = torch.full(self.table.shape, -1)
        self.arena: Tensor | None = None
        self.pulled_rows = 0

    def prefill(self, sequence: int, num_tokens: int, chunk: int | None = None) -> float:
        """Take the text's first tokens, chunk by chunk; the largest difference of any token."""
        subject, table, worst = self.subject, self.table[sequence], 0.0
        size = chunk or num_tokens
        for start in range(0, num_tokens, size):
            end = min(start + size, num_tokens)
            subject.ties.positions = torch.arange(start, end)
            place = PrefillChunk(sequence, start, table, table, table)
            output = subject.transformer.prefill(
                subject.tokens[start:end], place, self.pools, all_logits=True
            )
            worst = _worse(worst, subject.difference(output.logits, slice(start, end)))
        return worst

    def decode(self, positions: Tensor) -> float:
        """Process the text's token at each sequence's position; the largest difference."""
        subject = self.subject
        batch = DecodeBatch(
            slots=torch.arange(positions.shape[0]),
            positions=positions,
            row_table=self.row_table,
            key_table=self.table,
            c128_table=self.table,
            staging=self.staging,
            arena_offsets=self.arena_offsets,
        )
        subject.ties.positions = positions
        output = subject.transformer.decode(subject.tokens[positions], batch, self.pools, self.arena)
        assert not output.unserved_rows.any()
        self.pulled_rows += int(output.pulled_rows.sum())
        return subject.difference(output.logits, positions)

    def evict(self, sequence: int, num_tokens: int) -> None:
        """Move every closed row block of a sequence to the arena; its place in the pool becomes NaN."""
        geometry = self.subject.transformer.geometry
        if self.arena is None:
            self.arena = torch.full((self.table.numel() * geometry.slot_bytes,), NAN_BYTE, dtype=torch.uint8)
        for block in range(num_tokens // geometry.block_tokens):
            block_id = int(self.row_table[sequence, block])
            offset = (sequence * self.table.shape[1] + block) * geometry.slot_bytes
            self.arena[offset : offset + geometry.rows_bytes] = self.pools.rows[block_id]
            self.pools.rows[block_id] = NAN_BYTE
            self.row_table[sequence, block] = -1
            self.arena_offsets[sequence, block] = offset


def prefill(subject: Subject, *, chunk: int | None = None) -> float:
    """The whole text."""
    return Sequences(subject, 1, subject.num_tokens).prefill(0, subject.num_tokens, chunk)


def prefill_start(subject: Subject, *, chunk: int) -> float:
    """The first STEPS chunks of the text."""
    return Sequences(subject, 1, STEPS * chunk).prefill(0, STEPS * chunk, chunk)


def edges(subject: Subject) -> float:
    """Prefill each edge length at once, then decode past it, all lengths in one batch."""
    sequences = Sequences(subject, len(EDGES), max(EDGES) + STEPS_PAST_EDGE)
    worst = 0.0
    for sequence, length in enumerate(EDGES):
        worst = _worse(worst, sequences.prefill(sequence, length))
    for step in range(STEPS_PAST_EDGE):
        worst = _worse(worst, sequences.decode(torch.tensor(EDGES) + step))
    return worst


def decode_all(subject: Subject, *, steps: int | None = None) -> float:
    """No prefill at all: all of the text, or its first tokens, one by one."""
    num_tokens = steps or subject.num_tokens
    sequences = Sequences(subject, 1, num_tokens)
    worst = 0.0
    for position in range(num_tokens):
        worst = _worse(worst, sequences.decode(torch.tensor([position])))
    return worst


def decode_from(subject: Subject, *, prompts: tuple[int, ...], steps: int, paged: bool) -> float:
    """Prefill each prompt, then decode them as one batch; paged: every closed row block is in the arena."""
    sequences = Sequences(subject, len(prompts), max(prompts) + steps)
    for sequence, prompt in enumerate(prompts):
        sequences.prefill(sequence, prompt, 256)
        if paged:
            sequences.evict(sequence, prompt)
    worst = 0.0
    for step in range(steps):
        worst = _worse(worst, sequences.decode(torch.tensor(prompts) + step))
    assert (sequences.pulled_rows > 0) == paged
    return worst


@dataclass(frozen=True)
class Case:
    """One way to run a text; `run` gives the largest difference from the oracle."""

    id: str
    run: Callable[[Subject], float]

    def measure(self, subject: Subject) -> tuple[float, TieBreaker]:
        """Largest difference of any logit, and what was left to the tie rule."""
        ties = TieBreaker(subject.ties.choices, subject.ties.routing)
        with torch.inference_mode(), ties.installed():
            return self.run(replace(subject, ties=ties)), ties


AT_ONCE = Case("prefill at once", prefill)
CHUNKED = [Case(f"prefill in chunks of {n}", partial(prefill, chunk=n)) for n in (1, 7, 64, 100, 128, 256)]
PROMPTS = (1, 255, 511, 600)
CASES = [
    AT_ONCE,
    *CHUNKED[1:],
    Case(f"{len(EDGES)} edge lengths + {STEPS_PAST_EDGE} decoded", edges),
    Case("decode in a batch, full", partial(decode_from, prompts=PROMPTS, steps=40, paged=False)),
    Case("decode in a batch, exact", partial(decode_from, prompts=PROMPTS[2:], steps=40, paged=True)),
]
ONE_BY_ONE = Case(f"prefill of {STEPS} tokens in chunks of 1", partial(prefill_start, chunk=1))
STEPWISE = Case(f"decode of {STEPS} tokens from the first", partial(decode_all, steps=STEPS))
LAST = LONG_TOKENS - 16
LONG_CASES = [
    AT_ONCE,
    *CHUNKED[3:],
    Case("decode at the end, full", partial(decode_from, prompts=(LAST,), steps=16, paged=False)),
    Case("decode at the end, exact", partial(decode_from, prompts=(LAST,), steps=16, paged=True)),
]
SLIM_CASES = [*CHUNKED[:3], Case("decode of every token", decode_all)]


@dataclass(frozen=True)
class SubjectCase:
    """A config and a text; `index_topk` below a quarter of the text makes the indexers choose."""

    id: str
    config: dict[str, object]
    index_topk: int
    cases: list[Case]
    num_tokens: int = NUM_TOKENS

    def build(self) -> Subject:
        """Run the oracle."""
        return Subject.build(self.config | {"index_topk": self.index_topk}, self.num_tokens)


SUBJECTS = [
    SubjectCase("mixed", MIXED, 256, [*CASES, ONE_BY_ONE]),
    SubjectCase("mixed, top 32", MIXED, 32, [*CASES, STEPWISE]),
    SubjectCase("flash", FLASH, 256, [*CASES, STEPWISE]),
    SubjectCase("flash, top 32", FLASH, 32, [*CASES, ONE_BY_ONE]),
    SubjectCase("pro", PRO, 256, [*CASES, ONE_BY_ONE]),
    SubjectCase("pro, top 32", PRO, 32, [*CASES, STEPWISE]),
    SubjectCase("mixed, 4,096 tokens", MIXED, 1024, LONG_CASES, LONG_TOKENS),
    SubjectCase("mixed, 4,096 tokens, top 64", MIXED, 64, LONG_CASES[:1] + LONG_CASES[4:], LONG_TOKENS),
    SubjectCase("slim, 4,096 tokens, top 64", SLIM, 64, SLIM_CASES, LONG_TOKENS),
]


def _worse(worst: float, difference: float) -> float:
    """The larger one; a NaN stays."""
    return difference if difference > worst or math.isnan(difference) else worst
