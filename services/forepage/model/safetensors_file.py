"""Whole tensors of a safetensors file; the one place that opens such files with the format's own library.

Our own reader sees the header first: a file that lies about its sizes is refused in the same words wherever
it is met, before any of it is mapped. Model checkpoints are read in parts (`checkpoint_reader.py`).
"""

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.safetensors_header import read_header


def read_file(path: Path, *, device: str = "cpu", names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of these names, as far as they are there; of none given, all. On the CPU they are mapped.

    Raises: ModelFormatError naming the file, and the tensor, that is unreadable, truncated or inconsistent.
    """
    kept = None if names is None else set(names)
    wanted = [tensor.name for tensor in read_header(path) if kept is None or tensor.name in kept]
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in wanted}
    except (OSError, MemoryError, SafetensorError) as error:  # MemoryError: it can't be mapped
        raise ModelFormatError(f"{path}: can't read: {error}") from error
