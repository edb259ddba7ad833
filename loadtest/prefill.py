"""How long the model takes to prefill a prompt, layer by layer kernels and all, without a worker.

    python -m loadtest.prefill --lengths 65536 --lengths 524288 --out loadtest/results

One JSON a run in the shape of every committed measurement, and a table. Weights are drawn from a seed, which
does not change the time: every token selects `index_topk` entries whatever they score.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from torch import Tensor

from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.kv_pools import KvPools, PoolCapacity, PrefillChunk
from forepage.model.spec import ModelSpec
from forepage.model.transformer import Transformer
from forepage.model.weights import seeded_weights
from loadtest.result_file import result_file

TINY = Path(__file__).parents[1] / "services/forepage/model/bundled/tiny/config.json"
SEED = 0


def main(
    lengths: Annotated[list[int], typer.Option(help="tokens of a prompt; several may be given")],
    chunk: Annotated[int, typer.Option(help="tokens of a step")] = 4096,
    config: Annotated[Path | None, typer.Option(help="a config.json; none: forepage-tiny's")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for prefill.json and .md")] = None,
) -> None:
    """Prefill prompts of random tokens of these lengths and say how long each took."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a CUDA device")
    device = torch.device("cuda", 0)
    fields: dict[str, object] = json.loads((config or TINY).read_text())
    spec, geometry = ModelSpec.from_config(fields), KvGeometry.from_config(fields, KvFormat.FP8)
    weights = seeded_weights(spec, SEED, dtype=torch.bfloat16, device=device)
    transformer = Transformer(spec, geometry, weights, device)
    rows: list[dict[str, object]] = []
    with torch.inference_mode():
        prefill_seconds(transformer, 4 * chunk, chunk)  # compiles
        for length in lengths:
            torch.cuda.reset_peak_memory_stats()
            seconds = prefill_seconds(transformer, length, chunk)
            peak = torch.cuda.max_memory_allocated()
            rows.append(
                {
                    "prompt_tokens": length,
                    "chunk_tokens": chunk,
                    "seconds": round(seconds, 4),
                    "tokens_per_s": round(length / seconds),
                    "peak_gpu_bytes": peak,
                }
            )
            typer.echo(f"{length:9,} tokens {seconds:8.3f} s {length / seconds:12,.0f} tokens/s", err=True)
    typer.echo(_table(rows))
    if out is not None:
        _write(out, rows, {"seed": SEED} | fields)


def prefill_seconds(transformer: Transformer, length: int, chunk: int) -> float:
    """Wall time of one prompt's prefill in chunks, on pools that hold all of it."""
    geometry, device = transformer.geometry, transformer.device
    blocks = geometry.num_blocks(length)
    pools = KvPools.allocate(geometry, PoolCapacity(1, blocks, blocks, blocks), device)
    table = torch.arange(blocks, dtype=torch.int32, device=device)
    tokens = _tokens(transformer.spec, length).to(device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for start in range(0, length, chunk):
        part = tokens[start : start + chunk]
        transformer.prefill(part, PrefillChunk(0, start, table, table, table), pools)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _tokens(spec: ModelSpec, length: int) -> Tensor:
    return torch.randint(spec.vocab_size, (length,), generator=torch.Generator().manual_seed(SEED))


def _table(rows: list[dict[str, object]]) -> str:
    names = list(rows[0]) if rows else []
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(f"{row[name]:,}" for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _write(out: Path, rows: list[dict[str, object]], config: dict[str, object]) -> None:
    properties = torch.cuda.get_device_properties(0)
    result = result_file(
        "prefill of one prompt by the model alone",
        command="python -m loadtest.prefill --out loadtest/results"
        + "".join(f" --lengths {row['prompt_tokens']}" for row in rows),
        device={"gpu": properties.name, "torch": torch.__version__, "triton": triton.__version__},
        config=config,
        why={"ceilings": "its kernels' are in kernels/bench/results.json"},
        rows=rows,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "prefill.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "prefill.md").write_text(_table(rows))


if __name__ == "__main__":
    typer.run(main)
