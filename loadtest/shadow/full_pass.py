"""The second pass: the served model over a prompt and its answer, every block resident, teacher-forced.

It is the worker's own prefill (same chunks, stored rows, sparse attention), so what it says of a token is
what `full` would have; it needs no other process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from forepage.model.checkpoint_reader import TORCH_DTYPES
from forepage.model.kv_pools import KvPools, PoolCapacity, PrefillChunk
from forepage.model.transformer import StepOutput, Transformer
from forepage.model.weights import load_or_seed
from forepage.settings import ModelSettings
from forepage.worker.assembly import ModelFolder, device_of

CHUNK_TOKENS = 512
STATES = ("window", "c4_state", "key_state", "c128_state")
"""The pools that the next tokens overwrite; blocks behind the prompt are written anew."""


@dataclass(frozen=True)
class Looked:
    """What the answer's tokens selected: n tokens, C c4 layers, k places each."""

    selected: Tensor  # i64 [n, C, k], -1 behind the entries
    scores: Tensor  # f32 [n, C, k]
    attention: Tensor  # f32 [n, C, k]: attention weights, mean over heads


class FullPass:
    """A model with pools for one sequence; keeps the last prompt, so that other answers to it cost little."""

    def __init__(self, path: Path, *, device: str, max_tokens: int) -> None:
        """Raises: ModelFormatError for the model folder."""
        folder = ModelFolder.read(ModelSettings(path=path, device=device))
        self.device = device_of(folder.settings)
        held = folder.held
        weights = load_or_seed(
            path,
            folder.spec,
            dtype=TORCH_DTYPES[held.plain],
            keep_stored=held.keeps_stored,
            device=self.device,
        )
        geometry = folder.geometry
        self._model = Transformer(folder.spec, geometry, weights, self.device, target_layers=[])
        blocks = geometry.num_blocks(max_tokens)
        capacity = PoolCapacity(slots=1, row_blocks=blocks, key_blocks=blocks, c128_blocks=blocks)
        self._pools = KvPools.allocate(geometry, capacity, self.device)
        self._table = torch.arange(blocks, dtype=torch.int32, device=self.device)
        self._prompt: tuple[int, ...] = ()
        self._after_prompt: dict[str, Tensor] = {}

    @torch.inference_mode()
    def look(self, prompt: Sequence[int], answer: Sequence[int]) -> Looked:
        """What each token of an answer (one at least) selects and attends when it is processed."""
        if tuple(prompt) != self._prompt:
            self._read(prompt)
        for name, state in self._after_prompt.items():
            getattr(self._pools, name).copy_(state)
        step = self._process(answer, len(prompt), watch=True)
        return Looked(
            selected=torch.stack([tap.selected for tap in step.indexer], dim=1).cpu(),
            scores=torch.stack([tap.scores for tap in step.indexer], dim=1).cpu(),
            attention=torch.stack(list(step.attention_mass), dim=1).cpu(),
        )

    def _read(self, prompt: Sequence[int]) -> None:
        self._prompt = ()
        for name in STATES:
            getattr(self._pools, name).zero_()
        for start in range(0, len(prompt), CHUNK_TOKENS):
            self._process(prompt[start : start + CHUNK_TOKENS], start, watch=False)
        self._after_prompt = {
            item.name: getattr(self._pools, item.name).clone()
            for item in fields(KvPools)
            if item.name in STATES
        }
        self._prompt = tuple(prompt)

    def _process(self, tokens: Sequence[int], start: int, *, watch: bool) -> StepOutput:
        chunk = PrefillChunk(0, start, self._table, self._table, self._table)
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        mass_tokens = len(tokens) if watch else 0
        return self._model.prefill(ids, chunk, self._pools, all_logits=watch, mass_tokens=mass_tokens)
