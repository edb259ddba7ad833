"""Sizes at V4-Flash and Pro, against the published formats."""

import pytest

from forepage.errors import ModelFormatError
from forepage.kv.geometry import KvFormat, KvGeometry

FLASH = {
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "sliding_window": 128,
}


def test_geometry_of_flash_is_the_published_one() -> None:
    flash = KvGeometry.from_config(FLASH, KvFormat.FP8)
    assert (flash.row_bytes, flash.key_bytes) == (584, 132)
    assert (flash.rows_plane_bytes, flash.keys_plane_bytes) == (37_440, 8_448)
    assert (len(flash.c4_layers), len(flash.c128_layers)) == (21, 20)
    assert flash.window_bytes == 3_214_336
    assert flash.state_bytes == 12_206_080
    assert flash.record_bytes == 21 * (37_440 + 8_448) + 20 * 2 * 584
    assert flash.slot_bytes % 4096 == 0
    assert flash.resume_bytes == 3_214_336 + 430_080


@pytest.mark.parametrize(
    ("tokens", "published"),
    [(65_536, 255_544_320), (262_144, 1_012_534_272), (1_048_576, 4_040_494_080)],
)
def test_geometry_of_flash_costs_what_is_published(tokens: int, published: int) -> None:
    """Within the page padding (64 B a layer and block), without the compressor state."""
    flash = KvGeometry.from_config(FLASH, KvFormat.FP8)
    blocks = flash.num_blocks(tokens)
    held = flash.kv_bytes(num_tokens=tokens, row_blocks=blocks, key_blocks=blocks) - flash.state_bytes
    assert held - published == blocks * 21 * 64


def test_geometry_names_the_field_that_is_wrong() -> None:
    with pytest.raises(ModelFormatError, match="head_dim"):
        KvGeometry.from_config({**FLASH, "head_dim": "512"}, KvFormat.FP8)
    with pytest.raises(ModelFormatError, match="compress_ratios"):
        KvGeometry.from_config({**FLASH, "compress_ratios": [0, 2, *[4] * 41]}, KvFormat.FP8)
