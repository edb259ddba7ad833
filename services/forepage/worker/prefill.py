"""Prefills prompts chunk by chunk, always over the full native selection; paging begins when it ends.

Chunks end at multiples of the chunk size and at the points where resume records are taken, so that a
request that resumes there computes the rest in the same pieces. The prompt's tail is always computed: where
its tokens look is what the first plans keep (model/prompt_evidence.py).
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import torch

from forepage.model.transformer import StepOutput
from forepage.telemetry import MetricName, SpanName, set_attributes
from forepage.worker.pace import Pace
from forepage.worker.parts import WorkerParts
from forepage.worker.sequence import Phase, Sequence, StepTap
from forepage.worker.write_back import WriteBack

MOST_OVERTAKEN = 3
"""Chunks of other prompts between two of the one that came first."""


@dataclass(frozen=True)
class PrefillEnd:
    """The prompt is processed: the last token's logits f32 [1, V], and what the first plan is asked with."""

    logits: torch.Tensor
    tap: StepTap


@dataclass(frozen=True)
class ChunkRule:
    """Where chunks of one prompt end; its last `tail` tokens, at least one, lie behind every resume point."""

    prompt_tokens: int
    chunk: int
    resume_every: int
    block: int
    tail: int

    @classmethod
    def of(cls, prompt_tokens: int, parts: WorkerParts) -> "ChunkRule":
        """The worker's rule for a prompt."""
        settings, block = parts.settings, parts.geometry.block_tokens
        tail = max(1, settings.prompt_tokens)
        return cls(prompt_tokens, parts.prefill_chunk, settings.resume_every_tokens, block, tail)

    @property
    def last_point(self) -> int:
        """The last block boundary that leaves the tail to compute."""
        return max(0, self.prompt_tokens - self.tail) // self.block * self.block

    def next_end(self, start: int) -> int:
        """Where the chunk that begins at `start` ends: aligned, and at each resume point on the way."""
        end = min((start // self.chunk + 1) * self.chunk, self.prompt_tokens)
        points = [self.last_point, (start // self.resume_every + 1) * self.resume_every]
        return min([end, *(point for point in points if start < point < end)])

    def is_resume_point(self, num_tokens: int) -> bool:
        """Whether a resume record is taken there: every 16,384 tokens and before the prompt's tail."""
        if num_tokens == 0 or num_tokens % self.block:
            return False
        return num_tokens % self.resume_every == 0 or num_tokens == self.last_point


def next_prompt(waiting: Seq[Sequence], *, num_overtaken: int) -> Sequence:
    """Whose chunk comes next: the shortest rest of a prompt, and every fourth time the one that came first.

    So a short question does not wait for the million tokens of another, and those get on at a quarter of the
    speed at least. Priorities are for admission: a prompt that has begun holds memory, and should end.
    """
    if num_overtaken >= MOST_OVERTAKEN:
        return min(waiting, key=lambda one: one.arrived_s)
    return min(waiting, key=lambda one: (len(one.request.prompt) - one.num_processed, one.arrived_s))


@dataclass
class _Chunk:
    """A chunk under way: tokens start..end-1 of a sequence, and how many of its parts are done."""

    sequence: Sequence
    start: int
    end: int
    parts_done: int = 0


class Prefill:
    """Owner of the chunk under way. Beside decode steps a chunk is done in slices, as the pace allows."""

    def __init__(self, parts: WorkerParts, write_back: WriteBack, pace: Pace) -> None:
        self._parts = parts
        self._write_back = write_back
        self._pace = pace
        self._chunk: _Chunk | None = None
        self._num_overtaken = 0
        """Chunks in a row that were not of the prompt that came first."""
        self._first: Sequence | None = None

    def choose(self, sequences: Iterable[Sequence]) -> Sequence | None:
        """Whose turn it is: the one whose chunk is under way, else as `next_prompt` says."""
        if self._chunk is not None and self._chunk.sequence.phase is Phase.PREFILL:
            return self._chunk.sequence
        waiting = [sequence for sequence in sequences if sequence.phase is Phase.PREFILL]
        self._first = min(waiting, key=lambda one: one.arrived_s, default=None)
        return next_prompt(waiting, num_overtaken=self._num_overtaken) if waiting else None

    def step(self, sequence: Sequence, *, beside_decode: bool) -> PrefillEnd | None:
        """A chunk, or beside decode steps a slice; the end of the prompt gives its logits and taps."""
        if sequence.stage_span is None:
            sequence.stage_span = self._parts.telemetry.start_span(SpanName.WORKER_PREFILL, sequence.span)
        if self._chunk is None or self._chunk.sequence is not sequence:
            rule = self._rule(sequence)
            self._num_overtaken = 0 if sequence is self._first else self._num_overtaken + 1
            self._chunk = _Chunk(sequence, sequence.num_processed, rule.next_end(sequence.num_processed))
        chunk = self._chunk
        output = self._advance(chunk, beside_decode=beside_decode)
        if output is None:
            return None
        self._chunk = None
        return self._end_of_chunk(sequence, chunk.end, output)

    def _advance(self, chunk: _Chunk, *, beside_decode: bool) -> StepOutput | None:
        """The next parts; the chunk's output with the last."""
        device, pace, sequence = self._parts.device, self._pace, chunk.sequence
        num_tokens, first = chunk.end - chunk.start, chunk.parts_done
        device.stopwatch.settle()
        count = pace.next_parts(num_tokens, first, beside_decode=beside_decode)
        chunk.parts_done += count
        if first == 0:
            self._grow(sequence, chunk.end)
        with device.stopwatch.time(partial(pace.saw_parts, num_tokens, first, count)):
            if first:
                return device.continue_prefill(count)
            tail_start = len(sequence.request.prompt) - self._parts.settings.prompt_tokens
            asked = chunk.end - max(chunk.start, tail_start) if sequence.uses_prompt_evidence else 0
            return device.begin_prefill(
                sequence.holds.slot,
                chunk.start,
                sequence.tokens[chunk.start : chunk.end],
                evidence_tokens=max(0, asked),
                num_parts=count,
            )

    def _end_of_chunk(self, sequence: Sequence, end: int, output: StepOutput) -> PrefillEnd | None:
        """Account for it, and write its finished blocks back."""
        prompt = len(sequence.request.prompt)
        if output.prompt_evidence is not None:
            sequence.lookahead.add_prompt_evidence(output.prompt_evidence.tolist())
        self._parts.telemetry.count(MetricName.PREFILL_TOKENS, end - sequence.num_processed)
        sequence.num_processed = end
        self._write_back.store_finished(sequence)
        if self._rule(sequence).is_resume_point(end):
            self._write_back.take_snapshot(sequence)
            self._write_back.store_resume(sequence)
        if end < prompt:
            return None
        sequence.report.workspace_blocks = sequence.resident.num_resident
        if sequence.stage_span is not None:
            set_attributes(sequence.stage_span, input_tokens=prompt, cached_tokens=sequence.cached_tokens)
            sequence.stage_span.end()
            sequence.stage_span = None
        tap = StepTap(output.hidden[0], output.indexer, 0)
        if sequence.report.reads is not None:
            sequence.report.reads.add_step(tap.indexer, tap.row)
        return PrefillEnd(output.logits, tap)

    def _rule(self, sequence: Sequence) -> ChunkRule:
        return ChunkRule.of(len(sequence.request.prompt), self._parts)

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Blocks for every token up to `num_tokens`; all of them were promised."""
        blocks, resident = self._parts.blocks, sequence.resident
        missing = self._parts.geometry.num_blocks(num_tokens) - resident.num_blocks
        if missing <= 0:
            return
        for row_id, key_id in zip(blocks.rows.allocate(missing), blocks.keys.allocate(missing), strict=True):
            resident.append(row_id, key_id)
        self._parts.device.set_residency(sequence.holds.slot, resident)
