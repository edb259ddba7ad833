"""Training in miniature: a network of every kind of layer that a CPU trains, and the served model of it."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.kv_pools import KvPools, PoolCapacity, PrefillChunk
from forepage.model.spec import ModelSpec
from forepage.model.transformer import StepOutput, Transformer
from forepage.model.weights import load_or_seed, seeded_weights
from forepage.training.backbone.config import TrainingConfig
from forepage.training.backbone.network import Backbone, Inputs
from forepage.training.backbone.official import official_weights
from forepage.training.backbone.packing import Packing
from rigs.parity_configs import MIXED

CPU = torch.device("cpu")
SEED = 5
MODEL: dict[str, Any] = MIXED | {
    "vocab_size": 320,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "index_n_heads": 4,
    "index_topk": 512,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "swiglu_limit": 1.0,
}
"""Window, c128 and c4 layers, hash-routed, then the same score-routed; a SwiGLU limit that clamps often."""
SMALL: dict[str, Any] = MODEL | {
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "num_hash_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "index_n_heads": 2,
    "hc_sinkhorn_iters": 3,
}
"""Each layer type and routing once: for tests that take training steps."""
STAGE: dict[str, Any] = {
    "name": "records",
    "length": 512,
    "tokens": 512,
    "share": 1.0,
    "steps": 4,
    "records": 1.0,
    "rest_weight": 0.1,
    "decisive_weight": 2.0,
    "fp8_rows": False,
}
RAW: dict[str, Any] = {
    "seed": 1,
    "minutes": 1.0,
    "moments": "float32",
    "data": {"seed": 2, "workers": 0, "suites": {"ruler_niah_single_2": 1.0, "longmemeval": 1.0}},
    "optimizer": {
        "muon_lr": 0.02,
        "muon_momentum": 0.95,
        "muon_weight_decay": 0.01,
        "adam_lr": 3e-3,
        "adam_betas": [0.9, 0.98],
        "warmup_steps": 2,
        "decay_from": 0.5,
        "final_lr": 0.1,
        "clip": 1.0,
        "balance_rate": 1e-3,
    },
    "stage": [STAGE],
    "indexer": {
        "length": 512,
        "tokens": 512,
        "rows": 64,
        "records": 1.0,
        "clip": 1.0,
        "minutes": 1.0,
        "steps": 3,
        "cut": 0.02,
        "floor": 0.3,
        "flatness": 0.3,
    },
    "sparse": {
        "length": 512,
        "tokens": 512,
        "rows": 64,
        "records": 1.0,
        "minutes": 1.0,
        "steps": 4,
        "backbone_rate": 0.05,
        "indexer_rate": 0.2,
    },
    "evaluation": {"lengths": [512], "tokens": 1024, "steps": 1, "seed": 3},
    "model": SMALL,
}
"""A whole run, as its file would say it."""


def raw_config(**changes: Any) -> dict[str, Any]:
    """RAW with other values; `section__field` reaches into a section, and into the only stage."""
    raw = deepcopy(RAW)
    for path, value in changes.items():
        section, _, field = path.partition("__")
        if not field:
            raw[section] = value
        elif section == "stage":
            raw["stage"][0][field] = value
        else:
            raw[section][field] = value
    return raw


def training_config(**changes: Any) -> TrainingConfig:
    """`raw_config`, checked."""
    return TrainingConfig.from_dict(raw_config(**changes))


def toml(raw: Mapping[str, Any]) -> str:
    """A parsed file as text again; scalars and lists are written alike in JSON and TOML."""
    lines, sections = [], []
    for name, value in raw.items():
        if isinstance(value, Mapping):
            sections.append((f"[{name}]", name, value))
        elif name == "stage":
            sections += [("[[stage]]", name, stage) for stage in value]
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    for head, name, section in sections:
        plain = {key: value for key, value in section.items() if not isinstance(value, Mapping)}
        lines += [head, *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
        for key, value in section.items():
            if isinstance(value, Mapping):
                lines.append(toml({f"{name}.{key}": value}))
    return "\n".join(lines) + "\n"


@torch.no_grad()
def random_network(model: Mapping[str, Any]) -> Backbone:
    """Every parameter and buffer drawn, none zero: sinks, biases and mixing weights take part."""
    network = Backbone(ModelSpec.from_config(model), dtype=torch.float32, device=CPU)
    drawn = seeded_weights(network.spec, SEED, dtype=torch.float32, device=CPU)
    for name, master in official_weights(network).items():
        master.copy_(drawn[name])
    return network


@torch.no_grad()
def training_logits(network: Backbone, documents: Sequence[Tensor], *, fp8: bool = False) -> Tensor:
    """Documents of whole steps of 512 tokens, packed in one row -> f32 [n, vocab]."""
    inputs, packing = packed_inputs(documents)
    inputs.fp8_share.fill_(float(fp8))
    streams, _ = network(inputs, packing)
    logits: Tensor = network.head(streams)
    return logits


def packed_inputs(documents: Sequence[Tensor]) -> tuple[Inputs, Packing]:
    """What the network reads of packed documents at plain positions; for any of this module's models."""
    tokens = torch.cat(tuple(documents))
    lengths = [len(document) for document in documents]
    inputs = Inputs.empty(len(tokens), CPU)
    inputs.tokens.copy_(tokens)
    inputs.positions.copy_(torch.cat([torch.arange(length) for length in lengths]))
    spec = ModelSpec.from_config(MODEL)
    packing = Packing(len(tokens), spec.compress_ratios, window_tokens=spec.window_tokens, device=CPU)
    packing.pack(lengths)
    return inputs, packing


def served_logits(folder: Path, tokens: Tensor, kv_format: KvFormat, *, chunk: int) -> Tensor:
    """f32 [n, vocab] of an exported folder."""
    return torch.cat([output.logits for output in served_outputs(folder, tokens, kv_format, chunk=chunk)])


@torch.inference_mode()
def served_outputs(folder: Path, tokens: Tensor, kv_format: KvFormat, *, chunk: int) -> list[StepOutput]:
    """An exported folder, loaded and prefilled as a worker does, chunk by chunk; every token's output."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    spec, geometry = ModelSpec.from_config(config), KvGeometry.from_config(config, kv_format)
    weights = load_or_seed(folder, spec, dtype=torch.float32, device=CPU)
    transformer = Transformer(spec, geometry, weights, CPU)
    blocks = geometry.num_blocks(len(tokens))
    pools = KvPools.poisoned(geometry, PoolCapacity(1, blocks, blocks, blocks), CPU)
    table = torch.arange(blocks, dtype=torch.int32)
    outputs = []
    for start in range(0, len(tokens), chunk):
        place = PrefillChunk(0, start, table, table, table)
        outputs.append(transformer.prefill(tokens[start : start + chunk], place, pools, all_logits=True))
    return outputs


def random_tokens(count: int, seed: int = SEED) -> Tensor:
    """Ids of the vocabulary."""
    return torch.from_numpy(np.random.default_rng(seed).integers(MODEL["vocab_size"], size=count))
