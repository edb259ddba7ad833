"""CUDA graphs of decode steps, by shape: captured when a shape first comes, few, and in one memory pool.

A replay reads and writes the same addresses as the capture did. What a captured step leaves is only borrowed:
it lies in the pool that all graphs share, and stands until the next replay of any of them.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from forepage.model.indexer import IndexerTap
from forepage.model.transformer import StepOutput
from forepage.telemetry import MetricName, Telemetry

_log = structlog.get_logger("forepage.worker.graphs")


@dataclass(frozen=True)
class StepShape:
    """What a graph is fixed to: rows, blocks of their tables, whether any draws its token or pulls rows."""

    rows: int
    blocks: int
    draws: bool
    pulls: bool


@dataclass(frozen=True)
class StepTensors:
    """What a step leaves on the device: i64 [B, 3] (next token, pulled rows, unserved rows), and the rest."""

    results: Tensor
    output: StepOutput


@dataclass(frozen=True)
class DecodeGraph:
    """A captured step."""

    graph: torch.cuda.CUDAGraph
    tensors: StepTensors

    def replay(self) -> StepTensors:
        """Launch it on the current stream."""
        self.graph.replay()
        return self.tensors


class DecodeGraphs:
    """Owner of the graphs; used by one thread. Beyond `max_graphs` the one that was not used longest goes."""

    def __init__(
        self,
        forward: Callable[[StepShape], StepTensors],
        device: torch.device,
        *,
        max_graphs: int,
        telemetry: Telemetry,
    ) -> None:
        """`forward` launches a step of that shape on static buffers, and never waits for the device."""
        self._forward = forward
        self._device = device
        self._max_graphs = max_graphs
        self._telemetry = telemetry
        self._graphs: OrderedDict[StepShape, DecodeGraph] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self.pool_bytes = 0
        """Device memory of the shared pool."""

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, shape: StepShape) -> DecodeGraph | None:
        """The graph of this shape, if it is captured."""
        graph = self._graphs.get(shape)
        if graph is not None:
            self._graphs.move_to_end(shape)
        return graph

    def capture(self, shape: StepShape) -> DecodeGraph:
        """Capture it, after a run that compiles what it launches: the static buffers must hold padding."""
        if len(self._graphs) >= self._max_graphs:
            torch.cuda.synchronize(self._device)  # it may still run
            self._graphs.popitem(last=False)
            self._telemetry.move(MetricName.DECODE_GRAPHS, -1)
        started_s = time.monotonic()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._forward(shape)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy and allocate meanwhile: only what this one launches belongs to the graph.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            tensors = self._forward(shape)
        captured = DecodeGraph(graph, _borrowed_tensors(tensors))
        self._graphs[shape] = captured
        self._count(shape, started_s)
        return captured

    def _count(self, shape: StepShape, started_s: float) -> None:
        before, self.pool_bytes = self.pool_bytes, _pool_bytes(self._pool)
        self._telemetry.move(MetricName.DECODE_GRAPHS, 1)
        self._telemetry.move(MetricName.DECODE_GRAPH_BYTES, self.pool_bytes - before)
        _log.info(
            "captured a decode graph",
            rows=shape.rows,
            blocks=shape.blocks,
            draws=shape.draws,
            pulls=shape.pulls,
            ms=round((time.monotonic() - started_s) * 1e3),
            graphs=len(self._graphs),
            pool_bytes=self.pool_bytes,
        )


class _Address:
    """Memory that somebody else keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory without a claim to it: the next capture may use it again."""
    if not tensor.numel():
        return torch.empty_like(tensor)
    return torch.as_tensor(_Address(tensor.detach()), device=tensor.device)


def _borrowed_tensors(tensors: StepTensors) -> StepTensors:
    output = tensors.output
    taps = [
        IndexerTap(
            _borrowed(tap.query), _borrowed(tap.weights), _borrowed(tap.selected), _borrowed(tap.scores)
        )
        for tap in output.indexer
    ]
    return StepTensors(
        results=_borrowed(tensors.results),
        output=StepOutput(
            logits=_borrowed(output.logits),
            hidden=_borrowed(output.hidden),
            indexer=taps,
            pulled_rows=_borrowed(output.pulled_rows),
            unserved_rows=_borrowed(output.unserved_rows),
        ),
    )


def _pool_bytes(pool: tuple[int, int]) -> int:
    segments = torch.cuda.memory_snapshot()
    return sum(int(segment["total_size"]) for segment in segments if segment["segment_pool_id"] == pool)
