"""A model folder's weights as their headers describe them, checked whole before any data is read; no torch.

Files are all *.safetensors of the folder; with a model.safetensors.index.json, exactly those it names.
Names are the release's (`stored_form.py`, `weight_table.py`) or the variants its own converter accepts.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from forepage.errors import ModelFormatError
from forepage.model.safetensors_header import FileTensor, read_header
from forepage.model.spec import ModelSpec
from forepage.model.stored_form import SCALE_SUFFIX, WEIGHT_SUFFIX, StoredTensor, allowed_forms, stored_parts
from forepage.model.weight_table import MTP_PREFIX, WeightEntry, weight_table

INDEX_FILE = "model.safetensors.index.json"
MEMORY_INDEXER_FILE = "memory_indexer.safetensors"
OUTER_PREFIX = "model."
_OFFICIAL_PARTS = {
    "self_attn": "attn",
    "mlp": "ffn",
    "weight_scale_inv": "scale",
    "e_score_correction_bias": "bias",
}
"""Parts of names that third parties use -> the release's. Source: the release's convert.py."""
_OTHER_RELEASES = {
    "dspark": "a DSpark drafter (the 0731 releases) is not supported",
    "engram": "DeepSeek-V4.1 has another attention and is not supported",
}
"""What in a tensor's name tells a sibling release -> why we refuse it."""


@dataclass(frozen=True)
class Checkpoint:
    """Where each tensor lies: by official name, in file order; the draft blocks' apart, never loaded."""

    folder: Path
    tensors: Mapping[str, FileTensor]
    skipped: Mapping[str, FileTensor]

    @classmethod
    def open(cls, folder: Path, spec: ModelSpec) -> "Checkpoint":
        """Read index and headers, and check them against the model.

        Raises: ModelFormatError naming the tensor and file that is missing, unexpected, misshapen, of a
        wrong dtype, or truncated.
        """
        index = _read_index(folder)
        files = _shards(folder, index)
        found = _by_official_name(chain.from_iterable(map(read_header, files)))
        if index is not None:
            _check_index(folder, index, found)
        skipped = {name: tensor for name, tensor in found.items() if name.startswith(MTP_PREFIX)}
        _refuse_drafters(spec, found)
        tensors = {name: tensor for name, tensor in found.items() if name not in skipped}
        _check_tensors(folder, weight_table(spec), tensors)
        return cls(folder, tensors, skipped)

    @property
    def files(self) -> list[Path]:
        """Files that hold tensors to load, in name order."""
        return sorted({tensor.path for tensor in self.tensors.values()})

    @property
    def num_bytes(self) -> int:
        """Stored bytes of what is loaded."""
        return sum(tensor.stored.num_bytes for tensor in self.tensors.values())


def weight_files(folder: Path) -> list[Path]:
    """The backbone's files: every *.safetensors but the memory indexer's."""
    return [path for path in sorted(folder.glob("*.safetensors")) if path.name != MEMORY_INDEXER_FILE]


def has_index(folder: Path) -> bool:
    """Whether an index file says which shards there should be."""
    return (folder / INDEX_FILE).exists()


def official_name(name: str) -> str:
    """The release's name of a tensor."""
    parts = name.removeprefix(OUTER_PREFIX).split(".")
    return ".".join(_OFFICIAL_PARTS.get(part, part) for part in parts)


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, if the folder has an index."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: can't read: {error}") from error
    index = body.get("weight_map") if isinstance(body, dict) else None
    if not isinstance(index, dict) or not index:
        raise ModelFormatError(f"{path}: weight_map must say which file holds which tensor")
    for name, file in index.items():
        # The file must be one of the folder: an index that points elsewhere is damaged, or hostile.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelFormatError(f"{path}: {name} is said to be in {file!r}, no *.safetensors here")
    return index


def _shards(folder: Path, index: Mapping[str, str] | None) -> list[Path]:
    files = weight_files(folder)
    if index is None:
        return files
    names = {path.name for path in files}
    for name, file in index.items():
        if file not in names:
            raise ModelFormatError(f"{folder / file}: this shard is missing; it holds {name}")
    for path in files:
        if path.name not in index.values():
            raise ModelFormatError(f"{path}: unexpected shard: {INDEX_FILE} doesn't name it")
    return files


def _by_official_name(tensors: Iterator[FileTensor]) -> dict[str, FileTensor]:
    found: dict[str, FileTensor] = {}
    for tensor in tensors:
        name = official_name(tensor.name)
        other = found.get(name)
        if other is not None:
            where = "under two names" if other.path == tensor.path else f"in another file too, {other.path}"
            raise ModelFormatError(f"{tensor.path}: {name} is {where}")
        found[name] = tensor
    return found


def _check_index(folder: Path, index: Mapping[str, str], found: Mapping[str, FileTensor]) -> None:
    """Index and headers name the same tensors in the same files."""
    by_stored_name = {tensor.name: tensor for tensor in found.values()}
    for name, file in index.items():
        tensor = by_stored_name.get(name)
        if tensor is None or tensor.path.name != file:
            raise ModelFormatError(f"{folder / file}: {name} is missing; {INDEX_FILE} says it is here")
    for name, tensor in by_stored_name.items():
        if name not in index:
            raise ModelFormatError(f"{tensor.path}: unexpected tensor {name}: {INDEX_FILE} doesn't name it")


def _refuse_drafters(spec: ModelSpec, found: Mapping[str, FileTensor]) -> None:
    """Sibling releases differ in ways that their config may not show: refuse, never guess."""
    for name, tensor in found.items():
        for mark, reason in _OTHER_RELEASES.items():
            if mark in name.lower():
                raise ModelFormatError(f"{tensor.path}: {tensor.name}: {reason}")
        if name.startswith(MTP_PREFIX) and spec.num_mtp_layers:
            block = name.split(".")[1]
            if not (block.isdecimal() and int(block) < spec.num_mtp_layers):
                raise ModelFormatError(
                    f"{tensor.path}: {tensor.name}: the config announces {spec.num_mtp_layers} draft blocks; "
                    f"more are a multi-stage drafter: {_OTHER_RELEASES['dspark']}"
                )
        elif name.startswith(MTP_PREFIX):
            raise ModelFormatError(
                f"{tensor.path}: unexpected tensor {tensor.name}: the config has no draft block"
            )


def _check_tensors(folder: Path, table: Mapping[str, WeightEntry], tensors: Mapping[str, FileTensor]) -> None:
    """Every tensor of the table is there in a form its role allows, with its scales, and no other is."""
    expected = dict(_expected(table, tensors))
    for name, tensor in tensors.items():
        wanted = expected.get(name)
        if wanted is None:
            raise ModelFormatError(f"{tensor.path}: unexpected tensor {tensor.name}{_why(name, tensors)}")
        if tensor.stored.dtype != wanted.dtype:
            raise ModelFormatError(
                f"{tensor.path}: {tensor.name} has dtype {tensor.stored.dtype}, not {wanted.dtype}"
            )
        if tensor.stored.shape != wanted.shape:
            raise ModelFormatError(
                f"{tensor.path}: {tensor.name} has shape {tensor.stored.shape}, not {wanted.shape}"
            )
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ModelFormatError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}")


def _expected(
    table: Mapping[str, WeightEntry], tensors: Mapping[str, FileTensor]
) -> Iterator[tuple[str, StoredTensor]]:
    """What should be there, given the dtype that each tensor's values were found with."""
    for name, entry in table.items():
        forms = allowed_forms(entry.role)
        tensor = tensors.get(name)
        if tensor is None:
            yield name, StoredTensor(next(iter(forms)), entry.shape)
        elif tensor.stored.dtype in forms:
            yield from stored_parts(name, entry, tensor.stored.dtype)
        else:
            raise ModelFormatError(
                f"{tensor.path}: {tensor.name} has dtype {tensor.stored.dtype}, not one of {', '.join(forms)}"
            )


def _why(name: str, tensors: Mapping[str, FileTensor]) -> str:
    """Scales of a tensor that has none: the most likely fault deserves its reason."""
    weight = tensors.get(name.removesuffix(SCALE_SUFFIX) + WEIGHT_SUFFIX)
    return f": {weight.name} is {weight.stored.dtype}" if name.endswith(SCALE_SUFFIX) and weight else ""
