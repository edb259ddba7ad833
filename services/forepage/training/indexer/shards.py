"""A dump on disk: one header, and shards of whole texts; safetensors and msgpack, never pickle.

    header.msgpack         schema_version, what the features are of and how they were made
    shard-00000.safetensors    tensors `<text>.<name>` (`Features.tensors`), text = place in the shard
    shard-00000.msgpack        its texts; written last, so a shard without it does not count
A dump is resumed by appending: the texts of complete shards are the first ones of the config's order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgpack
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.model.kv_pools import key_layout
from forepage.model.spec import ModelSpec
from forepage.training.indexer.features import Features, TextId, features_of
from forepage_kernels.layout import KeyLayout

SCHEMA_VERSION = 1
HEADER_FILE = "header.msgpack"
MAX_SHARD_BYTES = 60 << 20


@dataclass(frozen=True)
class DumpHeader:
    """What a dump is of: a model and its KV format, sizes, and the order that made it."""

    model_fingerprint: str
    model_config: dict[str, Any]  # config.json: sizes, RoPE and norms of the query side
    key_format: str
    target_layers: tuple[int, ...]  # c4 indices
    mass: float
    seed: int
    lengths: tuple[int, ...]
    texts: tuple[int, ...]
    rows: int
    suites: tuple[tuple[str, float], ...]

    @property
    def spec(self) -> ModelSpec:
        """The model's numbers. Raises: ModelFormatError."""
        return ModelSpec.from_config(self.model_config)

    @property
    def key_layout(self) -> KeyLayout:
        """How a plane of `Features.keys` is laid out."""
        kv_format = KvFormat.FP32 if self.key_format == KeyFormat.FP32 else KvFormat.FP8
        return key_layout(KvGeometry.from_config(self.model_config, kv_format, KeyFormat(self.key_format)))


@dataclass(frozen=True)
class StoredText:
    """Where a text's features are."""

    id: TextId
    num_entries: int
    num_rows: int
    shard: int
    place: int  # in the shard


class ShardWriter:
    """Appends texts to a dump folder; the one writer of it."""

    def __init__(self, folder: Path, header: DumpHeader) -> None:
        """Raises: ModelFormatError where the folder holds a dump of something else."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / HEADER_FILE
        if path.exists() and read_header(folder) != header:
            raise ModelFormatError(f"{path}: a dump of another model or config; take another folder")
        if not path.exists():
            _write(path, asdict(header))
        texts = stored_texts(folder)
        self.num_texts = len(texts)
        self._folder = folder
        self._next = texts[-1].shard + 1 if texts else 0
        self._open: list[Features] = []
        self._bytes = 0

    def add(self, features: Features) -> None:
        """Keep a text; writes a shard when it would be too large with it."""
        if self._open and self._bytes + features.num_bytes > MAX_SHARD_BYTES:
            self.flush()
        self._open.append(features)
        self._bytes += features.num_bytes

    def flush(self) -> None:
        """Write what is kept, if anything."""
        if not self._open:
            return
        stem = self._folder / f"shard-{self._next:05d}"
        tensors = {
            f"{place}.{name}": tensor.contiguous()
            for place, features in enumerate(self._open)
            for name, tensor in features.tensors().items()
        }
        save_file(tensors, stem.with_suffix(".safetensors"))
        texts = [
            {**asdict(one.text), "num_entries": one.num_entries, "num_rows": one.num_rows}
            for one in self._open
        ]
        _write(stem.with_suffix(".msgpack"), {"texts": texts})
        self.num_texts += len(self._open)
        self._next += 1
        self._open, self._bytes = [], 0


def read_header(folder: Path) -> DumpHeader:
    """Raises: ModelFormatError for a folder without a dump of this version."""
    body = _read(folder / HEADER_FILE)
    try:
        body["target_layers"], body["lengths"] = tuple(body["target_layers"]), tuple(body["lengths"])
        body["texts"] = tuple(body["texts"])
        body["suites"] = tuple((name, share) for name, share in body["suites"])
        return DumpHeader(**body)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(f"{folder / HEADER_FILE}: {error}") from error


def stored_texts(folder: Path) -> list[StoredText]:
    """Texts of all complete shards, in order."""
    texts = []
    for path in sorted(folder.glob("shard-*.msgpack")):
        shard = int(path.stem.removeprefix("shard-"))
        for place, text in enumerate(_read(path)["texts"]):
            text_id = TextId(**{item.name: text[item.name] for item in fields(TextId)})
            texts.append(StoredText(text_id, text["num_entries"], text["num_rows"], shard, place))
    return texts


def read_features(folder: Path, text: StoredText, device: torch.device) -> Features:
    """One text's features, straight to the device. Raises: ModelFormatError for a damaged shard."""
    path = folder / f"shard-{text.shard:05d}.safetensors"
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = [name for name in file.keys() if name.startswith(f"{text.place}.")]  # noqa: SIM118
            tensors = {name.split(".")[1]: file.get_tensor(name) for name in names}
        return features_of(text.id, text.num_entries, tensors)
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelFormatError(f"{path}: text {text.place}: {error}") from error


def of_split(texts: Sequence[StoredText], *, validation: bool) -> Iterator[StoredText]:
    """Texts that are (or are not) for validation."""
    return (text for text in texts if text.id.is_validation == validation)


def _write(path: Path, body: dict[str, Any]) -> None:
    """Beside, then in place: a file that is there is whole."""
    beside = path.with_suffix(".new")
    beside.write_bytes(msgpack.packb({"schema_version": SCHEMA_VERSION, **body}, use_bin_type=True))
    beside.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        body = msgpack.unpackb(path.read_bytes(), raw=False)
    except (OSError, ValueError, msgpack.UnpackException) as error:
        raise ModelFormatError(f"{path}: can't read: {error}") from error
    if not isinstance(body, dict) or body.pop("schema_version", None) != SCHEMA_VERSION:
        raise ModelFormatError(f"{path}: not a dump of version {SCHEMA_VERSION}")
    return body
