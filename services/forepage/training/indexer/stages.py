"""The stages as one call each: dump, fit, calibrate. Each writes its row of training.json.

Folders under one output folder: `dump` (shards), `indexer` (run, checkpoint, log), `export` (what is served).
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from forepage.checkout import commit_of_checkout
from forepage.errors import ModelFormatError
from forepage.model.safetensors_file import read_file
from forepage.training.backbone.journal import journal
from forepage.training.indexer.calibration import Calibration, calibrate, curve_points
from forepage.training.indexer.config import IndexerTrainingConfig
from forepage.training.indexer.dump import DumpOrder, dump
from forepage.training.indexer.encoder import DualEncoder
from forepage.training.indexer.fitting import BEST_FILE, Fitting
from forepage.training.indexer.learning_curve import draw_curve
from forepage.training.indexer.saved import stored_tensors, write_curve, write_indexer
from forepage.training.indexer.shards import DumpHeader
from forepage.training.indexer.start import first_tensors
from forepage.training.indexer.text_store import TextStore
from forepage.training.indexer.validation import PlanCells, validation_cells
from forepage.training.results import StageRow, device, peak_gpu_bytes, write_row

WHAT = "training of a memory indexer"


@dataclass(frozen=True)
class FitOrder:
    """What one call is to do; `model` only for its indexers' first weights."""

    dump: Path
    config: IndexerTrainingConfig
    folder: Path
    device: torch.device
    model: Path | None = None
    minutes: float | None = None


def run_dump(order: DumpOrder, results: Path) -> bool:
    """Whether all texts are there."""
    _reset_peak()
    began = time.monotonic()
    totals, done = dump(order)
    seconds = time.monotonic() - began
    row = StageRow(
        stage="dump",
        seconds=seconds,
        peak_gpu_bytes=totals.peak_gpu_bytes or None,
        samples_per_s=totals.tokens / max(seconds, 1e-9),
        sample="token",
        final_metrics={"texts": totals.texts, "rows": totals.rows, "tokens": totals.tokens},
    )
    write_row(results, row, what=WHAT, config=asdict(order.config.dump))
    return done


def run_fit(order: FitOrder, results: Path) -> bool:
    """Whether all steps are done."""
    _reset_peak()
    fit = order.config.fit
    order.folder.mkdir(parents=True, exist_ok=True)
    store = TextStore(order.dump, order.config, order.device, compute_dtype(order.device))
    first = first_tensors(store.header.spec, fit, store.header.target_layers, order.model)
    encoder = encoder_of(store.header, first, order.device)
    fitting = Fitting(encoder, store, order.config, order.folder)
    before, began = fitting.state, time.monotonic()
    until = began + order.minutes * 60 if order.minutes is not None else float("inf")
    with journal(order.folder, fit.steps) as notes:
        done = fitting.train(notes, until=until)
    seconds = time.monotonic() - began
    draw_curve(order.folder)
    samples = (fitting.state.step - before.step) * fit.texts_per_step * fit.rows
    row = StageRow(
        stage="indexer",
        seconds=fitting.state.seconds,
        peak_gpu_bytes=peak_gpu_bytes(),
        samples_per_s=samples / max(seconds, 1e-9),
        sample="plan",
        final_metrics={**asdict(fitting.state), "config": None, "parameters": _count(encoder)},
    )
    write_row(results, row, what=WHAT, config={**asdict(order.config.label), **asdict(fit)})
    return done


def run_calibration(order: FitOrder, export: Path, results: Path) -> Calibration:
    """Calibrate the best weights of `order.folder` as they will be stored; write them and the curve."""
    _reset_peak()
    began = time.monotonic()
    store = TextStore(order.dump, order.config, order.device, compute_dtype(order.device))
    layers = store.header.target_layers
    best = _best(order.folder)
    stored = stored_tensors(best, layers, bf16=order.config.fit.store_bf16)
    encoder = encoder_of(store.header, stored, order.device)
    cells = _cells(encoder, store, order.folder)
    calibration = calibrate(cells, order.config.calibration)
    write_indexer(export, best, order.config, calibration, layers)
    points = list(curve_points(cells, calibration.layers, calibration.budget_blocks))
    write_curve(export, calibration, points, _head(order.config, store.header))
    seconds = time.monotonic() - began
    row = StageRow(
        stage="calibrate",
        seconds=seconds,
        peak_gpu_bytes=peak_gpu_bytes(),
        samples_per_s=cells.num_plans / max(seconds, 1e-9),
        sample="plan",
        final_metrics=asdict(calibration),
    )
    write_row(results, row, what=WHAT, config=asdict(order.config.calibration))
    return calibration


def encoder_of(header: DumpHeader, tensors: Mapping[str, torch.Tensor], device: torch.device) -> DualEncoder:
    """An encoder on a device, in its compute dtype."""
    return DualEncoder(
        header.spec,
        {name: value.to(device) for name, value in tensors.items()},
        target_layers=header.target_layers,
        rotated=header.key_layout.rotated,
        dtype=compute_dtype(device),
    )


def chosen_device(name: str | None) -> torch.device:
    """The one named, or a GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def compute_dtype(device: torch.device) -> torch.dtype:
    """What products run in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _cells(encoder: DualEncoder, store: TextStore, folder: Path) -> PlanCells:
    texts = store.texts(validation=True)
    with journal(folder, len(texts)) as notes:
        numbers = iter(range(1, len(texts) + 1))
        return validation_cells(encoder, store, texts, lambda: notes.advance(next(numbers), "calibrate"))


def _best(folder: Path) -> dict[str, torch.Tensor]:
    if not (folder / BEST_FILE).exists():
        raise ModelFormatError(f"{folder}: no {BEST_FILE}; train the indexer first")
    return read_file(folder / BEST_FILE)


def _head(config: IndexerTrainingConfig, header: DumpHeader) -> dict[str, Any]:
    return {
        "what": "calibration of a memory indexer: validation plans, full candidate set",
        "commit": commit_of_checkout(),
        "device": device(),
        "model_fingerprint": header.model_fingerprint,
        "config": {
            "interval": config.interval,
            "recent_tokens": config.recent_tokens,
            **asdict(config.label),
        },
    }


def _count(encoder: DualEncoder) -> int:
    return sum(parameter.numel() for parameter in encoder.parameters())


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
