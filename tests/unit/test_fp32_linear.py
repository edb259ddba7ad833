"""Head, router and compressors: held in bf16 where a release stores them so, multiplied as if in fp32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forepage.model.fp32_linear import fp32_linear
from forepage.model.held_form import HeldForm
from forepage.model.spec import ModelSpec
from forepage.model.weight_table import Role, weight_table
from forepage.model.weights import load_or_seed, seeded_weights
from rigs.held_weights import CPU
from rigs.parity_configs import MIXED

STEP_COLUMNS, SUM_ROUNDOFF = 16, 2.0**-23
"""What the docstring of fp32_linear promises: a step of the tensor cores, and how it rounds."""
SHAPES = [(1, 129_280, 4096), (7, 1000, 4096), (64, 129_280, 4096), (64, 2048, 4096), (256, 256, 4096)]


def fp32_names(spec: ModelSpec) -> list[str]:
    return [name for name, entry in weight_table(spec).items() if entry.role is Role.FP32_MATRIX]


@pytest.mark.parametrize("is_wide", [False, True], ids=["bf16-file", "fp32-file"])
def test_a_bf16_model_holds_them_without_losing_a_bit(tmp_path: Path, is_wide: bool) -> None:
    spec = ModelSpec.from_config(MIXED)
    drawn = seeded_weights(spec, 3, dtype=torch.float32, device=CPU)
    names = fp32_names(spec)
    assert len(names) > 2 * spec.num_layers
    if not is_wide:
        drawn |= {name: drawn[name].bfloat16() for name in names}
    save_file(drawn, tmp_path / "model.safetensors")
    held = load_or_seed(tmp_path, spec, dtype=torch.bfloat16, device=CPU)
    assert {held[name].dtype for name in names} == {torch.float32 if is_wide else torch.bfloat16}
    assert all(torch.equal(held[name], drawn[name]) for name in names)


@pytest.mark.parametrize(
    ("form", "stored", "held"),
    [
        (HeldForm("BF16"), "BF16", "BF16"),
        (HeldForm("BF16"), None, "BF16"),
        (HeldForm("BF16"), "F32", "F32"),
        (HeldForm("BF16"), "F16", "F32"),
        (HeldForm("F32"), "BF16", "F32"),
        (HeldForm("BF16", keeps_stored=True), "BF16", "BF16"),
    ],
)
def test_they_are_held_in_bf16_where_that_keeps_all_bits(
    form: HeldForm, stored: str | None, held: str
) -> None:
    assert form.plain_dtype(Role.FP32_MATRIX, stored) == held


def test_what_is_computed_in_fp32_otherwise_stays_fp32() -> None:
    form = HeldForm("BF16")
    assert form.plain_dtype(Role.STREAM_MATRIX, "F32") == form.plain_dtype(Role.NORM, "BF16") == "F32"


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_fp32s_on_a_cpu(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 96).to(dtype), torch.randn(33, 96).to(weight_dtype)
    found = fp32_linear(x, weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, x.float() @ weight.float().T)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
def test_tensor_cores_lose_no_more_than_is_promised(rows: int, outputs: int, inputs: int) -> None:
    """A bf16 output would be off by 1.1e-3 of the sums, 14-bit sums by more: the bound is 3e-5."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, inputs, device="cuda", generator=generator).bfloat16()
    weight = (torch.randn(outputs, inputs, device="cuda", generator=generator) / inputs**0.5).bfloat16()
    found = fp32_linear(x, weight)
    assert found.dtype == torch.float32
    assert found.shape == (rows, outputs)
    wanted = torch.cat([x.double() @ part.double().T for part in weight.split(8192)], dim=1)
    error = (found.double() - wanted).square().mean().sqrt()
    allowed = inputs / STEP_COLUMNS * SUM_ROUNDOFF * wanted.square().mean().sqrt()
    assert error <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("outputs", [129_280, 2048, 256])
def test_a_row_does_not_depend_on_the_others_of_its_batch(outputs: int) -> None:
    """Padding changes nothing: 61 rows padded to 64 with anything, finite or not, give the same bits."""
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(64, 4096, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(outputs, 4096, device="cuda", generator=generator).bfloat16()
    first = fp32_linear(x, weight)[:61]
    x[61:] = float("nan")
    assert torch.equal(first, fp32_linear(x, weight)[:61])
