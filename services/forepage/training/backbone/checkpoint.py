"""A run that can go on: masters, optimiser, and where it stands, in files of at most 16 MiB.

Safetensors and JSON only. A checkpoint is written beside the last one and then takes its place by two
renames: wherever a save is cut off, `load` finds the last whole one.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.safetensors_file import read_file

FOLDER = "checkpoint"
NEW, OLD = f"{FOLDER}.new", f"{FOLDER}.old"
STATE_FILE = "state.json"
MAX_FILE_BYTES = 15 << 20
VERSION = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands: stage and step give the next batch, seconds the schedule."""

    stage: int = 0
    step: int = 0  # of the stage
    total_steps: int = 0
    stage_seconds: float = 0.0
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """What was saved; `masters` by official name, `optimizer` as `Optimizer.state`."""

    progress: Progress
    masters: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save(
    folder: Path,
    progress: Progress,
    masters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    *,
    moments: str,
) -> None:
    """Replace `folder`/checkpoint. Masters stay fp32; `moments`: a dtype, or "none" to leave them out."""
    tensors = {f"master.{name}": value.detach().cpu().contiguous() for name, value in masters.items()}
    kept = {} if moments == "none" else optimizer
    for name, value in kept.items():
        dtype = torch.float32 if value.dim() == 0 else getattr(torch, moments)
        tensors[f"optimizer.{name}"] = value.detach().to("cpu", dtype).contiguous()
    new, final, old = (folder / name for name in (NEW, FOLDER, OLD))
    _settle(folder)
    new.mkdir(parents=True)
    for idx, part in enumerate(_parts(tensors)):
        save_file(part, new / f"part-{idx:02d}.safetensors")
    state = {"version": VERSION, **asdict(progress)}
    unnamed = new / f"{STATE_FILE}.part"
    unnamed.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    unnamed.rename(new / STATE_FILE)  # last, and at once: a folder with a state is whole
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`/checkpoint, if there is one. Raises: ModelFormatError: another version."""
    whole = [folder / name for name in (FOLDER, NEW) if (folder / name / STATE_FILE).exists()]
    if not whole:
        return None
    path = whole[0]
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if state.pop("version", None) != VERSION:
        raise ModelFormatError(f"{path / STATE_FILE}: not a checkpoint of version {VERSION}")
    masters: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for part in sorted(path.glob("part-*.safetensors")):
        for name, value in read_file(part).items():
            kind, _, rest = name.partition(".")
            (masters if kind == "master" else optimizer)[rest] = value
    return Checkpoint(Progress(**state), masters, optimizer)


def _settle(folder: Path) -> None:
    """Make room for a save: what one that was cut off left, if it is all there is, becomes the checkpoint."""
    new, final = folder / NEW, folder / FOLDER
    if not (final / STATE_FILE).exists() and (new / STATE_FILE).exists():
        shutil.rmtree(final, ignore_errors=True)
        new.rename(final)
    for name in (NEW, OLD):
        shutil.rmtree(folder / name, ignore_errors=True)


def _parts(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Groups of at most MAX_FILE_BYTES, in order; no tensor is larger than that."""
    parts: list[dict[str, Tensor]] = [{}]
    room = MAX_FILE_BYTES
    for name, value in tensors.items():
        if value.nbytes > room and parts[-1]:
            parts.append({})
            room = MAX_FILE_BYTES
        parts[-1][name] = value
        room -= value.nbytes
    return parts
