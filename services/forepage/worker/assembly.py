"""Puts a worker together: what the model folder says, the device's memory, and the peers it is given."""

from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from forepage.frames import WorkerFrame
from forepage.kv.geometry import KeyFormat, KvFormat, KvGeometry
from forepage.model.fingerprint import model_fingerprint
from forepage.model.held_form import HeldForm
from forepage.model.memory_indexer import read_indexer_config
from forepage.model.rank_group import RankGroup
from forepage.model.spec import ModelSpec, read_config, served_name
from forepage.model.stored_form import is_quantised
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed
from forepage.settings import ModelSettings, Settings, WorkerSettings
from forepage.settings_environment import SettingsError
from forepage.telemetry import Telemetry
from forepage.worker.constraint import GrammarTokenizer
from forepage.worker.copy_engine import CopyEngine
from forepage.worker.device import Device
from forepage.worker.device_audit import DeviceAudit
from forepage.worker.gpu_blocks import GpuBlocks, PoolSizes
from forepage.worker.kv_memory import KvMemory
from forepage.worker.padded_decode import PaddedDecode
from forepage.worker.parts import ArenaPort, IndexPort, WorkerParts
from forepage.worker.rank_device import RankDevice
from forepage.worker.rank_link import ALONE_RANKS, Ranks

DEFAULT_EOS = 1
"""DeepSeek-V4's end of sentence, where the config names none."""
_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ModelFolder:
    """A model folder before its weights are read."""

    settings: ModelSettings
    name: str
    eos: int
    spec: ModelSpec
    geometry: KvGeometry
    held: HeldForm
    fingerprint: str

    @classmethod
    def read(cls, settings: ModelSettings) -> "ModelFolder":
        """Raises: ModelFormatError naming the file and field."""
        config = read_config(settings.path)
        geometry = KvGeometry.from_config(
            config, KvFormat(settings.kv_format), KeyFormat(settings.key_format)
        )
        device = device_of(settings).type
        weight_dtype = settings.weight_dtype.on(device, quantised=is_quantised(config))
        eos = config.get("eos_token_id")
        return cls(
            settings=settings,
            name=served_name(settings.path, config),
            eos=eos if isinstance(eos, int) else DEFAULT_EOS,
            spec=ModelSpec.from_config(config),
            geometry=geometry,
            held=HeldForm.of(weight_dtype, device),
            fingerprint=model_fingerprint(settings.path, geometry.format, geometry.key_format, weight_dtype),
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


def device_of(settings: ModelSettings, *, rank: int = 0, num_ranks: int = 1) -> torch.device:
    """The device named, or the first GPU if there is one; of several ranks the rank-th from there on.

    Raises: SettingsError when the host has fewer GPUs than ranks.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if num_ranks == 1 or device.type == "cpu":
        return device
    first = device.index or 0
    if first + num_ranks > torch.cuda.device_count():
        raise SettingsError(
            f"FOREPAGE_WORKER__TENSOR_PARALLEL is {num_ranks}, but from {name} on this host has "
            f"{max(0, torch.cuda.device_count() - first)} GPUs"
        )
    return torch.device("cuda", first + rank)


def assemble_rank(
    settings: WorkerSettings, folder: ModelFolder, device: torch.device, arena: Tensor, *, ranks: RankGroup
) -> RankDevice:
    """Load a rank's part of the model and allocate its pools (`check_split` must hold)."""
    spec, geometry = folder.spec, folder.geometry
    targets = read_indexer_config(folder.settings.path, spec, folder.settings.memory_indexer).target_layers
    weights = load_or_seed(
        folder.settings.path,
        spec,
        dtype=_TORCH_DTYPES[folder.held.plain],
        keep_stored=folder.held.keeps_stored,
        device=device,
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
    )
    memory = KvMemory(geometry, PoolSizes.from_settings(settings, geometry, topk=spec.index_topk), device)
    target_layers = [spec.c4_layers[idx] for idx in targets]
    model = Transformer(spec, geometry, weights, device, target_layers=target_layers, ranks=ranks)
    return RankDevice(model, memory, CopyEngine(memory.pools, arena, geometry), arena)


def assemble(
    settings: Settings,
    folder: ModelFolder,
    device: torch.device,
    arena: Tensor,
    *,
    arena_port: ArenaPort,
    index: IndexPort,
    telemetry: Telemetry,
    ranks: Ranks = ALONE_RANKS,
) -> WorkerParts:
    """Load rank 0's part of the model and allocate its pools; takes as long as the weights do."""
    geometry, topk = folder.geometry, folder.spec.index_topk
    local = assemble_rank(settings.worker, folder, device, arena, ranks=ranks.tensors)
    padded = None
    if ranks.tensors.num_ranks == 1:
        is_stored_as_served = geometry.format is KvFormat.FP8  # fp32 is for tests: no kernel reads it
        padded = PaddedDecode(
            local,
            max_rows=settings.worker.max_running,
            max_graphs=settings.worker.decode_graphs if is_stored_as_served else 0,
            telemetry=telemetry,
            audit=DeviceAudit(local.memory, arena, topk=topk) if is_stored_as_served else None,
        )
    return WorkerParts(
        settings=settings.worker,
        geometry=geometry,
        topk=topk,
        device=Device(local, ranks.commands, num_ranks=ranks.tensors.num_ranks, padded=padded),
        blocks=GpuBlocks(PoolSizes.from_settings(settings.worker, geometry, topk=topk)),
        arena=arena_port,
        index=index,
        telemetry=telemetry,
        log=structlog.get_logger("forepage.worker"),
    )
