"""The memory indexer's tensors on disk: .safetensors, or .pt as the trained ones were released; same names.

    retrievers.l{c4_idx}.{wq_a.weight, q_norm_weight, wq_b.weight, weights_proj.weight}
c4_idx counts the c4 layers from 0: l10, l12 and l20 of the released file are layers 22, 26 and 42 of Flash.
A .pt is a pickle. Only torch's weights-only unpickler ever reads it: it builds tensors and plain containers
and refuses to call anything else. Source of names and dtypes: FlashMemory-DeepSeek-V4.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.safetensors_file import read_file
from forepage.model.safetensors_header import read_header

PREFIX = "retrievers"
ROPE_TABLE_NAME = "freqs_cis"
"""A buffer that released checkpoints carry; recomputed here with the model's recipe, as everywhere."""
PICKLE_SUFFIXES = {".pt", ".pth"}
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_LAYER = re.compile(rf"{PREFIX}\.l(0|[1-9]\d*)\.")
Shapes = Mapping[str, tuple[int, ...]]


def read_tensors(
    path: Path, device: torch.device, check: Callable[[Shapes], None] = lambda _: None
) -> dict[str, Tensor]:
    """Every tensor of the file but RoPE tables, fp32; `check` sees their shapes before any is read.

    Raises: ModelFormatError naming the file, and the key whose value is no plain float tensor; as `check`.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in _mapped(path, check).items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelFormatError(f"{path}: {name} is {tensor.dtype}, wanted float32 or bfloat16")
        # A copy always: what a .pt gives is mapped from the file.
        tensors[name] = tensor.detach().to(device, torch.float32, copy=True).contiguous()
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors, for `read_tensors`. Raises: ModelFormatError for a file that can't be written."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise ModelFormatError(f"{path}: can't write: {error}") from error


def convert(source: Path, target: Path) -> tuple[int, tuple[int, ...]]:
    """Write a released file as safetensors; how many tensors, which c4 layers. Raises: ModelFormatError."""
    tensors = read_tensors(source, torch.device("cpu"))
    layers = target_layers(source, tensors)
    write_tensors(target, tensors)
    return len(tensors), layers


def target_layers(path: Path, names: Iterable[str]) -> tuple[int, ...]:
    """c4 indices that the tensors are for, ascending.

    Raises: ModelFormatError naming a tensor that is no indexer's; or when there is none.
    """
    layers: set[int] = set()
    for name in names:
        match = _LAYER.match(name)
        if match is None:
            raise ModelFormatError(f"{path}: unexpected tensor {name}")
        layers.add(int(match[1]))
    if not layers:
        raise ModelFormatError(f"{path}: no tensor {PREFIX}.l*")
    return tuple(sorted(layers))


def tensor_names(path: Path) -> list[str]:
    """Names that `read_tensors` gives, without reading data. Raises: ModelFormatError, but for dtypes."""
    if path.suffix in PICKLE_SUFFIXES:
        return [name for name, _ in _pickled(path)]
    return [tensor.name for tensor in read_header(path) if not _is_rope_table(tensor.name)]


def _mapped(path: Path, check: Callable[[Shapes], None]) -> dict[str, Tensor]:
    if path.suffix in PICKLE_SUFFIXES:
        tensors = dict(_pickled(path))
        check({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return tensors
    shapes = {t.name: t.stored.shape for t in read_header(path) if not _is_rope_table(t.name)}
    check(shapes)
    return read_file(path, names=shapes)


def _pickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    state = _unpickled(path)
    if not isinstance(state, dict):
        raise ModelFormatError(f"{path}: holds a {type(state).__name__}, wanted a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ModelFormatError(f"{path}: key {name!r} is not a tensor's name")
        if _is_rope_table(name):
            continue
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ModelFormatError(f"{path}: {name} is no plain tensor: {_kind(tensor)}")
        yield name, tensor


def _unpickled(path: Path) -> object:
    try:
        # Mapped where the format allows, so that the RoPE tables, half of the released file, are never read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # Of torch's text only what was found: the rest says how to run such a file all the same.
        found = _GLOBAL.search(str(error))
        what = "what is no tensor" if found is None else f"a call of {found[1]}"
        raise ModelFormatError(f"{path}: refused: it holds {what}, and is not run") from error
    except Exception as error:  # the unpickler lets out whatever a damaged file makes it trip over
        raise ModelFormatError(f"{path}: can't read: {type(error).__name__}: {error}") from error


def _is_rope_table(name: str) -> bool:
    return name.endswith(f".{ROPE_TABLE_NAME}")


def _kind(value: object) -> str:
    return f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
