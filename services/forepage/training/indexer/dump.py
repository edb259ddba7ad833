"""`forepage train dump`: the served model reads the config's texts; their features go to shards."""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.model.fingerprint import model_fingerprint
from forepage.model.spec import ModelSpec, read_config
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed
from forepage.settings import WeightDtype
from forepage.training.backbone.journal import Journal, journal
from forepage.training.indexer.config import DumpConfig, IndexerTrainingConfig
from forepage.training.indexer.features import TextId
from forepage.training.indexer.served_pass import ServedPass, Text
from forepage.training.indexer.shards import DumpHeader, ShardWriter
from forepage.training.indexer.texts import make_text, text_ids

TORCH_DTYPES = {WeightDtype.FP32: torch.float32, WeightDtype.BF16: torch.bfloat16}
TEXT_WORKERS = 4
AHEAD = 8


@dataclass(frozen=True)
class DumpOrder:
    """What one call is to do."""

    model: Path
    config: IndexerTrainingConfig
    folder: Path
    device: torch.device
    minutes: float | None = None
    key_format: KeyFormat = KeyFormat.FP8
    text_workers: int = TEXT_WORKERS  # processes that make texts; 0: none


@dataclass(frozen=True)
class DumpTotals:
    """What a call did."""

    texts: int
    rows: int
    tokens: int
    seconds: float
    done: bool


def dump(order: DumpOrder) -> DumpTotals:
    """Append texts until all are there, or time is up. Raises: ModelFormatError, RequestError."""
    began = time.monotonic()
    config = order.config.dump
    until = began + order.minutes * 60 if order.minutes is not None else float("inf")
    served = _served_pass(order)
    writer = ShardWriter(order.folder, _header(order))
    total = sum(config.texts)
    texts = rows = tokens = 0
    with journal(order.folder, total) as notes:
        for text in _texts(config, writer.num_texts, order.text_workers):
            if time.monotonic() >= until:
                break
            features = served.features(text)
            writer.add(features)
            texts, rows, tokens = texts + 1, rows + features.num_rows, tokens + len(text.tokens)
            _note(notes, text.id, writer.num_texts, total, rows, time.monotonic() - began)
        writer.flush()
    return DumpTotals(texts, rows, tokens, time.monotonic() - began, writer.num_texts == total)


def _texts(config: DumpConfig, skip: int, workers: int) -> Iterator[Text]:
    """Texts from the skip-th on; made ahead by worker processes, spawned because the parent holds a GPU."""
    ids = islice(text_ids(config), skip, None)
    if not workers:
        yield from (make_text(one, max_rows=config.rows) for one in ids)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(make_text, one, max_rows=config.rows) for one in islice(ids, AHEAD)]
        try:
            while waiting:
                text = waiting.pop(0).result()
                waiting += [pool.submit(make_text, one, max_rows=config.rows) for one in islice(ids, 1)]
                yield text
        finally:
            pool.shutdown(cancel_futures=True)


def _served_pass(order: DumpOrder) -> ServedPass:
    config = read_config(order.model)
    spec = ModelSpec.from_config(config)
    missing = [idx for idx in order.config.dump.target_layers if not 0 <= idx < len(spec.c4_layers)]
    if missing:
        raise ModelFormatError(f"{order.model}: there is no c4 layer {missing[0]} of {len(spec.c4_layers)}")
    dtype = TORCH_DTYPES[WeightDtype.AUTO.on(order.device.type)]
    weights = load_or_seed(order.model, spec, dtype=dtype, device=order.device)
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


def _header(order: DumpOrder) -> DumpHeader:
    weight_dtype = WeightDtype.AUTO.on(order.device.type)
    fingerprint = model_fingerprint(order.model, KvFormat.FP8, order.key_format, weight_dtype)
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


def _note(notes: Journal, text: TextId, number: int, total: int, rows: int, seconds: float) -> None:
    notes.advance(number, f"{text.suite} {text.length_tokens}")
    notes.write(
        {"text": number, "suite": text.suite, "length": text.length_tokens, "rows": rows, "seconds": seconds},
        f"{seconds:6.0f}s {text.suite} at {text.length_tokens}; {rows} rows; {number} of {total} on disk",
    )
