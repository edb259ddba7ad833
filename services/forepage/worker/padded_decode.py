"""Decode steps from static buffers: one upload, one launch, one download, and no waiting in between.

A batch is filled up to the next of few sizes with rows of a slot that no sequence has, its tables likewise;
each size is a CUDA graph. A step picks its tokens on the device and leaves them there by slot, so the next
can be launched before the host has read them. What a graph can't do (penalties, masks, log-probabilities)
the host does behind it, for those rows alone. Without graphs the same step is launched kernel by kernel:
the same bits.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from torch import Tensor

from forepage.model.indexer import IndexerTap
from forepage.model.transformer import StepOutput
from forepage.telemetry import Telemetry
from forepage.worker.decode_graph import DecodeGraph, DecodeGraphs, StepShape, StepTensors
from forepage.worker.device_audit import AuditCopies, AuditRow, DeviceAudit, LayerTap, members_by_layer
from forepage.worker.host_copy import HostCopy, upload
from forepage.worker.launched_step import DecodeRow, StepResult
from forepage.worker.rank_device import RankDevice
from forepage.worker.sampler import NUM_DRAW_COLUMNS, Draws, Pick, draw_columns, pick_tokens, sample
from forepage.worker.sequence import StepTap

_log = structlog.get_logger("forepage.worker.decode")
MIN_BLOCKS = 8
UNKNOWN_TOKEN = -1
SLOT, POSITION, TOKEN, AWAITS_VERDICT, FIRST_DRAW = range(5)
"""Columns of the static input i64 [B, 9]; from FIRST_DRAW on they are f64."""
NUM_COLUMNS = FIRST_DRAW + NUM_DRAW_COLUMNS


def padded_rows(num_rows: int) -> int:
    """The batch size that so many rows are filled up to: 1, 2, 4, 8, 12, 16, 24, 32, 48, ..."""
    size = 1 << (num_rows - 1).bit_length()
    return size * 3 // 4 if size > 8 and num_rows <= size * 3 // 4 else size


def padded_blocks(num_blocks: int, most: int) -> int:
    """The table width that so many blocks are filled up to: a power of two, or the longest sequence's."""
    return min(max(MIN_BLOCKS, 1 << (num_blocks - 1).bit_length()), most)


@dataclass(frozen=True)
class IndexerCopies:
    """What the T indexers of R rows asked and chose, on the way to the host."""

    query: HostCopy  # f32 [R, T, H, D]
    weights: HostCopy  # f32 [R, T, H]
    selected: HostCopy  # i64 [R, T, k]
    scores: HostCopy  # f32 [R, T, k]

    @classmethod
    def of(cls, output: StepOutput, rows: Seq[int]) -> "IndexerCopies":
        """Start copying: one tensor each, so few copies, however many layers."""
        taps = output.indexer

        def copied(parts: list[Tensor], like: Tensor) -> HostCopy:
            if not parts:
                return HostCopy.of(like.new_zeros(len(rows), 0))
            joined = torch.stack(parts)
            return HostCopy.of(joined.view(len(rows), len(taps), *joined.shape[1:]))

        return cls(
            query=copied([tap.query[row] for row in rows for tap in taps], output.logits),
            weights=copied([tap.weights[row] for row in rows for tap in taps], output.logits),
            selected=copied([tap.selected[row] for row in rows for tap in taps], output.pulled_rows),
            scores=copied([tap.scores[row] for row in rows for tap in taps], output.logits),
        )

    def taps(self, at: int) -> list[IndexerTap]:
        """One row's, by layer."""
        query, weights = self.query.read()[at], self.weights.read()[at]
        selected, scores = self.selected.read()[at], self.scores.read()[at]
        one = [slice(layer, layer + 1) for layer in range(query.shape[0])]
        return [IndexerTap(query[layer], weights[layer], selected[layer], scores[layer]) for layer in one]


@dataclass(frozen=True)
class TapCopies:
    """What some of a step's rows leave for the lookahead, on its way to the host.

    Each part is of some rows only: attention inputs f32 [R, L, D] for a plan, the indexers' choices for
    whoever looks at them on the host, audits.
    """

    rows_of_hidden: dict[int, int]
    hidden: HostCopy | None
    rows_of_indexer: dict[int, int]
    indexer: IndexerCopies | None
    rows_of_audits: dict[int, int]
    audits: AuditCopies | None

    def read(self, row: int) -> StepTap:
        """One row's; waits for the copies."""
        hidden, taps, audit = None, [], None
        if self.hidden is not None and (at := self.rows_of_hidden.get(row)) is not None:
            hidden = self.hidden.read()[at]
        if self.indexer is not None and (at := self.rows_of_indexer.get(row)) is not None:
            taps = self.indexer.taps(at)
        if self.audits is not None and (at := self.rows_of_audits.get(row)) is not None:
            audit = self.audits.read(at)
        return StepTap(hidden, taps, 0, audit)


@dataclass(frozen=True)
class PaddedStep:
    """A step under way."""

    num_rows: int
    logits: Tensor  # f32 [B, vocab]; of a graph: borrowed, until the next step is launched
    results: HostCopy  # i64 [B, 3]
    taps: TapCopies | None
    sampled: dict[int, Pick]
    """Rows that the host has sampled."""
    fallbacks: tuple[str, ...]

    def is_done(self) -> bool:
        """Whether `read` would not wait."""
        return self.results.is_done()

    def read(self) -> StepResult:
        """Waits for the device."""
        tokens, pulled, unserved = self.results.read()[: self.num_rows].T.tolist()
        picks = [self.sampled.get(row) or Pick(token) for row, token in enumerate(tokens)]
        return StepResult(picks, pulled, unserved)

    def tap(self, row: int) -> StepTap:
        """Of a row that wanted one."""
        assert self.taps is not None
        return self.taps.read(row)


class PaddedDecode:
    """Owner of the static buffers and graphs of one device; used by the loop's thread."""

    def __init__(
        self,
        local: RankDevice,
        *,
        max_rows: int,
        max_graphs: int,
        telemetry: Telemetry,
        audit: DeviceAudit | None = None,
    ) -> None:
        """`max_graphs` 0: no graphs; a CPU can't have any. `audit` None: this device makes none."""
        self._local = local
        self.audit = audit
        self._memory = local.memory
        device = local.memory.device
        self._inputs = torch.zeros(padded_rows(max_rows), NUM_COLUMNS, dtype=torch.int64, device=device)
        self._last_tokens = torch.zeros(local.memory.num_slots, dtype=torch.int64, device=device)
        """By slot: what the last step picked."""
        self._missed = torch.zeros(local.memory.num_slots, dtype=torch.bool, device=device)
        """By slot: whether the last held step missed evidence."""
        self._graphs: DecodeGraphs | None = None
        self._wants_graphs = device.type == "cuda"
        self._tap_stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._tap_stream = torch.cuda.Stream(device)
            if max_graphs:
                self._graphs = DecodeGraphs(self._forward, device, max_graphs=max_graphs, telemetry=telemetry)

    @property
    def has_graphs(self) -> bool:
        """Whether steps are replayed."""
        return self._graphs is not None

    @property
    def num_graphs(self) -> int:
        """Graphs captured and kept."""
        return 0 if self._graphs is None else len(self._graphs)

    @property
    def graph_bytes(self) -> int:
        """Device memory that they share."""
        return 0 if self._graphs is None else self._graphs.pool_bytes

    def launch(self, rows: Seq[DecodeRow]) -> PaddedStep:
        """Start a step of at most `max_rows` rows; it is waited for if the host must sample any of them."""
        self._memory.flush()
        by_host = [at for at, row in enumerate(rows) if not row.sampling.is_plain]
        shape = self._shape(rows)
        tensors = self._run(rows, shape)
        results = HostCopy.of(tensors.results)
        taps = self._copy_taps(tensors.output, rows)
        sampled = self._sample_here(tensors.output.logits, rows, by_host)
        fallbacks: tuple[str, ...] = ("host_sampling",) if by_host else ()
        if self._graphs is None and self._wants_graphs:
            fallbacks += ("eager_decode",)
        return PaddedStep(len(rows), tensors.output.logits, results, taps, sampled, fallbacks)

    def _shape(self, rows: Seq[DecodeRow]) -> StepShape:
        blocks = self._memory.geometry.num_blocks(max(row.position for row in rows) + 1)
        return StepShape(
            rows=padded_rows(len(rows)),
            blocks=padded_blocks(blocks, self._memory.table_blocks),
            draws=any(row.sampling.is_plain and row.sampling.sampling.temperature > 0 for row in rows),
            pulls=any(row.pulls for row in rows),
        )

    def capture(self, shape: StepShape) -> None:
        """Compile and capture that shape in advance, unless it is; without memory for it, it isn't."""
        if self._graphs is None or self._graphs.find(shape) is not None:
            return
        self._set_inputs((), shape)
        try:
            self._graphs.capture(shape)
        except torch.OutOfMemoryError as error:
            _log.warning("no memory to capture a decode shape in advance", shape=shape, error=str(error))

    def _run(self, rows: Seq[DecodeRow], shape: StepShape) -> StepTensors:
        graph = None
        if self._graphs is not None:
            graph = self._graphs.find(shape) or self._capture(self._graphs, shape)
        self._set_inputs(rows, shape)
        return self._forward(shape) if graph is None else graph.replay()

    def _capture(self, graphs: DecodeGraphs, shape: StepShape) -> DecodeGraph | None:
        """On padding; without memory for it there are no graphs from now on."""
        self._set_inputs((), shape)
        try:
            return graphs.capture(shape)
        except torch.OutOfMemoryError as error:
            _log.error("no memory for a decode graph: steps are launched kernel by kernel", error=str(error))
            self._graphs = None
            return None

    def _set_inputs(self, rows: Seq[DecodeRow], shape: StepShape) -> None:
        inputs = np.zeros((shape.rows, NUM_COLUMNS), np.int64)
        inputs[:, SLOT] = self._memory.padding_slot
        if rows:
            head = inputs[: len(rows)]
            head[:, :FIRST_DRAW] = [
                (
                    row.slot,
                    row.position,
                    UNKNOWN_TOKEN if row.token is None else row.token,
                    row.awaits_verdict,
                )
                for row in rows
            ]
            if shape.draws:
                vocab = self._local.model.spec.vocab_size
                head[:, FIRST_DRAW:].view(np.float64)[:] = [
                    draw_columns(row.sampling, vocab) if row.sampling.is_plain else (0.0,) * NUM_DRAW_COLUMNS
                    for row in rows
                ]
        self._inputs[: shape.rows].copy_(upload(inputs, self._memory.device), non_blocking=True)

    def _forward(self, shape: StepShape) -> StepTensors:
        """The step, from static buffers to the tensors it leaves; capturable."""
        inputs = self._inputs[: shape.rows]
        given = inputs[:, TOKEN]
        is_left_out = self._missed[inputs[:, SLOT]] & (inputs[:, AWAITS_VERDICT] != 0)
        slots = torch.where(is_left_out, self._memory.padding_slot, inputs[:, SLOT])
        positions = torch.where(is_left_out, 0, inputs[:, POSITION])
        tokens = torch.where(given >= 0, given, self._last_tokens[slots])
        batch = self._memory.gather(slots, positions, num_blocks=shape.blocks)
        output = self._local.decode(tokens, batch, pulls=shape.pulls)
        draws = Draws.of(inputs[:, FIRST_DRAW:].contiguous().view(torch.float64)) if shape.draws else None
        picked = pick_tokens(output.logits, draws)
        self._last_tokens[slots] = picked
        return StepTensors(torch.stack((picked, output.pulled_rows, output.unserved_rows), dim=1), output)

    def _sample_here(self, logits: Tensor, rows: Seq[DecodeRow], by_host: Seq[int]) -> dict[int, Pick]:
        if not by_host:
            return {}
        picks = sample(logits[list(by_host)], [rows[at].sampling for at in by_host])
        slots = np.array([rows[at].slot for at in by_host])
        tokens = np.array([pick.token for pick in picks])
        self._last_tokens[upload(slots, logits.device)] = upload(tokens, logits.device)
        return dict(zip(by_host, picks, strict=True))

    def _copy_taps(self, output: StepOutput, rows: Seq[DecodeRow]) -> TapCopies | None:
        """On a stream of its own: the next step waits until they are gathered.

        Audits follow on that stream, beside the next step.
        """
        wanted = [(at, row) for at, row in enumerate(rows) if row.wants_tap]
        for_plans = [at for at, row in wanted if row.wants_hidden]
        for_host = [at for at, row in wanted if row.wants_indexer]
        audited = [at for at, row in wanted if row.audit_layers and self.audit is not None]
        if not wanted:
            return None
        asked = [
            AuditRow(rows[at].slot, rows[at].position, rows[at].audit_layers, rows[at].marks_miss)
            for at in audited
        ]
        hidden, indexer, audits, absent, taps = None, None, None, None, []
        with self._beside() as gathered_by:
            if for_plans:
                hidden = HostCopy.of(torch.stack([output.hidden[at] for at in for_plans]))
            if for_host:
                indexer = IndexerCopies.of(output, for_host)
            if self.audit is not None and asked:
                absent = self.audit.absent(asked)
                taps = [
                    self._layer_tap(output, layer, members, audited)
                    for layer, members in members_by_layer(asked).items()
                ]
            gathered_by()
            if self.audit is not None and absent is not None:
                audits = self.audit.start(asked, absent, taps, missed=self._missed)
                if any(row.marks_miss for row in asked):
                    gathered_by()  # the next step looks at what they missed
        return TapCopies(_places(for_plans), hidden, _places(for_host), indexer, _places(audited), audits)

    def _layer_tap(
        self, output: StepOutput, layer: int, members: tuple[int, ...], audited: Seq[int]
    ) -> LayerTap:
        """Of the members among the audited rows of the step; copies, which the next step leaves alone."""
        tap = output.indexer[layer]
        rows = upload(np.array([audited[member] for member in members]), self._memory.device)
        return LayerTap(
            layer,
            members,
            query=tap.query.index_select(0, rows),
            weights=tap.weights.index_select(0, rows),
            selected=tap.selected.index_select(0, rows),
            scores=tap.scores.index_select(0, rows),
        )

    @contextmanager
    def _beside(self) -> Iterator[Callable[[], None]]:
        """Work on the tap stream, behind what was launched; the call makes later steps wait for it so far."""
        if self._tap_stream is None:
            yield lambda: None
            return
        stream, current = self._tap_stream, torch.cuda.current_stream(self._memory.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield lambda: current.wait_stream(stream)


def _places(rows: Seq[int]) -> dict[int, int]:
    """By row, which of these it is."""
    return {row: at for at, row in enumerate(rows)}
