"""Puts a worker together: what the model folder says, the device's memory, and the peers it is given."""

from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from forepage.frames import WorkerFrame
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.model.fingerprint import model_fingerprint
from forepage.model.memory_indexer import read_indexer_config
from forepage.model.spec import ModelSpec, read_config
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed
from forepage.settings import ModelSettings, Settings, WorkerSettings
from forepage.telemetry import Telemetry
from forepage.worker.constraint import GrammarTokenizer
from forepage.worker.copy_engine import CopyEngine
from forepage.worker.gpu_blocks import GpuBlocks, PoolSizes
from forepage.worker.parts import ArenaPort, IndexPort, WorkerParts

DEFAULT_EOS = 1
"""DeepSeek-V4's end of sentence, where the config names none."""


@dataclass(frozen=True)
class ModelFolder:
    """A model folder before its weights are read."""

    settings: ModelSettings
    name: str
    eos: int
    spec: ModelSpec
    geometry: KvGeometry
    fingerprint: str

    @classmethod
    def read(cls, settings: ModelSettings) -> "ModelFolder":
        """Raises: ModelFormatError naming the file and field."""
        config = read_config(settings.path)
        geometry = KvGeometry.from_config(
            config, KvFormat(settings.kv_format), KeyFormat(settings.key_format)
        )
        eos = config.get("eos_token_id")
        return cls(
            settings=settings,
            name=str(config.get("forepage_name") or settings.path.name),
            eos=eos if isinstance(eos, int) else DEFAULT_EOS,
            spec=ModelSpec.from_config(config),
            geometry=geometry,
            fingerprint=model_fingerprint(settings.path, geometry.format, geometry.key_format),
        )

    def grammar(self) -> GrammarTokenizer:
        """For constrained text; reads the tokenizer when it is first needed."""
        return GrammarTokenizer(self.settings.path, vocab_size=self.spec.vocab_size, eos=self.eos)

    def card(self, settings: WorkerSettings) -> WorkerFrame:
        """How a worker with this model shows itself in the directory."""
        return WorkerFrame(
            worker_id=settings.worker_id,
            address=settings.advertise or settings.listen,
            model_name=self.name,
            model_fingerprint=self.fingerprint,
            max_context_tokens=settings.max_context_tokens,
            draining=False,
        )


def device_of(settings: ModelSettings) -> torch.device:
    """The device named, or the first GPU if there is one."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


def assemble(
    settings: Settings,
    folder: ModelFolder,
    device: torch.device,
    arena: Tensor,
    *,
    arena_port: ArenaPort,
    index: IndexPort,
    telemetry: Telemetry,
) -> WorkerParts:
    """Load the model and allocate the pools; takes as long as the weights do."""
    spec, geometry = folder.spec, folder.geometry
    targets = read_indexer_config(folder.settings.path, spec).target_layers
    weights = load_or_seed(folder.settings.path, spec, dtype=torch.float32, device=device)
    sizes = PoolSizes.from_settings(settings.worker, geometry)
    blocks = GpuBlocks(geometry, sizes, topk=spec.index_topk, device=device)
    target_layers = [spec.c4_layers[idx] for idx in targets]
    return WorkerParts(
        settings=settings.worker,
        geometry=geometry,
        topk=spec.index_topk,
        model=Transformer(spec, geometry, weights, device, target_layers=target_layers),
        blocks=blocks,
        copies=CopyEngine(blocks.pools, arena, geometry),
        arena=arena_port,
        index=index,
        telemetry=telemetry,
        log=structlog.get_logger("forepage.worker"),
    )
