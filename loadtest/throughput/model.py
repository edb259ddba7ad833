"""Model folders with random weights in the release's format: the worker loads them as it loads any."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from forepage.model.spec import ModelSpec
from forepage.model.stored_form import StoredTensor, announced_tensors
from forepage.settings import SEEDED_MODEL
from loadtest.decode.synthetic import bundled_config, flash_config

INDEX_FILE = "model.safetensors.index.json"
"""Written last: with it a folder is whole."""
FLASH_LAYERS, STORED_EXPERTS = 43, 32
QUANTISED = {"quant_method": "fp8"}
DRAWN_BYTES = 1 << 24
"""Random bytes drawn; larger tensors repeat them, which no kernel's time depends on."""
E8M0_ONE, E8M0_SMALL = 127, 127 - 13
"""Scales: at 2^-13 matrices of evenly drawn e4m3 codes, of some thousand columns, keep sizes as they are."""
SEED = 0
FILE_BYTES = 2 << 30


def model_config(name: str) -> dict[str, object]:
    """`flash`: V4-Flash's sizes, 32 of its 256 experts; `tiny`: the bundled seeded model, to try it all."""
    if name == "tiny":
        return bundled_config()
    config = flash_config(num_layers=FLASH_LAYERS, num_experts=STORED_EXPERTS)
    return config | {"quantization_config": QUANTISED}


def indexer_config(config: Mapping[str, object]) -> dict[str, object]:
    """A seeded memory indexer: of the released one's shape where the model is as large."""
    if ModelSpec.from_config(config).num_layers < FLASH_LAYERS:
        return dict(json.loads((SEEDED_MODEL / "memory_indexer.json").read_text()))
    return {"target_layers": [10, 12, 20], "heads": 128, "rank": 1024, "threshold": 0.5, "seed": 1}


def write_model(folder: Path, config: Mapping[str, object]) -> None:
    """Write config, tokenizer, memory indexer and weights; 26 GB for V4-Flash's sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "memory_indexer.json").write_text(json.dumps(indexer_config(config)))
    shutil.copy(SEEDED_MODEL / "tokenizer.json", folder)
    spec = ModelSpec.from_config(config)
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(256, (DRAWN_BYTES,), dtype=torch.uint8, generator=generator)
    held: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    files = 0
    names = sorted(announced := announced_tensors(spec, config))
    for name in names:
        held[name] = _tensor(name, announced[name], spec, drawn)
        if name == names[-1] or sum(each.nbytes for each in held.values()) > FILE_BYTES:
            file = f"model-{files:05}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, file)
            held, files = {}, files + 1
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def _tensor(name: str, stored: StoredTensor, spec: ModelSpec, drawn: Tensor) -> Tensor:
    count = math.prod(stored.shape)
    if stored.dtype == "F8_E8M0":
        is_expert = ".experts." in name
        code = E8M0_ONE - 8 if is_expert else E8M0_SMALL
        return torch.full(stored.shape, code, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    if stored.dtype == "I64":
        first = torch.arange(stored.shape[0]).unsqueeze(1) + torch.arange(stored.shape[1])
        return first % spec.num_experts  # distinct experts for each token
    values = drawn.repeat(-(-count // DRAWN_BYTES))[:count].view(stored.shape)
    if stored.dtype == "I8":
        return values.view(torch.int8)
    if stored.dtype == "F8_E4M3":
        return torch.where(values & 0x7F == 0x7F, 0, values).view(torch.float8_e4m3fn)  # 0x7f is NaN
    is_factor = "norm" in name or name.endswith("_scale")
    spread = 0.2 if is_factor else 1 / math.sqrt(stored.shape[-1])
    centred = (values.float() / 127.5 - 1) * (math.sqrt(3) * spread) + is_factor
    return centred.to(torch.bfloat16 if stored.dtype == "BF16" else torch.float32)
