"""Files of tensors whose header claims what is not there: refused by name by everything that opens one.

Read in a process that may have 256 MiB more than it has when it begins; a sound claim of 2 GiB is among them,
as a file with a hole.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rigs.claimed_sizes import READERS, SPEC

KEY = "retrievers.l0.wq_a.weight"
HUGE_RANK = (1 << 29) // SPEC.hidden_size


def file_of(header: dict[str, Any] | bytes, num_data: int, *, length: int | None = None) -> tuple[bytes, int]:
    """The first bytes of a file, and how long it is; `length` is what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    return claimed.to_bytes(8, "little") + text, 8 + len(text) + num_data


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SOUND = {KEY: tensor([4], [0, 16])}
"""Sixteen bytes."""


@dataclass(frozen=True)
class Claim:
    """A file's first bytes and size, and what the refusal says."""

    file: tuple[bytes, int]
    says: str


CLAIMS = {
    "a header of 2^60 bytes": Claim(file_of(SOUND, 16, length=1 << 60), "do not hold the header"),
    "a header of 2^31 bytes": Claim(file_of(SOUND, 16, length=1 << 31), "do not hold the header"),
    "a header of 2^64 - 1 bytes": Claim(file_of(SOUND, 16, length=(1 << 64) - 1), "do not hold the header"),
    "a header as long as a file of 2^31 bytes": Claim(
        file_of(b"{", 1 << 31, length=1 << 31), "a header of 2147483648 bytes is not safetensors'"
    ),
    "a tensor of 2^60 bytes": Claim(
        file_of({KEY: tensor([1 << 58], [0, 1 << 60])}, 16), "truncated in retrievers.l0.wq_a.weight"
    ),
    "a tensor of 2^31 bytes": Claim(
        file_of({KEY: tensor([1 << 29], [0, 1 << 31])}, 16), "truncated in retrievers.l0.wq_a.weight"
    ),
    "a shape of 2^60 bytes over 16": Claim(
        file_of({KEY: tensor([1 << 58], [0, 16])}, 16), "takes 1152921504606846976 bytes"
    ),
    "a shape whose size is 0 in 64 bits": Claim(
        file_of({KEY: tensor([1 << 32, 1 << 32], [0, 0])}, 0), "takes 73786976294838206464 bytes"
    ),
    "offsets that overlap": Claim(
        file_of({KEY: tensor([4], [0, 16]), "b": tensor([4], [8, 24])}, 24),
        "doesn't follow the tensor before",
    ),
    "offsets past the file": Claim(
        file_of({KEY: tensor([4], [1 << 40, (1 << 40) + 16])}, 16), "doesn't follow the tensor before"
    ),
    "offsets that end before they begin": Claim(
        file_of({KEY: tensor([4], [16, 0])}, 16), "the header gives it -16"
    ),
    "offsets below nothing": Claim(file_of({KEY: tensor([4], [-16, 0])}, 16), "data_offsets [-16, 0]"),
    "offsets beyond 64 bits": Claim(
        file_of({KEY: tensor([4], [1 << 70, (1 << 70) + 16])}, 16), "doesn't follow the tensor before"
    ),
}
SMALL, HUGE = "a sound file", "2^31 bytes, which are there"
BEHIND_A_SOUND_HEADER = {
    "model": "unexpected tensor retrievers.l0.wq_a.weight",
    "model's own indexers": "tensor layers.2.attn.wq_a.weight is missing",
    "memory indexer": "tensor retrievers.l0.q_norm_weight is missing",
    "named memory indexer": "tensor retrievers.l0.q_norm_weight is missing",
    "dump": "tensor 'golden_counts' is missing",
    "exported weights": "'NoneType' object has no attribute",  # there is no network to put them into
}
"""By who takes not every tensor."""
OF_A_HUGE_FILE = {
    "model": "unexpected tensor retrievers.l0.wq_a.weight",
    "memory indexer": f"q_norm_weight has shape (64,), wanted ({HUGE_RANK},)",
    "named memory indexer": f"q_norm_weight has shape (64,), wanted ({HUGE_RANK},)",
    "names of a memory indexer": "taken",
}
"""By who needs no more than the header to know."""


def huge_indexer() -> tuple[bytes, int]:
    """A memory indexer's tensors, one of them of 2^31 bytes."""
    shapes = {
        "wq_a.weight": [HUGE_RANK, SPEC.hidden_size],
        "q_norm_weight": [64],
        "wq_b.weight": [8 * SPEC.index_dims, 64],
        "weights_proj.weight": [8, SPEC.hidden_size],
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[f"retrievers.l0.{name}"] = tensor(shape, [begin, end])
    return file_of(header, end)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process printed."""
    folder = tmp_path_factory.mktemp("claims")
    files = {name: claim.file for name, claim in CLAIMS.items()}
    files |= {SMALL: file_of(SOUND, 16), HUGE: huge_indexer()}
    for name, (head, size) in files.items():
        path = folder / f"{name}.safetensors"
        path.write_bytes(head)
        os.truncate(path, size)
    command = [sys.executable, "-m", "rigs.claimed_sizes", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    tests = Path(__file__).parents[1]
    ran = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    printed: dict[str, Any] = json.loads(ran.stdout)
    return printed


@pytest.mark.parametrize("who", READERS)
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_header_that_claims_too_much_is_refused_by_name(
    answers: dict[str, Any], who: str, claim: str
) -> None:
    fate: str = answers["fates"][who][claim]
    assert fate.startswith("model_format_error: ")
    assert Path(READERS[who][0]).name in fate
    assert CLAIMS[claim].says in fate


@pytest.mark.parametrize("who", READERS)
def test_a_sound_file_gets_past_its_header(answers: dict[str, Any], who: str) -> None:
    assert BEHIND_A_SOUND_HEADER.get(who, "taken") in answers["fates"][who][SMALL]


@pytest.mark.parametrize("who", READERS)
def test_a_file_larger_than_memory_is_refused_by_its_shapes_or_not_mapped(
    answers: dict[str, Any], who: str
) -> None:
    assert OF_A_HUGE_FILE.get(who, ".safetensors: can't read: Cannot allocate") in answers["fates"][who][HUGE]


def test_nothing_was_allocated_and_the_limit_was_one(answers: dict[str, Any]) -> None:
    assert answers["grown_bytes"] < 64 << 20
    assert answers["limit"] == "UNTYPED MemoryError: "
