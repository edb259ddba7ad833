"""Blocks are shared only between workers of one model in one format."""

from itertools import pairwise
from pathlib import Path

from forepage.kv.geometry import KeyFormat, KvFormat
from forepage.model.fingerprint import HEAD_BYTES, model_fingerprint
from forepage.settings import WeightDtype


def make_folder(path: Path, config: str = "{}", weights: bytes = b"w" * 100) -> Path:
    """A model folder with one file of weights."""
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_fingerprint_is_the_contents_not_the_places(tmp_path: Path) -> None:
    one, two = make_folder(tmp_path / "a"), make_folder(tmp_path / "b")
    assert model_fingerprint(one, KvFormat.FP8) == model_fingerprint(two, KvFormat.FP8, KeyFormat.FP8)


def test_fingerprint_differs_by_config_weights_and_formats(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    big = b"w" * (2 * HEAD_BYTES)
    found = [
        model_fingerprint(folder, KvFormat.FP8),
        model_fingerprint(folder, KvFormat.FP8, KeyFormat.MXFP4),
        model_fingerprint(folder, KvFormat.FP32),
        model_fingerprint(folder, KvFormat.FP8, weight_dtype=WeightDtype.BF16),
        model_fingerprint(make_folder(tmp_path / "b", config='{"a": 1}'), KvFormat.FP8),
        model_fingerprint(make_folder(tmp_path / "c", weights=b"v" * 100), KvFormat.FP8),
        model_fingerprint(make_folder(tmp_path / "d", weights=big), KvFormat.FP8),
        model_fingerprint(make_folder(tmp_path / "e", weights=big[:-1] + b"x"), KvFormat.FP8),
    ]
    assert all(one != two for one, two in pairwise(sorted(found)))
