"""A dump on disk: one header, and a shard for each text; safetensors and msgpack, never pickle.

    header.msgpack             schema_version, what the features are of and how they were made
    shard-00000.safetensors    tensors by the names of `Features.tensors`; the number is the text's
    shard-00000.msgpack        which text it is; written last, so a shard without it does not count
Shards don't depend on each other: several processes write them, and a dump is resumed by what is missing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgpack
import torch
from safetensors.torch import save_file

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.model.kv_pools import key_layout
from forepage.model.safetensors_file import read_file
from forepage.model.spec import ModelSpec
from forepage.training.indexer.features import Features, TextId, features_of
from forepage_kernels.layout import KeyLayout

SCHEMA_VERSION = 1
HEADER_FILE = "header.msgpack"
LIST = ".msgpack"


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
    number: int


def open_dump(folder: Path, header: DumpHeader) -> None:
    """Make the folder a dump of this header. Raises: ModelFormatError where it is one of something else."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / HEADER_FILE
    if path.exists() and read_header(folder) != header:
        raise ModelFormatError(f"{path}: a dump of another model or config; take another folder")
    if not path.exists():
        _write(path, asdict(header))


def write_features(folder: Path, number: int, features: Features) -> None:
    """Write the shard of the number-th text."""
    stem = _stem(folder, number)
    tensors = {name: tensor.contiguous() for name, tensor in features.tensors().items()}
    save_file(tensors, stem.with_suffix(".safetensors"))
    sizes = {"num_entries": features.num_entries, "num_rows": features.num_rows}
    _write(stem.with_suffix(LIST), {**asdict(features.text), **sizes})


def stored_numbers(folder: Path) -> set[int]:
    """Numbers of the texts that are there, without reading them."""
    return {int(path.stem.removeprefix("shard-")) for path in folder.glob(f"shard-*{LIST}")}


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
    """Texts that are there, in the config's order."""
    texts = []
    for number in sorted(stored_numbers(folder)):
        text = _read(_stem(folder, number).with_suffix(LIST))
        text_id = TextId(**{item.name: text[item.name] for item in fields(TextId)})
        texts.append(StoredText(text_id, text["num_entries"], text["num_rows"], number))
    return texts


def read_features(folder: Path, text: StoredText, device: torch.device) -> Features:
    """One text's features, straight to the device. Raises: ModelFormatError for a damaged shard."""
    path = _stem(folder, text.number).with_suffix(".safetensors")
    tensors = read_file(path, device=str(device))
    try:
        return features_of(text.id, text.num_entries, tensors)
    except KeyError as error:
        raise ModelFormatError(f"{path}: tensor {error} is missing") from error


def of_split(texts: Sequence[StoredText], *, validation: bool) -> Iterator[StoredText]:
    """Texts that are (or are not) for validation."""
    return (text for text in texts if text.id.is_validation == validation)


def _stem(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}"


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
