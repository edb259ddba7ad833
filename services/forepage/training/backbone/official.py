"""The network's parameters under their official names: what is exported, what training may start from.

Expert matrices are stored apart there, w2 as [out, in]; everything else differs in name only.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from forepage.errors import ModelFormatError
from forepage.model.safetensors_file import read_file
from forepage.model.weight_table import Role, weight_table
from forepage.training.backbone.network import Backbone, Layer

WEIGHTS_FILE = "model.safetensors"
F32_ROLES = {
    Role.SINK,
    Role.POSITION_BIAS,
    Role.EXPERT_BIAS,
    Role.STREAM_MATRIX,
    Role.STREAM_BASE,
    Role.STREAM_SCALE,
}


def official_weights(network: Backbone) -> dict[str, Tensor]:
    """Views of the masters (and of the hash layers' ids) by official name."""
    weights: dict[str, Tensor] = {
        "embed.weight": network.embedding,
        "head.weight": network.head.weight,
        "norm.weight": network.head.norm,
    }
    weights |= {f"hc_head_{part}": getattr(network.head.streams, part) for part in ("fn", "base", "scale")}
    for idx, layer in enumerate(network.layers):
        assert isinstance(layer, Layer)
        weights |= {f"layers.{idx}.{name}": value for name, value in _layer(layer).items()}
    return {name: value.detach() for name, value in weights.items()}


def _layer(layer: Layer) -> dict[str, Tensor]:
    attention, experts = layer.attention, layer.experts
    weights: dict[str, Tensor] = {
        "attn_norm.weight": layer.attn_norm,
        "ffn_norm.weight": layer.ffn_norm,
        "attn.attn_sink": attention.sink,
        "attn.wo_a.weight": attention.wo_a.flatten(0, 1),
        "ffn.gate.weight": experts.gate,
    }
    for part in ("fn", "base", "scale"):
        weights[f"hc_attn_{part}"] = getattr(layer.attn_streams, part)
        weights[f"hc_ffn_{part}"] = getattr(layer.ffn_streams, part)
    for name in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_b"):
        weights[f"attn.{name}.weight"] = getattr(attention, name)
    compressors = {"attn.compressor": attention.compressor}
    if attention.indexer is not None:
        compressors["attn.indexer.compressor"] = attention.indexer.compressor
        weights["attn.indexer.wq_b.weight"] = attention.indexer.wq_b
        weights["attn.indexer.weights_proj.weight"] = attention.indexer.weights_proj
    for prefix, compressor in compressors.items():
        if compressor is not None:
            weights |= {
                f"{prefix}.{name}.weight": getattr(compressor, name) for name in ("wkv", "wgate", "norm")
            }
            weights[f"{prefix}.ape"] = compressor.ape
    if experts.hashed:
        weights["ffn.gate.tid2eid"] = experts.expert_ids
    else:
        weights["ffn.gate.bias"] = experts.bias
    last = experts.w13.shape[0] - 1
    for expert in range(last + 1):
        prefix = "ffn.shared_experts" if expert == last else f"ffn.experts.{expert}"
        weights[f"{prefix}.w1.weight"] = experts.w13[expert, 0]
        weights[f"{prefix}.w3.weight"] = experts.w13[expert, 1]
        weights[f"{prefix}.w2.weight"] = experts.w2[expert].T
    return weights


def export(network: Backbone, config: Mapping[str, object], folder: Path) -> Path:
    """Write `folder`/model.safetensors (matrices bf16, the rest fp32) and config.json; the weights' path."""
    table = weight_table(network.spec)
    weights = {}
    for name, value in official_weights(network).items():
        role = table[name].role
        dtype = (
            torch.int64 if role is Role.EXPERT_IDS else torch.float32 if role in F32_ROLES else torch.bfloat16
        )
        weights[name] = value.to(dtype).contiguous().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / WEIGHTS_FILE
    save_file(weights, path)
    return path


@torch.no_grad()
def restore(network: Backbone, masters: Mapping[str, Tensor]) -> None:
    """Overwrite the masters with those of a checkpoint of the same model."""
    for name, master in official_weights(network).items():
        master.copy_(masters[name])


@torch.no_grad()
def start_from(network: Backbone, path: Path) -> None:
    """Overwrite the masters with exported weights, a folder or its safetensors file.

    Raises: ModelFormatError: the file that is not there, the tensor that doesn't fit.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.exists():
        raise ModelFormatError(f"{file}: there are no weights to begin at")
    stored = read_file(file)
    for name, master in official_weights(network).items():
        if name not in stored or stored[name].shape != master.shape:
            raise ModelFormatError(f"{file}: {name} is missing or has another shape")
        master.copy_(stored[name])
