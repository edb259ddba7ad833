"""The evidence recall of a step by brute force: every key there is, scored in float64."""

import numpy as np
import torch

from forepage.rpc import index_pb2
from forepage_kernels.layout import KeyLayout, KeyPool, load_rows
from rigs.worker import Running, WorkerRig

Verdict = tuple[int, int]
"""Evidence entries, and how many of them were resident."""


def all_keys(rig: WorkerRig, running: Running, layer: int) -> np.ndarray:
    """Every key [entries, dims] of one c4 layer, each block from where it lies: arena or device."""
    geometry, sequence = rig.parts.geometry, running.sequence
    layout = KeyLayout(64, geometry.index_dims, "fp8")
    slots = rig.arena.payloads.view(-1, geometry.slot_bytes)
    arena = KeyPool(slots, geometry.keys_offset + layer * geometry.keys_plane_bytes, layout)
    device = KeyPool(rig.parts.device.local.memory.pools.keys, layer * geometry.keys_plane_bytes, layout)
    keys = []
    for block in range(sequence.resident.num_blocks):
        ref = sequence.arena.ref_by_block.get(block)
        pool, at = (arena, int(ref.arena_id)) if ref else (device, sequence.resident.key_id_by_block[block])
        entries = torch.arange(at * 64, at * 64 + 64, device=pool.bytes.device)
        keys.append(load_rows(pool, entries).cpu().numpy())
    return np.concatenate(keys)[: sequence.num_processed // 4]


def all_scores(rig: WorkerRig, running: Running, audit: index_pb2.Audit) -> np.ndarray:
    """The native score of every visible entry, in float64."""
    keys = all_keys(rig, running, audit.layer_idx).astype(np.float64)
    query = np.frombuffer(audit.query, "<f4").reshape(-1, keys.shape[1]).astype(np.float64)
    weights = np.frombuffer(audit.weights, "<f4").astype(np.float64)
    scores: np.ndarray = weights @ np.maximum(query @ keys.T, 0.0)
    return scores


def brute_force(rig: WorkerRig, running: Running, audit: index_pb2.Audit) -> Verdict:
    """Plain numpy: score everything, softmax over the top-k, count entries of at least 1 %."""
    scores = all_scores(rig, running, audit)
    top = np.argsort(-scores, kind="stable")[: audit.topk]  # of equal scores the lower entry
    masses = np.exp(scores[top] - scores[top].max())
    evidence = top[masses / masses.sum() >= 0.01]
    held = running.sequence.resident.key_id_by_block
    return len(evidence), sum(int(entry) // 64 in held for entry in evidence)
