"""`forepage train dump`: the served model reads the config's texts; their features go to shards."""

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.model.fingerprint import model_fingerprint
from forepage.model.held_form import HeldForm
from forepage.model.spec import ModelSpec, read_config
from forepage.model.stored_form import is_quantised
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed
from forepage.settings import WeightDtype
from forepage.training.backbone.journal import Journal, journal
from forepage.training.indexer.config import DumpConfig, IndexerTrainingConfig
from forepage.training.indexer.served_pass import ServedPass
from forepage.training.indexer.shards import DumpHeader, open_dump, stored_numbers, write_features
from forepage.training.indexer.texts import make_text, text_ids
from forepage.training.results import peak_gpu_bytes

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
GPU_PROCESSES = 3
"""Passes of small models wait for launches most of the time: several processes fill a GPU."""
POLL_S = 0.5


@dataclass(frozen=True)
class DumpOrder:
    """What one call is to do."""

    model: Path
    config: IndexerTrainingConfig
    folder: Path
    device: torch.device
    minutes: float | None = None
    key_format: KeyFormat = KeyFormat.FP8
    processes: int | None = None  # that read texts at once; None: this one on a CPU, some on a GPU


@dataclass(frozen=True)
class DumpTotals:
    """What was done: by a process, or by all of them."""

    texts: int = 0
    rows: int = 0
    tokens: int = 0
    peak_gpu_bytes: int = 0  # of all processes together


def dump(order: DumpOrder) -> tuple[DumpTotals, bool]:
    """Write the texts that are missing until time is up; whether all are there now.

    Raises: ModelFormatError, RequestError.
    """
    config = order.config.dump
    until = time.monotonic() + order.minutes * 60 if order.minutes is not None else float("inf")
    open_dump(order.folder, _header(order))
    total = sum(config.texts)
    missing = sorted(set(range(total)) - stored_numbers(order.folder))
    processes = order.processes
    if processes is None:
        processes = GPU_PROCESSES if order.device.type == "cuda" else 1
    with journal(order.folder, total) as notes:
        if processes == 1 or not missing:
            parts = [dump_part(order, missing, until, notes)] if missing else []
        else:
            parts = _side_by_side(order, missing, until, processes, notes)
        done = len(stored_numbers(order.folder))
        notes.note(f"{done} of {total} texts are there")
    totals = DumpTotals(
        texts=sum(part.texts for part in parts),
        rows=sum(part.rows for part in parts),
        tokens=sum(part.tokens for part in parts),
        peak_gpu_bytes=sum(part.peak_gpu_bytes for part in parts),
    )
    return totals, done == total


def dump_part(
    order: DumpOrder, numbers: Sequence[int], until: float, notes: Journal | None = None
) -> DumpTotals:
    """Write these texts, one after another, until time (of the monotonic clock) is up."""
    served, config = _served_pass(order), order.config.dump
    ids = list(text_ids(config))
    texts = rows = tokens = 0
    for number in numbers:
        if time.monotonic() >= until:
            break
        text = make_text(ids[number], max_rows=config.rows)
        features = served.features(text)
        write_features(order.folder, number, features)
        texts, rows, tokens = texts + 1, rows + features.num_rows, tokens + len(text.tokens)
        if notes is not None:
            notes.advance(number + 1, f"{text.id.suite} at {text.id.length_tokens}")
    return DumpTotals(texts, rows, tokens, peak_gpu_bytes() or 0)


def _side_by_side(
    order: DumpOrder, numbers: Sequence[int], until: float, processes: int, notes: Journal
) -> list[DumpTotals]:
    """Parts in processes of their own, spawned as a GPU can't be inherited; progress is what is on disk."""
    total = sum(order.config.dump.texts)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = {
            pool.submit(dump_part, order, numbers[part::processes], until) for part in range(processes)
        }
        parts = set(waiting)
        while waiting:
            _, waiting = wait(waiting, timeout=POLL_S)
            there = len(stored_numbers(order.folder))
            notes.advance(there, f"text {there} of {total}")
        return [part.result() for part in parts]


def _served_pass(order: DumpOrder) -> ServedPass:
    config = read_config(order.model)
    spec = ModelSpec.from_config(config)
    missing = [idx for idx in order.config.dump.target_layers if not 0 <= idx < len(spec.c4_layers)]
    if missing:
        raise ModelFormatError(f"{order.model}: there is no c4 layer {missing[0]} of {len(spec.c4_layers)}")
    held = HeldForm.of(_weight_dtype(order), order.device.type)
    weights = load_or_seed(
        order.model,
        spec,
        dtype=TORCH_DTYPES[held.plain],
        device=order.device,
        keep_stored=held.keeps_stored,
    )
    layers = order.config.dump.target_layers
    model = Transformer(
        spec,
        KvGeometry.from_config(config, KvFormat.FP8, order.key_format),
        weights,
        order.device,
        target_layers=[spec.c4_layers[idx] for idx in layers],
    )
    return ServedPass(
        model,
        target_layers=layers,
        max_tokens=max(order.config.dump.lengths),
        mass=order.config.dump.mass,
    )


def _weight_dtype(order: DumpOrder) -> WeightDtype:
    """As a worker on this device would hold the model's matrices."""
    return WeightDtype.AUTO.on(order.device.type, quantised=is_quantised(read_config(order.model)))


def _header(order: DumpOrder) -> DumpHeader:
    fingerprint = model_fingerprint(order.model, KvFormat.FP8, order.key_format, _weight_dtype(order))
    return header_of(order.config.dump, read_config(order.model), fingerprint, order.key_format)


def header_of(
    config: DumpConfig, model_config: dict[str, object], fingerprint: str, key_format: KeyFormat
) -> DumpHeader:
    """The header of a dump by this config."""
    return DumpHeader(
        model_fingerprint=fingerprint,
        model_config=model_config,
        key_format=key_format.value,
        target_layers=config.target_layers,
        mass=config.mass,
        seed=config.seed,
        lengths=config.lengths,
        texts=config.texts,
        rows=config.rows,
        suites=tuple(config.suites.items()),
    )
