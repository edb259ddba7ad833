"""A process that reads files of tensors while it may have little more memory than it has.

`python -m rigs.claimed_sizes FOLDER`: every *.safetensors of the folder, by everything of ours that opens
such files. Prints what became of each as JSON, and how a plain allocation fared.
"""

import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from forepage.errors import ForepageError
from forepage.kv.geometry import KvFormat
from forepage.model.indexer_tensors import convert, tensor_names
from forepage.model.memory_indexer import MemoryIndexer
from forepage.model.spec import ModelSpec
from forepage.model.weights import load_or_seed
from forepage.settings import SEEDED_MODEL
from forepage.training.backbone import checkpoint, official
from forepage.training.indexer import fitting, stages, start
from forepage.training.indexer.features import TextId
from forepage.training.indexer.shards import StoredText, read_features

MARGIN_BYTES = 256 << 20
CPU = torch.device("cpu")
CONFIG = (SEEDED_MODEL / "config.json").read_text(encoding="utf-8")
SPEC = ModelSpec.from_config(json.loads(CONFIG))
INDEXER_CONFIG = json.dumps({"target_layers": [0, 1, 2], "threshold": 0.5})
Reader = Callable[[Path], object]


def _model(folder: Path) -> object:
    return load_or_seed(folder, SPEC, dtype=torch.float32, device=CPU)


def _indexer(folder: Path) -> object:
    return MemoryIndexer.load(folder, SPEC, KvFormat.FP8, CPU)


def _named_indexer(folder: Path) -> object:
    return MemoryIndexer.load(SEEDED_MODEL, SPEC, KvFormat.FP8, CPU, folder / "a.safetensors")


def _dump(folder: Path) -> object:
    return read_features(folder, StoredText(TextId("s", 1, 1, is_validation=False), 1, 1, 0), CPU)


def _fit(folder: Path) -> object:
    return fitting.Fitting.best(cast(Any, _Fit(folder)))


class _Fit:
    """As much of a fit as knows where its best weights are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder


READERS: dict[str, tuple[str, Reader]] = {
    "model": ("model.safetensors", _model),
    "model's own indexers": ("model.safetensors", lambda folder: start._native(folder, 2)),
    "memory indexer": ("memory_indexer.safetensors", _indexer),
    "named memory indexer": ("a.safetensors", _named_indexer),
    "names of a memory indexer": ("a.safetensors", lambda folder: tensor_names(folder / "a.safetensors")),
    "conversion": ("a.safetensors", lambda folder: convert(folder / "a.safetensors", folder / "b")),
    "dump": ("shard-00000.safetensors", _dump),
    "fit": ("best.safetensors", _fit),
    "calibration": ("best.safetensors", stages._best),
    "training run": ("checkpoint/part-00.safetensors", checkpoint.load),
    "exported weights": ("model.safetensors", lambda folder: official.start_from(cast(Any, None), folder)),
}
"""By who reads it: the name that the file needs in a folder, and the call."""


def _fate(act: Callable[[], object]) -> str:
    try:
        act()
    except ForepageError as error:
        return f"{error.code}: {error}"
    except Exception as error:
        return f"UNTYPED {type(error).__name__}: {error}"
    return "taken"


def _read(file: Path, name: str, reader: Reader) -> str:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / checkpoint.STATE_FILE).write_text(f'{{"version": {checkpoint.VERSION}}}')
        (folder / "config.json").write_text(CONFIG, encoding="utf-8")
        if name != "a.safetensors":
            (folder / "memory_indexer.json").write_text(INDEXER_CONFIG)
        (folder / name).symlink_to(file)
        return _fate(lambda: reader(folder))


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MARGIN_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(folder: Path) -> None:
    """Print {reader: {file: fate}}, and the peak's growth in bytes."""
    _limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fates = {
        who: {file.stem: _read(file, name, reader) for file in sorted(folder.glob("*.safetensors"))}
        for who, (name, reader) in READERS.items()
    }
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    print(json.dumps({"fates": fates, "grown_bytes": grown, "limit": _fate(lambda: bytearray(1 << 31))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
