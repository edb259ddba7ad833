"""Official checkpoints on a GPU: the same bits as on the CPU, and no more memory than what stays."""

from pathlib import Path

import pytest
import torch

from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.footprint import held_bytes
from forepage.model.held_form import HeldForm
from forepage.model.spec import ModelSpec
from forepage.model.transformer import Transformer
from forepage.model.weights import load_or_seed
from forepage.settings import WeightDtype
from rigs.checkpoint_writer import stored_tensors, write_checkpoint
from rigs.parity_configs import MIXED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CONFIG: dict[str, object] = {
    **MIXED,
    "vocab_size": 40_000,
    "hidden_size": 1024,
    "moe_intermediate_size": 2048,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "expert_dtype": "fp4",
}
OVERHEAD_BYTES = 64 << 20
"""Device memory a load may take beside what it leaves; the promise is 1 GiB."""
DTYPES = {WeightDtype.FP32: torch.float32, WeightDtype.BF16: torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 0.9 GB once it is dequantised to bf16."""
    path = tmp_path_factory.mktemp("official")
    write_checkpoint(path, CONFIG, stored_tensors(CONFIG))
    return path


@pytest.mark.parametrize("held", DTYPES)
def test_load_to_a_gpu_leaves_the_same_bits_and_takes_little_more(folder: Path, held: WeightDtype) -> None:
    spec, dtype, device = ModelSpec.from_config(CONFIG), DTYPES[held], torch.device("cuda")
    expected = load_or_seed(folder, spec, dtype=dtype, device=torch.device("cpu"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    weights = load_or_seed(folder, spec, dtype=dtype, device=device)
    geometry = KvGeometry.from_config(CONFIG, KvFormat.FP8)
    model = Transformer(spec, geometry, weights, device)
    peak = torch.cuda.max_memory_allocated() - before
    announced = held_bytes(spec, 1, HeldForm.of(held))
    assert announced > 200_000_000
    assert announced <= peak <= announced + OVERHEAD_BYTES
    assert model.spec is spec
    for name, tensor in expected.items():
        assert weights[name].device.type == "cuda"
        assert torch.equal(weights[name].cpu(), tensor), name
