"""Tiny checkpoints in the release's format: FP8 and MXFP4 with block scales, index, shards, draft block.

Stored bytes are drawn, not quantised from something: every code occurs, and what they mean is for the test
to say. Values are spread so that a model of them has logits of about unit scale.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from forepage.model.spec import ModelSpec
from forepage.model.stored_form import StoredTensor, announced_tensors

INDEX_FILE = "model.safetensors.index.json"
SEED = 3
E4M3_STD = 100.0
E2M1_STD = 2.9
"""What evenly drawn codes spread by."""


def stored_tensors(config: Mapping[str, object], seed: int = SEED) -> dict[str, Tensor]:
    """Every tensor that a release with this config holds, as stored, by official name."""
    spec = ModelSpec.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    announced = announced_tensors(spec, config)
    return {name: _draw(name, announced, spec, generator) for name in sorted(announced)}


def write_checkpoint(
    folder: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    *,
    num_shards: int = 3,
    with_index: bool = True,
) -> None:
    """config.json, the tensors dealt over shards in name order, and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    per_shard = -(-len(names) // num_shards)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        held = names[shard * per_shard : (shard + 1) * per_shard]
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    if with_index:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index))


def _draw(
    name: str, announced: Mapping[str, StoredTensor], spec: ModelSpec, generator: torch.Generator
) -> Tensor:
    """One tensor as stored."""
    shape, dtype = announced[name].shape, announced[name].dtype
    if dtype == "F8_E4M3":
        # Bits 0..6 below 0x7f: every finite code of both signs.
        magnitude = torch.randint(0x7F, shape, dtype=torch.uint8, generator=generator)
        sign = torch.randint(2, shape, dtype=torch.uint8, generator=generator) << 7
        return (magnitude | sign).view(torch.float8_e4m3fn)
    if dtype == "I8":
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    if dtype == "F8_E8M0":
        weight = announced[name.removesuffix("scale") + "weight"]
        is_fp4 = weight.dtype == "I8"
        inputs = weight.shape[1] * (2 if is_fp4 else 1)
        wanted = 1 / math.sqrt(inputs) / (E2M1_STD if is_fp4 else E4M3_STD)
        middle = 127 + round(math.log2(wanted))
        # Neighbours always differ, so that a scale taken from next door is seen.
        codes = torch.arange(shape[0]).unsqueeze(1) + torch.arange(shape[1])
        return (codes % 3 + middle - 1).to(torch.uint8).view(torch.float8_e8m0fnu)
    if dtype == "I64":
        order = torch.rand(shape[0], spec.num_experts, generator=generator).argsort(dim=-1)
        return order[:, : shape[1]].contiguous()  # distinct experts for each token
    is_factor = "norm" in name or name.endswith("_scale")
    spread = 0.2 if is_factor else 1.0 if name == "embed.weight" else 1 / math.sqrt(shape[-1])
    values = (torch.rand(shape, generator=generator) * 2 - 1) * (math.sqrt(3) * spread) + is_factor
    return values.to(torch.bfloat16 if dtype == "BF16" else torch.float32)
