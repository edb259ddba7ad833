"""The loop's one way to the device, and so to the devices of all ranks.

Whatever changes device state is a command (commands.py): carried out here, and sent to the other ranks, which
carry it out in the same order. Changes of tables wait and travel with the next step, so that a commit is part
of that step's inputs on every rank. What only reads (write-back, snapshots) is rank 0's own affair: all
ranks hold the same bytes.
"""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future

import torch
from torch import Tensor

from forepage.errors import IntegrityError
from forepage.kv.resident_set import NOT_RESIDENT, ResidentSet
from forepage.model.resume import snapshot
from forepage.model.spec import ModelSpec
from forepage.model.transformer import StepOutput
from forepage.worker.commands import (
    BlockLoad,
    ClearSlot,
    Command,
    ConfirmLoads,
    DecodeStep,
    EditTable,
    Load,
    PrefillMore,
    PrefillStep,
    Restore,
    SetTable,
    Step,
    Stop,
    Table,
    decode_batch,
    encode_batch,
)
from forepage.worker.copy_engine import BlockStore
from forepage.worker.decode_graph import StepShape
from forepage.worker.host_copy import HostCopy
from forepage.worker.launched_step import DecodeRow, EagerStep, LaunchedStep
from forepage.worker.padded_decode import PaddedDecode
from forepage.worker.rank_device import LoadState, RankDevice
from forepage.worker.rank_link import RankLink
from forepage.worker.stopwatch import Stopwatch

HEARTBEAT_S = 1.0
"""Other ranks hear from rank 0 at least so often; one that hears nothing for long gives up."""


class Device:
    """Rank 0's device, leading those of the other ranks if there are any; used by the loop's thread."""

    def __init__(
        self,
        local: RankDevice,
        link: RankLink | None = None,
        *,
        num_ranks: int = 1,
        padded: PaddedDecode | None = None,
    ) -> None:
        """`padded` takes the decode steps of a device that is alone; without it each is an eager command."""
        self.local = local
        self._padded = padded
        self._last_tokens: dict[int, int] = {}
        """By slot: what the last eager step picked."""
        self._link = link
        self._num_ranks = num_ranks
        self._unsent: list[Command] = []
        self._loads: list[Future[None]] = []
        """What callers wait for, beside `local.loads`."""
        self._sent_s = time.monotonic()
        self.stopwatch = Stopwatch(local.memory.device)

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return self.local.model.spec

    @property
    def num_prefill_parts(self) -> int:
        """Of every chunk: it can be cut between any two."""
        return self.local.model.num_prefill_parts

    @property
    def description(self) -> str:
        """Where the worker computes, for people."""
        where = str(self.kind)
        return where if self._num_ranks == 1 else f"{where} and {self._num_ranks - 1} more"

    @property
    def kind(self) -> torch.device:
        """Where rank 0 computes."""
        return self.local.memory.device

    @property
    def may_run_ahead(self) -> bool:
        """Whether a step can be launched before the tokens of the last one are known, and gains by it."""
        return self._padded is not None and self.kind.type == "cuda"

    @property
    def has_graphs(self) -> bool:
        """Whether decode steps are replayed: `capture` is of use."""
        return self._padded is not None and self._padded.has_graphs

    @property
    def makes_audits(self) -> bool:
        """Whether it can look at what a step missed by itself; else the index does."""
        return self._padded is not None and self._padded.audit is not None

    def set_residency(self, slot: int, resident: ResidentSet) -> None:
        """Make attention see this set from the next step on: the commit."""
        self._do(SetTable(Table.ROWS, slot, tuple(resident.row_table())))
        self._do(SetTable(Table.KEYS, slot, tuple(resident.key_table())))

    def edit_residency(self, slot: int, rows: Mapping[int, int], keys: Mapping[int, int]) -> None:
        """The same, for the blocks that change alone: block_idx -> block id, or NOT_RESIDENT."""
        for table, ids in ((Table.ROWS, rows), (Table.KEYS, keys)):
            if ids:
                self._do(EditTable(table, slot, tuple(ids), tuple(ids.values())))

    def set_c128(self, slot: int, ids: Seq[int]) -> None:
        """The c128 blocks of a sequence, in block order."""
        self._do(SetTable(Table.C128, slot, tuple(ids)))

    def set_arena_offsets(self, slot: int, offsets: Seq[int]) -> None:
        """Where each block's record payload begins in the arena, NO_ARENA where it isn't there yet."""
        self._do(SetTable(Table.ARENA, slot, tuple(offsets)))

    def edit_arena_offsets(self, slot: int, offset_by_block: Mapping[int, int]) -> None:
        """Where the records of some blocks begin."""
        self._do(EditTable(Table.ARENA, slot, tuple(offset_by_block), tuple(offset_by_block.values())))

    def set_staging(self, slot: int, row_ids: Seq[int]) -> None:
        """Row blocks that pulled rows of this sequence go to; none: it never pulls."""
        width = self.local.memory.tables[Table.STAGING].shape[1]
        self._do(SetTable(Table.STAGING, slot, tuple(row_ids) or (NOT_RESIDENT,) * width))

    def clear_slot(self, slot: int) -> None:
        """Forget a sequence's tables and state; the next one in this slot starts from nothing."""
        self._do(ClearSlot(slot))

    def restore(self, slot: int, num_tokens: int, arena_offsets: Seq[int]) -> None:
        """Put the resume record whose parts lie there back into a slot."""
        self._do(Restore(slot, num_tokens, tuple(arena_offsets)))

    def load(self, loads: Seq[BlockLoad]) -> Future[None]:
        """Start loading; done between steps, when the bytes are on the device of every rank."""
        if self._link is None:
            return self.local.copies.load(loads)
        self._do(Load(tuple(loads)))
        future: Future[None] = Future()
        self._loads.append(future)
        return future

    def begin_prefill(
        self, slot: int, start: int, tokens: Seq[int], *, evidence_tokens: int, num_parts: int
    ) -> StepOutput | None:
        """Process consecutive tokens of one sequence, or the first parts of that; one chunk at a time.

        With the last part: the last token's output, and where some looked.
        """
        return self._step(PrefillStep(slot, start, tuple(tokens), evidence_tokens, num_parts))

    def continue_prefill(self, num_parts: int) -> StepOutput | None:
        """So many more parts of the chunk under way; its output with the last."""
        return self._step(PrefillMore(num_parts))

    def capture(self, shape: StepShape) -> None:
        """Have the graph of such decode steps before one of them comes."""
        if self._padded is not None:
            self._padded.capture(shape)

    def decode(self, rows: Seq[DecodeRow]) -> LaunchedStep:
        """Process one token of each sequence and pick the next ones."""
        if self._padded is not None:
            return self._padded.launch(rows)
        tokens = [self._last_tokens[row.slot] if row.token is None else row.token for row in rows]
        slots, positions = tuple(row.slot for row in rows), tuple(row.position for row in rows)
        output = self._step(DecodeStep(slots, positions, tuple(tokens)))
        assert output is not None
        is_cpu = self.kind.type == "cpu"
        step = EagerStep.sampled(output, rows, fallbacks=() if is_cpu else ("eager_decode",))
        self._last_tokens |= {row.slot: pick.token for row, pick in zip(rows, step.result.picks, strict=True)}
        return step

    def store(self, stores: Seq[BlockStore]) -> Future[list[int]]:
        """Start writing blocks back to the arena; done with each record's checksum."""
        return self.local.copies.store(stores)

    def put(self, arena_offset: int, payload: Tensor) -> Future[int]:
        """Write one payload (u8, host) into the arena; done with its checksum."""
        return self.local.copies.put(arena_offset, payload)

    def snapshot(self, slot: int, num_tokens: int) -> HostCopy:
        """Window and compressor state of a slot, behind the last step launched, as a resume record."""
        memory = self.local.memory
        return HostCopy.of(snapshot(memory.pools, slot, num_tokens, memory.geometry))

    def tick(self) -> None:
        """Between steps: start loads on the other ranks, and settle those that every rank has ended.

        Raises: RankLostError.
        """
        if self._link is None:
            return
        may_settle = any(load.done() for load in self.local.loads)
        is_load_unsent = any(isinstance(command, Load) for command in self._unsent)
        if may_settle:
            self._unsent.append(ConfirmLoads())
        if may_settle or is_load_unsent or time.monotonic() - self._sent_s > HEARTBEAT_S:
            self._send(self._link)
        if may_settle:
            self._settle(self._link)

    def stop_ranks(self) -> None:
        """Tell the other ranks that the worker ends; after the loop's thread has. Raises: RankLostError."""
        if self._link is not None:
            self._unsent.append(Stop())
            self._send(self._link)

    def close(self) -> None:
        """Wait for copies that were started, and end their thread."""
        self.local.copies.close()

    def _do(self, command: Command) -> None:
        if self._link is not None:
            self._unsent.append(command)
        self.local.run(command)

    def _step(self, command: Step) -> StepOutput | None:
        """The other ranks are told first: in the step they and we wait for each other."""
        if self._link is not None:
            self._unsent.append(command)
            self._send(self._link)
        return self.local.run(command)

    def _send(self, link: RankLink) -> None:
        batch, self._unsent = self._unsent, []
        link.send(encode_batch(batch))
        self._sent_s = time.monotonic()

    def _settle(self, link: RankLink) -> None:
        states = link.least([int(state) for state in self.local.load_states()])
        waiting = []
        for local, future, state in zip(self.local.loads, self._loads, states, strict=True):
            if state == LoadState.UNDER_WAY:
                waiting.append(future)
            elif state == LoadState.DONE:
                future.set_result(None)
            else:
                ours = local.exception() if local.done() else None
                future.set_exception(ours or IntegrityError("a rank could not load blocks from the arena"))
        self._loads = waiting
        self.local.settle(states)


def follow(local: RankDevice, link: RankLink) -> None:
    """What every rank but 0 does: carry out what it is sent, until it is told to stop.

    Raises: RankLostError when rank 0 is gone.
    """
    with torch.inference_mode():
        while True:
            for command in decode_batch(link.receive()):
                if isinstance(command, Stop):
                    return
                if isinstance(command, ConfirmLoads):
                    local.settle(link.least([int(state) for state in local.load_states()]))
                else:
                    local.run(command)
