"""One rank's device: model, KV memory, copies. Carries out commands; every rank has one, rank 0 too."""

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from enum import IntEnum

import torch
from torch import Tensor

from forepage.model.kv_pools import DecodeBatch
from forepage.model.resume import restore
from forepage.model.transformer import PrefillParts, StepOutput, Transformer, advance_prefill
from forepage.worker.commands import (
    ClearSlot,
    Command,
    DecodeStep,
    EditTable,
    Load,
    PrefillMore,
    PrefillStep,
    Restore,
    SetTable,
)
from forepage.worker.copy_engine import CopyEngine
from forepage.worker.kv_memory import KvMemory


class LoadState(IntEnum):
    """How far a load is; of several ranks the least counts."""

    FAILED = -1
    UNDER_WAY = 0
    DONE = 1


class RankDevice:
    """Law: what a rank's device holds depends on nothing but the commands it carried out, and the arena."""

    def __init__(self, model: Transformer, memory: KvMemory, copies: CopyEngine, arena: Tensor) -> None:
        """`arena` is the mapped payload area, u8."""
        self.model = model
        self.memory = memory
        self.copies = copies
        self._arena = arena
        self.loads: list[Future[None]] = []
        """Started and not yet settled with the other ranks, in the order of their commands."""
        self._chunk: PrefillParts | None = None
        """The prefill chunk under way, of the sequence in `_chunk_slot`."""
        self._chunk_slot: int | None = None

    @property
    def has_chunk(self) -> bool:
        """Whether a prefill chunk is under way: begun, and not all of its parts done."""
        return self._chunk is not None

    def run(self, command: Command) -> StepOutput | None:
        """Carry out one command; a step gives its output (a prefill with its last part), a load starts."""
        match command:
            case SetTable():
                self.memory.set_table(command.table, command.slot, command.values)
            case EditTable():
                self.memory.edit_table(command.table, command.slot, command.places, command.values)
            case ClearSlot():
                self.memory.clear_slot(command.slot)
                if command.slot == self._chunk_slot:
                    self._chunk = self._chunk_slot = None
            case Load():
                self.loads.append(self.copies.load(command.loads))
            case Restore():
                self._restore(command)
            case PrefillStep():
                self._begin_prefill(command)
                return self._advance_prefill(command.num_parts)
            case PrefillMore():
                return self._advance_prefill(command.num_parts)
            case DecodeStep():
                return self._decode(command)
            case _:
                raise ValueError(f"{command.OP} is between ranks, not for one of them")
        return None

    def decode(self, tokens: Tensor, batch: DecodeBatch, *, pulls: bool = True) -> StepOutput:
        """One decode step of tokens i64 [B], whatever the batch's tables say; never waits for the device.

        `pulls` False: no row of the batch may pull; the same result in one launch less a layer.
        """
        return self.model.decode(tokens, batch, self.memory.pools, self._arena if pulls else None)

    def load_states(self) -> list[LoadState]:
        """How far each load is."""
        return [_state(load) for load in self.loads]

    def settle(self, states: Seq[int]) -> None:
        """Forget the loads that all ranks have ended."""
        pairs = zip(self.loads, states, strict=True)
        self.loads = [load for load, state in pairs if state == LoadState.UNDER_WAY]

    def _restore(self, command: Restore) -> None:
        geometry, memory = self.memory.geometry, self.memory
        parts = [self._arena[offset : offset + geometry.slot_bytes] for offset in command.arena_offsets]
        payload = torch.cat(parts)[: geometry.resume_bytes].to(memory.device)
        restore(memory.pools, command.slot, command.num_tokens, geometry, payload)

    def _begin_prefill(self, command: PrefillStep) -> None:
        self.memory.flush()
        chunk = self.memory.prefill_chunk(command.slot, command.start, len(command.tokens))
        self._chunk_slot = command.slot
        self._chunk = self.model.prefill_parts(
            self._tokens(command.tokens), chunk, self.memory.pools, evidence_tokens=command.evidence_tokens
        )

    def _advance_prefill(self, num_parts: int) -> StepOutput | None:
        assert self._chunk is not None
        output = advance_prefill(self._chunk, num_parts)
        if output is not None:
            self._chunk = self._chunk_slot = None
        return output

    def _decode(self, command: DecodeStep) -> StepOutput:
        self.memory.flush()
        batch = self.memory.decode_batch(command.slots, command.positions)
        return self.decode(self._tokens(command.tokens), batch)

    def _tokens(self, tokens: Seq[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self.memory.device)


def _state(load: Future[None]) -> LoadState:
    if not load.done():
        return LoadState.UNDER_WAY
    return LoadState.DONE if load.exception() is None else LoadState.FAILED
