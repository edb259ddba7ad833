"""What makes two workers' KV interchangeable: a digest of config, weights, their dtype and KV format."""

import hashlib
from pathlib import Path

from forepage.kv.geometry import KeyFormat, KvFormat
from forepage.model.checkpoint import weight_files
from forepage.settings import WeightDtype

LAYOUT_VERSION = 1
"""Of the block records' content; another version's blocks are never reused."""
HEAD_BYTES = 1 << 20


def model_fingerprint(
    folder: Path,
    kv_format: KvFormat,
    key_format: KeyFormat = KeyFormat.FP8,
    weight_dtype: WeightDtype = WeightDtype.FP32,
) -> str:
    """Hex digest over config.json and each weight file's name, size, first and last MiB.

    Reading whole checkpoints (160 GB) at every start would cost minutes; a safetensors header names
    every tensor with its offsets, so a swapped file differs there or in its size. The dtype counts because
    a block that a bf16 worker wrote would change the tokens of an fp32 worker.
    """
    formats = f"forepage-{LAYOUT_VERSION}-{kv_format}-{key_format}-{weight_dtype}"
    state = hashlib.blake2b(formats.encode(), digest_size=16)
    state.update((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        state.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            state.update(file.read(HEAD_BYTES))
            file.seek(max(0, size - HEAD_BYTES))
            state.update(file.read(HEAD_BYTES))
    return state.hexdigest()
