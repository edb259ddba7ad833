"""One decode step for every sequence that can take one: compute, sample, account, write back."""

from collections.abc import Sequence as Seq

from forepage.errors import ForepageError, IntegrityError
from forepage.telemetry import MetricName
from forepage.worker.lookahead import Lookahead
from forepage.worker.parts import WorkerParts
from forepage.worker.quota import held_quota
from forepage.worker.sampler import Pick, sample
from forepage.worker.sequence import Sequence, StepTap
from forepage.worker.write_back import WriteBack


class Decode:
    """Steps a batch; the tokens it returns are for the loop to emit."""

    def __init__(self, parts: WorkerParts, lookahead: Lookahead, write_back: WriteBack) -> None:
        self._parts = parts
        self._lookahead = lookahead
        self._write_back = write_back

    def can_grow(self, sequence: Sequence) -> bool:
        """Whether the block of the next token is there, or can be taken from what was promised."""
        if sequence.num_processed % self._parts.geometry.block_tokens:
            return True
        holds, held = sequence.holds, held_quota(self._parts, sequence)
        return held.rows < holds.row_promise and held.keys < holds.key_promise

    def step(self, batch: Seq[Sequence]) -> list[Pick]:
        """Process each sequence's newest token; the next tokens picked, in order."""
        parts = self._parts
        for sequence in batch:
            self._grow(sequence)
            self._account(sequence)
        output = parts.device.decode(
            slots=[sequence.holds.slot for sequence in batch],
            positions=[sequence.num_processed for sequence in batch],
            tokens=[sequence.tokens[-1] for sequence in batch],
        )
        picks = sample(output.logits, [s.sampling_row(s.num_processed + 1) for s in batch])
        pulled, unserved = output.pulled_rows.tolist(), output.unserved_rows.tolist()
        if any(unserved):
            raise IntegrityError(f"{sum(unserved)} selected rows were neither resident nor pulled")
        for row, sequence in enumerate(batch):
            sequence.num_processed += 1
            demand_bytes = pulled[row] * parts.geometry.row_bytes
            sequence.report.demand_bytes += demand_bytes
            if demand_bytes:
                parts.telemetry.count(MetricName.DEMAND_BYTES, demand_bytes)
            self._finish_block(sequence)
            self._look_ahead(sequence, StepTap(output.hidden[row], output.indexer, row))
        return picks

    def _look_ahead(self, sequence: Sequence, tap: StepTap) -> None:
        """A step whose scores can't be audited (not finite) ends its own request, not the worker."""
        try:
            self._lookahead.after_step(sequence, tap)
        except IntegrityError:
            raise
        except ForepageError as error:
            sequence.failure = ForepageError(f"this request's scores can't be audited: {error}")

    def _grow(self, sequence: Sequence) -> None:
        resident, blocks = sequence.resident, self._parts.blocks
        if sequence.num_processed // self._parts.geometry.block_tokens < resident.num_blocks:
            return
        resident.append(blocks.rows.allocate(1)[0], blocks.keys.allocate(1)[0])
        self._parts.device.set_residency(sequence.holds.slot, resident)

    def _account(self, sequence: Sequence) -> None:
        """What this step will see. Once a key is absent the sequence's own blocks are no longer clean."""
        resident, load = sequence.resident, sequence.lookahead.load
        sequence.clean &= resident.keys_complete
        in_flight = max(len(load.row_ids), len(load.key_ids)) if load else 0
        sequence.report.add_step(
            resident,
            self._parts.geometry,
            staging_blocks=len(sequence.holds.staging_ids),
            in_flight=in_flight,
            budget=sequence.guard.budget_blocks,
        )

    def _finish_block(self, sequence: Sequence) -> None:
        if sequence.num_processed % self._parts.geometry.block_tokens == 0:
            self._write_back.store_finished(sequence)
            self._write_back.take_snapshot(sequence)
