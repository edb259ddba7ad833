"""Every kernel compiles for an H100 as its launcher launches it, and fits its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

HOPPER_SHARED_BYTES = 232_448
"""What one program may take on an H100: 227 KiB."""
OPS = (
    "gather_blocks",
    "gather_rows",
    "memory_indexer",
    "native_indexer",
    "prefill_attention",
    "prefill_indexer",
    "unpack_rows",
    "select_topk",
    "sinkhorn",
    "sparse_decode",
    "compress_quantize",
    "moe",
    "fp8_linear",
    "compress_token",
    "draw_sorted",
    "mix_streams",
    "resolve_rows",
    "row_norm",
    "row_turn",
)


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    rigs = str(script.parents[1])
    env["PYTHONPATH"] = os.pathsep.join(one for one in (rigs, env.get("PYTHONPATH")) if one)
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    shared_bytes: dict[str, int] = json.loads(done.stdout)
    assert {name.split("-")[0] for name in shared_bytes} == set(OPS)
    too_much = {name: size for name, size in shared_bytes.items() if not 0 <= size <= HOPPER_SHARED_BYTES}
    assert not too_much
