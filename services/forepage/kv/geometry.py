"""Byte sizes of everything a sequence's KV is made of, computed from the model's config.

Every other module asks here; nothing is hard-coded for V4-Flash. Two facts shape the layout:
residency is global over layers, so one block is one contiguous record; rows and indexer keys are
separate ranges of it, because `exact` keeps every key on the GPU but not every row.

Record of one block (offsets for V4-Flash):
    0          rows   21 layers x 37,440 B   64 x 576 values, 64 x 8 scales, padded
    786,240    keys   21 layers x  8,448 B   64 x 128 values, 64 x 4 scales
    963,648    c128   20 layers x  1,168 B   2 x 576 values, 2 x 8 scales
    987,008    end
Source of the row formats: DeepSeek-V4 `fp8_ds_mla` rows (584 B), FP8 (132 B) and MXFP4 (68 B) indexer keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from forepage.errors import ModelFormatError

BLOCK_ENTRIES = 64
C4_RATIO = 4
C128_RATIO = 128
SCALE_GROUP = 64
MXFP4_GROUP = 32
SCALE_ALIGN = 8
SLOT_ALIGN = 4096
STATE_WINDOW = 8
"""Token slots of an open c4 window: the previous one (A halves) and the current one (B halves)."""


class KvFormat(StrEnum):
    """How rows are stored: `fp8` is the model's own cache format, `fp32` (keys too) is for parity tests."""

    FP8 = "fp8"
    FP32 = "fp32"


class KeyFormat(StrEnum):
    """How indexer keys are stored beside fp8 rows.

    `mxfp4` holds what the model was trained with (keys and queries rounded to FP4, so selections are the
    reference's); `fp8` keeps more precision than that in twice the bytes. fp32 rows come with fp32 keys.
    """

    FP8 = "fp8"
    MXFP4 = "mxfp4"
    FP32 = "fp32"


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class KvGeometry:
    """Sizes in bytes and counts of one sequence's KV; see the module's table for the order."""

    c4_layers: tuple[int, ...]
    c128_layers: tuple[int, ...]
    num_layers: int
    head_dim: int
    rope_dims: int
    index_dims: int
    window_tokens: int
    format: KvFormat
    key_format: KeyFormat
    block_entries: int = BLOCK_ENTRIES

    @classmethod
    def from_config(
        cls, config: Mapping[str, object], kv_format: KvFormat, key_format: KeyFormat = KeyFormat.FP8
    ) -> "KvGeometry":
        """Read the layer types and dims of an official config; fp32 rows have fp32 keys, whatever is asked.

        Raises: ModelFormatError naming the field.
        """
        num_layers = _int(config, "num_hidden_layers")
        ratios = config.get("compress_ratios")
        if not isinstance(ratios, list | tuple) or len(ratios) < num_layers:
            raise ModelFormatError(f"config: compress_ratios must list at least {num_layers} layers")
        used = [int(ratio) for ratio in ratios[:num_layers]]
        unknown = sorted(set(used) - {0, C4_RATIO, C128_RATIO})
        if unknown:
            raise ModelFormatError(f"config: compress_ratios has {unknown}; only 0, 4 and 128 are known")
        index_dims = _int(config, "index_head_dim")
        keys = KeyFormat.FP32 if kv_format is KvFormat.FP32 else key_format
        if keys is KeyFormat.MXFP4 and index_dims % MXFP4_GROUP:
            raise ModelFormatError(
                f"config: index_head_dim {index_dims} has no whole groups of {MXFP4_GROUP}"
            )
        return cls(
            c4_layers=tuple(i for i, ratio in enumerate(used) if ratio == C4_RATIO),
            c128_layers=tuple(i for i, ratio in enumerate(used) if ratio == C128_RATIO),
            num_layers=num_layers,
            head_dim=_int(config, "head_dim"),
            rope_dims=_int(config, "qk_rope_head_dim"),
            index_dims=index_dims,
            window_tokens=_int(config, "sliding_window"),
            format=kv_format,
            key_format=keys,
        )

    @property
    def block_tokens(self) -> int:
        """Tokens one block stands for: 256."""
        return self.block_entries * C4_RATIO

    @property
    def c128_rows_per_block(self) -> int:
        """c128 rows of one layer that a block's tokens give: 2."""
        return self.block_tokens // C128_RATIO

    @property
    def nope_dims(self) -> int:
        """Row dims without RoPE: 448."""
        return self.head_dim - self.rope_dims

    @property
    def row_value_bytes(self) -> int:
        """Bytes of a row's values: 576 (448 e4m3 + 64 bf16)."""
        if self.format is KvFormat.FP32:
            return 4 * self.head_dim
        return self.nope_dims + 2 * self.rope_dims

    @property
    def row_scale_bytes(self) -> int:
        """Bytes of a row's UE8M0 scales, padded to 8; none in fp32."""
        if self.format is KvFormat.FP32:
            return 0
        return round_up(-(-self.nope_dims // SCALE_GROUP), SCALE_ALIGN)

    @property
    def row_bytes(self) -> int:
        """One row, values and scales: 584."""
        return self.row_value_bytes + self.row_scale_bytes

    @property
    def rows_plane_bytes(self) -> int:
        """One layer's rows of a block, padded to a multiple of the value bytes: 37,440."""
        return round_up(self.block_entries * self.row_bytes, self.row_value_bytes)

    @property
    def rows_bytes(self) -> int:
        """All layers' rows of a block: what a row block of the GPU pool holds."""
        return len(self.c4_layers) * self.rows_plane_bytes

    @property
    def key_value_bytes(self) -> int:
        """Bytes of an indexer key's values: 128 in fp8, 64 in mxfp4."""
        if self.key_format is KeyFormat.MXFP4:
            return self.index_dims // 2
        return self.index_dims * (4 if self.key_format is KeyFormat.FP32 else 1)

    @property
    def key_scale_bytes(self) -> int:
        """Bytes of an indexer key's scales: one fp32 in fp8, a UE8M0 per 32 dims in mxfp4, none in fp32."""
        if self.key_format is KeyFormat.MXFP4:
            return self.index_dims // MXFP4_GROUP
        return 0 if self.key_format is KeyFormat.FP32 else 4

    @property
    def key_bytes(self) -> int:
        """One indexer key: 132 in fp8, 68 in mxfp4."""
        return self.key_value_bytes + self.key_scale_bytes

    @property
    def keys_plane_bytes(self) -> int:
        """One layer's indexer keys of a block: 8,448 in fp8, 4,352 in mxfp4."""
        return self.block_entries * self.key_bytes

    @property
    def keys_bytes(self) -> int:
        """All layers' indexer keys of a block: what a key block of the GPU pool holds."""
        return len(self.c4_layers) * self.keys_plane_bytes

    @property
    def c128_plane_bytes(self) -> int:
        """One layer's c128 rows of a block: 1,168."""
        return self.c128_rows_per_block * self.row_bytes

    @property
    def c128_bytes(self) -> int:
        """All layers' c128 rows of a block."""
        return len(self.c128_layers) * self.c128_plane_bytes

    @property
    def keys_offset(self) -> int:
        """Where the keys begin in a block record (rows begin at 0)."""
        return self.rows_bytes

    @property
    def c128_offset(self) -> int:
        """Where the c128 rows begin in a block record."""
        return self.rows_bytes + self.keys_bytes

    @property
    def record_bytes(self) -> int:
        """A whole block record: 987,008."""
        return self.rows_bytes + self.keys_bytes + self.c128_bytes

    @property
    def slot_bytes(self) -> int:
        """An arena slot: the record, rounded up to whole pages."""
        return round_up(self.record_bytes, SLOT_ALIGN)

    @property
    def window_plane_bytes(self) -> int:
        """One layer's ring of sliding-window rows: 128 x 584."""
        return self.window_tokens * self.row_bytes

    @property
    def window_bytes(self) -> int:
        """Every layer's sliding window: what one sequence slot of the window pool holds."""
        return self.num_layers * self.window_plane_bytes

    @cached_property
    def c4_state_floats(self) -> int:
        """fp32 values of one sequence's c4 compressor state, main rows and keys (kv and gate)."""
        return len(self.c4_layers) * 2 * STATE_WINDOW * 2 * (self.head_dim + self.index_dims)

    @cached_property
    def c128_state_floats(self) -> int:
        """fp32 values of one sequence's c128 compressor state (kv and gate)."""
        return len(self.c128_layers) * 2 * C128_RATIO * self.head_dim

    @property
    def state_bytes(self) -> int:
        """Compressor state of one sequence: 12,206,080."""
        return 4 * (self.c4_state_floats + self.c128_state_floats)

    @property
    def resume_bytes(self) -> int:
        """A resume record, taken where n % 256 == 0: windows and the closed c4 windows' A halves.

        At such a point no c128 window is open, and of the c4 state only the previous window's
        4 tokens x A half x (kv, gate) will be read again.
        """
        a_halves = len(self.c4_layers) * 2 * C4_RATIO * (self.head_dim + self.index_dims)
        return self.window_bytes + 4 * a_halves

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens touch, the one under construction included."""
        return -(-num_tokens // self.block_tokens)

    def fixed_bytes(self, num_tokens: int) -> int:
        """GPU bytes a sequence holds in every mode: window, compressor state, c128 rows."""
        return self.window_bytes + self.state_bytes + self.num_blocks(num_tokens) * self.c128_bytes

    def kv_bytes(self, *, num_tokens: int, row_blocks: float, key_blocks: float) -> float:
        """GPU bytes of a sequence that holds that many row and key blocks (averages are allowed)."""
        return self.fixed_bytes(num_tokens) + row_blocks * self.rows_bytes + key_blocks * self.keys_bytes


V4_FLASH = KvGeometry(
    c4_layers=tuple(range(2, 43, 2)),
    c128_layers=tuple(range(3, 43, 2)),
    num_layers=43,
    head_dim=512,
    rope_dims=64,
    index_dims=128,
    window_tokens=128,
    format=KvFormat.FP8,
    key_format=KeyFormat.FP8,
)
"""The released V4-Flash: what resident sets of other models are also priced at (`footprint_flash`)."""


def _int(config: Mapping[str, object], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelFormatError(f"config: {name} must be a positive integer, got {value!r}")
    return value
