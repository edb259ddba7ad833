"""A checkpoint comes back as it was saved, in small files; a save that is cut off anywhere costs nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forepage.training.backbone import checkpoint
from forepage.training.backbone.checkpoint import MAX_FILE_BYTES, Progress

FIRST = Progress(stage=1, step=7, total_steps=19, stage_seconds=2.5, seconds=8.25, tokens=1 << 40)
MASTERS = {"layers.0.attn.wkv.weight": torch.randn(5, 3), "ffn.gate.tid2eid": torch.arange(4)}
MOMENTS = {"muon.0": torch.randn(4, 4), "adam.0.step": torch.tensor(3.0), "adam.0.exp_avg": torch.randn(3)}


class CutOffError(Exception):
    """The process is gone."""


def save(folder: Path, progress: Progress, *, value: int = 0, moments: str = "float32") -> None:
    masters = {name: master + value for name, master in MASTERS.items()}
    checkpoint.save(folder, progress, masters, MOMENTS, moments=moments)


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    save(tmp_path, FIRST)
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.progress == FIRST
    assert_equal(found.masters, MASTERS)
    assert_equal(found.optimizer, MOMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"], "nothing is left beside it"


@pytest.mark.parametrize("moments", ["bfloat16", "none"])
def test_moments_are_kept_as_asked_and_masters_always_whole(tmp_path: Path, moments: str) -> None:
    save(tmp_path, FIRST, moments=moments)
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert_equal(found.masters, MASTERS)
    kept = {name: value.bfloat16() if value.dim() else value for name, value in MOMENTS.items()}
    assert_equal(found.optimizer, kept if moments == "bfloat16" else {})


def test_parts_are_small_and_hold_each_tensor_once(tmp_path: Path) -> None:
    sizes = (3 << 20, 1 << 20, 2 << 20, MAX_FILE_BYTES // 4, 1, 1 << 20)
    masters = {f"m{idx}": torch.full((size,), float(idx)) for idx, size in enumerate(sizes)}
    checkpoint.save(tmp_path, FIRST, masters, {}, moments="float32")
    parts = sorted((tmp_path / "checkpoint").glob("part-*.safetensors"))
    names = [name for part in parts for name in load_file(part)]
    assert sorted(names) == sorted(f"master.{name}" for name in masters)
    assert len(parts) > 2
    assert all(part.stat().st_size <= 16 << 20 for part in parts)
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert_equal(found.masters, masters)


def cut_off_at(monkeypatch: pytest.MonkeyPatch, call: int) -> Callable[[], int]:
    """Every change of the file system counts; the one of this number, and all after it, don't happen."""
    counted = [0]

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted_change(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            if counted[0] >= call:
                raise CutOffError
            return change(*args, **kwargs)

        return counted_change

    for name in ("rename", "mkdir", "write_text"):
        monkeypatch.setattr(Path, name, counting(getattr(Path, name)))
    monkeypatch.setattr(checkpoint, "save_file", counting(save_file))
    for name in ("unlink", "rmdir"):  # removing a folder is many changes
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", removing_one_by_one)
    return lambda: counted[0]


def removing_one_by_one(folder: Path, *, ignore_errors: bool) -> None:
    assert ignore_errors
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            os.unlink(path)
        os.rmdir(folder)


def test_a_save_cut_off_anywhere_leaves_the_old_or_the_new_one_whole(tmp_path: Path) -> None:
    """And so does the next save after it, cut off anywhere too."""
    number, finished, seen = 0, False, set()
    while not finished:
        number += 1
        again, second_finished = 0, False
        while not second_finished:
            again += 1
            folder = tmp_path / f"{number}-{again}"
            save(folder, Progress(step=1), value=1)
            finished = cut_save(folder, number, step=2)
            survived = assert_whole(folder)
            seen.add(survived)
            second_finished = cut_save(folder, again, step=3)
            assert assert_whole(folder) in (survived, 3)
            save(folder, Progress(step=4), value=4)
            assert assert_whole(folder) == 4
            assert [path.name for path in folder.iterdir()] == ["checkpoint"]
    assert number > 8
    assert seen == {1, 2}


def cut_save(folder: Path, call: int, *, step: int) -> bool:
    """Whether the save came to its end before its change of that number."""
    with pytest.MonkeyPatch.context() as patch:
        cut_off_at(patch, call)
        try:
            save(folder, Progress(step=step), value=step)
        except CutOffError:
            return False
    return True


def assert_whole(folder: Path) -> int:
    """The step of the checkpoint that is found, after checking that all of it is."""
    found = checkpoint.load(folder)
    assert found is not None
    step = found.progress.step
    assert_equal(found.masters, {name: master + step for name, master in MASTERS.items()})
    assert_equal(found.optimizer, MOMENTS)
    return step


def test_a_first_save_that_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    call, finished = 0, False
    while not finished:
        call += 1
        folder = tmp_path / str(call)
        finished = cut_save(folder, call, step=1)
        found = checkpoint.load(folder)
        assert found is None or assert_whole(folder) == 1
    assert found is not None
    state = json.loads((folder / "checkpoint" / "state.json").read_text(encoding="utf-8"))
    assert state["version"] == checkpoint.VERSION
