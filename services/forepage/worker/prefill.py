"""Prefills prompts chunk by chunk, always over the full native selection; paging begins when it ends.

Chunks end at multiples of the chunk size and at the points where resume records are taken, so that a
request that resumes there computes the rest in the same pieces. The prompt's tail is always computed: where
its tokens look is what the first plans keep (model/prompt_evidence.py).
"""

from dataclasses import dataclass

import torch

from forepage.settings import WorkerSettings
from forepage.telemetry import SpanName, set_attributes
from forepage.worker.parts import WorkerParts
from forepage.worker.sequence import Sequence, StepTap
from forepage.worker.write_back import WriteBack


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
    def of(cls, prompt_tokens: int, settings: WorkerSettings, block: int) -> "ChunkRule":
        """The settings' rule for a prompt."""
        tail = max(1, settings.prompt_tokens)
        return cls(prompt_tokens, settings.prefill_chunk_tokens, settings.resume_every_tokens, block, tail)

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


class Prefill:
    """Runs one chunk at a time of one sequence."""

    def __init__(self, parts: WorkerParts, write_back: WriteBack) -> None:
        self._parts = parts
        self._write_back = write_back

    def step(self, sequence: Sequence) -> PrefillEnd | None:
        """One chunk; the end of the prompt gives its logits and taps."""
        parts, settings = self._parts, self._parts.settings
        if sequence.stage_span is None:
            sequence.stage_span = parts.telemetry.start_span(SpanName.WORKER_PREFILL, sequence.span)
        block, prompt = parts.geometry.block_tokens, len(sequence.request.prompt)
        start = sequence.num_processed
        rule = ChunkRule.of(prompt, settings, block)
        end = rule.next_end(start)
        self._grow(sequence, end)
        asked = end - max(start, prompt - settings.prompt_tokens) if sequence.uses_prompt_evidence else 0
        output = parts.device.prefill(
            sequence.holds.slot, start, sequence.tokens[start:end], evidence_tokens=max(0, asked)
        )
        if output.prompt_evidence is not None:
            sequence.lookahead.add_prompt_evidence(output.prompt_evidence.tolist())
        sequence.num_processed = end
        self._write_back.store_finished(sequence)
        if rule.is_resume_point(end):
            self._write_back.take_snapshot(sequence)
            self._write_back.store_resume(sequence)
        if end < prompt:
            return None
        sequence.report.workspace_blocks = sequence.resident.num_resident
        set_attributes(sequence.stage_span, input_tokens=prompt, cached_tokens=sequence.cached_tokens)
        sequence.stage_span.end()
        sequence.stage_span = None
        tap = StepTap(output.hidden[0], output.indexer, 0)
        if sequence.report.reads is not None:
            sequence.report.reads.add_step(tap.indexer, tap.row)
        return PrefillEnd(output.logits, tap)

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Blocks for every token up to `num_tokens`; all of them were promised."""
        blocks, resident = self._parts.blocks, sequence.resident
        missing = self._parts.geometry.num_blocks(num_tokens) - resident.num_blocks
        if missing <= 0:
            return
        for row_id, key_id in zip(blocks.rows.allocate(missing), blocks.keys.allocate(missing), strict=True):
            resident.append(row_id, key_id)
        self._parts.device.set_residency(sequence.holds.slot, resident)
