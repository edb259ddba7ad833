"""What a GPU does for the first time takes long: here it is done before anyone waits for it.

Runs once, on a thread of its own before the loop's begins, beside the page-locking of the arena: the decode
shapes that long contexts will need are captured. Once the GPU may read the arena, a made-up text is processed
the way a request is (prefill in chunks, greedy and drawn tokens, taps, audits, a snapshot, a load), which
compiles what these launch, and the shapes that pull rows follow. Nothing of it is kept but kernels and
graphs. A CPU compiles nothing, so there it isn't done.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import structlog
import torch

from forepage.errors import IntegrityError
from forepage.kv.geometry import KvGeometry
from forepage.kv.resident_set import ResidentSet
from forepage.settings import WorkerSettings
from forepage.worker.commands import ALL_PARTS, BlockLoad
from forepage.worker.decode_graph import StepShape
from forepage.worker.launched_step import DecodeRow
from forepage.worker.padded_decode import padded_blocks, padded_rows
from forepage.worker.parts import WorkerParts
from forepage.worker.sampler import Row, Sampling

TEXT_CHUNKS = 2
"""The second begins behind resident entries, as every chunk of a long prompt but the first does."""
TEXT_STEPS = 4
"""Greedy, drawn, and both again with pulls: each has a graph of its own."""
POLL_S = 0.002
_GREEDY, _DRAWN = Sampling(0.0, 1.0, 0, 0.0, 0), Sampling(1.0, 0.9, 50, 0.05, 0)
_log = structlog.get_logger("forepage.worker.warm_up")


def warm_shapes(settings: WorkerSettings, geometry: KvGeometry, *, c128_blocks: int) -> list[StepShape]:
    """The decode shapes of every batch size at the settings' contexts, those that pull last.

    At most as many as are kept beside the made-up text's. Left out are batches that can't come, if their
    sequences are about equally long: more than half of a table is needed, and c128 rows are never paged.
    """
    most = geometry.num_blocks(settings.max_context_tokens)
    contexts = (min(tokens, settings.max_context_tokens) for tokens in settings.warm_up_tokens)
    widths = sorted({padded_blocks(geometry.num_blocks(tokens), most) for tokens in contexts})
    sizes = sorted({padded_rows(count) for count in range(1, settings.max_running + 1)})
    shapes = [
        StepShape(rows=rows, blocks=blocks, draws=draws, pulls=pulls)
        for pulls in (False, True)
        for rows in sizes
        for blocks in widths
        if rows == 1 or rows * (blocks // 2) <= c128_blocks
        for draws in (False, True)
    ]
    return shapes[: max(0, settings.decode_graphs - TEXT_STEPS)]


@dataclass(frozen=True)
class _Text:
    """Where the made-up text lies on the device while it is processed."""

    slot: int
    row_ids: list[int]
    key_ids: list[int]
    c128_ids: list[int]


class WarmUp:
    """Done once; `done` of `total` for whoever asks meanwhile."""

    def __init__(self, parts: WorkerParts, shapes: Seq[StepShape]) -> None:
        self._parts = parts
        self._shapes = shapes
        self._started_s = time.monotonic()
        self.total = len(shapes) + 1
        self.done = 0

    @classmethod
    def of(cls, parts: WorkerParts) -> "WarmUp | None":
        """What this worker's device and settings ask for; None if there is nothing to compile."""
        if parts.device.kind.type != "cuda" or not parts.settings.warm_up_tokens:
            return None
        if not parts.device.has_graphs:
            return cls(parts, [])
        return cls(parts, warm_shapes(parts.settings, parts.geometry, c128_blocks=parts.blocks.c128.total))

    def begin(self, is_stopping: Callable[[], bool]) -> None:
        """What needs no arena: the shapes that don't pull."""
        self._capture([shape for shape in self._shapes if not shape.pulls], is_stopping)

    def finish(self, is_stopping: Callable[[], bool]) -> None:
        """The rest, once the GPU may read the arena. Raises: IntegrityError when the model computes NaN."""
        with torch.inference_mode():
            self._process_text()
        self._count()
        self._capture([shape for shape in self._shapes if shape.pulls], is_stopping)

    def _capture(self, shapes: Seq[StepShape], is_stopping: Callable[[], bool]) -> None:
        with torch.inference_mode():
            for shape in shapes:
                if is_stopping():
                    return
                self._parts.device.capture(shape)
                self._count()

    def _count(self) -> None:
        self.done += 1
        seconds = round(time.monotonic() - self._started_s, 1)
        _log.info("warming up", done=self.done, of=self.total, s=seconds)

    def _process_text(self) -> None:
        text = self._take(self._num_blocks())
        try:
            self._prefill(text)
            self._decode(text)
            self._load(text)
        finally:
            self._give_back(text)

    def _num_blocks(self) -> int:
        """Of two chunks, or as many as the pools hold."""
        parts, pools = self._parts, self._parts.blocks
        asked = TEXT_CHUNKS * parts.prefill_chunk // parts.geometry.block_tokens
        room = min(pools.rows.total, pools.keys.total - pools.keys.reserve, pools.c128.total)
        return max(1, min(asked, room, parts.geometry.num_blocks(parts.settings.max_context_tokens)))

    def _prefill(self, text: _Text) -> None:
        """All but the tokens that the steps take."""
        parts, chunk = self._parts, self._parts.prefill_chunk
        num_tokens = len(text.row_ids) * parts.geometry.block_tokens - TEXT_STEPS
        for start in range(0, num_tokens, chunk):
            tokens = _tokens(min(chunk, num_tokens - start), parts.device.spec.vocab_size)
            evidence = min(len(tokens), parts.settings.prompt_tokens)
            output = parts.device.begin_prefill(
                text.slot, start, tokens, evidence_tokens=evidence, num_parts=ALL_PARTS
            )
            assert output is not None  # all parts were asked for
            if not bool(output.logits.isfinite().all()):
                raise IntegrityError("the model computes logits that are not finite: its weights are damaged")

    def _decode(self, text: _Text) -> None:
        parts = self._parts
        start = len(text.row_ids) * parts.geometry.block_tokens - TEXT_STEPS
        layers = tuple(range(min(parts.settings.audit_layers, len(parts.geometry.c4_layers))))
        for step in range(TEXT_STEPS):
            row = DecodeRow(
                slot=text.slot,
                position=start + step,
                token=0,
                sampling=Row(_DRAWN if step % 2 else _GREEDY, start + step + 1),
                wants_tap=True,
                pulls=step >= 2,
                audit_layers=layers if parts.device.makes_audits else (),
            )
            launched = parts.device.decode([row])
            launched.read()
            launched.tap(0)
        parts.device.snapshot(text.slot, start + TEXT_STEPS).read()

    def _load(self, text: _Text) -> None:
        """Whatever lies in the arena's first slot, over a block that is not read any more."""
        device = self._parts.device
        load = BlockLoad(0, text.row_ids[0], text.key_ids[0], text.c128_ids[0])
        loaded = device.load([load])
        while not loaded.done():
            device.tick()
            time.sleep(POLL_S)
        loaded.result()

    def _take(self, num_blocks: int) -> _Text:
        pools, device = self._parts.blocks, self._parts.device
        pools.slots.try_promise(1)
        for pool in (pools.rows, pools.keys, pools.c128):
            pool.try_promise(num_blocks)
        text = _Text(
            slot=pools.slots.allocate(1)[0],
            row_ids=pools.rows.allocate(num_blocks),
            key_ids=pools.keys.allocate(num_blocks),
            c128_ids=pools.c128.allocate(num_blocks),
        )
        resident = ResidentSet()
        for row_id, key_id in zip(text.row_ids, text.key_ids, strict=True):
            resident.append(row_id, key_id)
        device.clear_slot(text.slot)
        device.set_residency(text.slot, resident)
        device.set_c128(text.slot, text.c128_ids)
        return text

    def _give_back(self, text: _Text) -> None:
        pools = self._parts.blocks
        held = (pools.rows, text.row_ids), (pools.keys, text.key_ids), (pools.c128, text.c128_ids)
        for pool, ids in (*held, (pools.slots, [text.slot])):
            pool.free(ids)
            pool.try_promise(-len(ids))
        self._parts.device.clear_slot(text.slot)


def _tokens(count: int, vocab_size: int) -> tuple[int, ...]:
    """Many different ones, so that experts of every kind are asked."""
    return tuple(place * 7919 % vocab_size for place in range(count))
