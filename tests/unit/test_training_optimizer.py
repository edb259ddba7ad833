"""Muon and the schedule: what a step does to each parameter, at which rate, and what of it is saved."""

import pytest
import torch
from torch import Tensor, nn

from forepage.training.backbone.config import OptimizerConfig
from forepage.training.backbone.muon import Muon, orthogonalised
from forepage.training.backbone.network import Backbone
from forepage.training.backbone.optimizer import INDEXER, MUON_NAMES, Optimizer, rate_factor
from rigs.tiny_training import SMALL, random_network, training_config

NEAR_ONE = (0.65, 1.25)
"""Where five quintic iterations in bf16 bring singular values; the coefficients are made for speed."""
LEAST = 0.03
"""Of the largest singular value: what the iterations still lift into that range."""


def config(**changes: float) -> OptimizerConfig:
    return training_config(**{f"optimizer__{name}": value for name, value in changes.items()}).optimizer


def muon(parameter: nn.Parameter, *, momentum: float = 0.9, weight_decay: float = 0.0) -> Muon:
    return Muon([parameter], lr=torch.tensor(0.5), momentum=momentum, weight_decay=weight_decay)


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (24, 32)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(3, shape[0], shape[0], generator=generator))
    right, _ = torch.linalg.qr(torch.randn(3, shape[1], shape[0], generator=generator))
    sizes = torch.logspace(0, torch.tensor(LEAST).log10().item(), shape[0])
    result = orthogonalised(left * sizes @ right.transpose(1, 2)).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > NEAR_ONE[0]
    assert values.max() < NEAR_ONE[1]
    inner = left.transpose(1, 2) @ result @ right  # in the bases of the matrix: nearly diagonal, positive
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0.6).all()
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 10, 6), (2, 2, 6, 10), (10, 10)])
def test_a_step_is_momentum_then_the_orthogonal_matrix_by_shape(shape: tuple[int, ...]) -> None:
    """Each matrix of a stack by itself; a tall one is stepped further, as its rows are more."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(2)]
    parameter = nn.Parameter(start.clone())
    stepped = muon(parameter, weight_decay=0.1)
    expected, momentum = start.clone(), torch.zeros(shape)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        stepped.step()
        momentum = 0.9 * momentum + gradient
        ahead = gradient + 0.9 * momentum
        expected = expected * (1 - 0.5 * 0.1)
        tall = max(1.0, shape[-2] / shape[-1]) ** 0.5
        expected -= 0.5 * tall * by_svd(ahead)
    # Five iterations give singular values in NEAR_ONE, not 1: each step may be off by that share.
    moved, wanted = parameter.detach() - start, expected - start
    assert (moved - wanted).norm() < 0.3 * wanted.norm()
    cosine = (moved * wanted).sum() / moved.norm() / wanted.norm()
    assert cosine > 0.97


def by_svd(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrix of each, exactly."""
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def test_one_batch_of_several_shapes_equals_one_parameter_at_a_time() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(6, 10), (10, 6), (2, 6, 10), (5, 5)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    together = [nn.Parameter(start.clone()) for start in starts]
    alone = [nn.Parameter(start.clone()) for start in starts]
    for parameters in (together, alone):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
    Muon(together, lr=torch.tensor(0.1), momentum=0.9, weight_decay=0.0).step()
    for parameter in alone:
        muon(parameter).lr.fill_(0.1)
        Muon([parameter], lr=torch.tensor(0.1), momentum=0.9, weight_decay=0.0).step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)  # bf16 products of another batch size


def test_a_parameter_without_a_gradient_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no gradient"):
        muon(nn.Parameter(torch.zeros(2, 3))).step()


def backbone_optimizer(network: Backbone, settings: OptimizerConfig) -> Optimizer:
    named = [item for item in network.named_parameters() if INDEXER not in item[0]]
    return Optimizer(named, settings)


def test_every_parameter_is_trained_once_and_matrices_by_muon() -> None:
    network = random_network(SMALL)
    optimizer = backbone_optimizer(network, config())
    by_muon = {id(value) for value in optimizer.muon.parameters}
    by_adam = {id(value) for value in optimizer.adam.param_groups[0]["params"]}
    assert not by_muon & by_adam
    for name, value in network.named_parameters():
        assert (id(value) in by_muon | by_adam) == (INDEXER not in name)
        if id(value) in by_muon:
            assert name.split(".")[-1] in MUON_NAMES
            assert value.dim() >= 2
    assert {name for name, value in network.named_parameters() if id(value) in by_adam} >= {
        "embedding",
        "head.weight",
        "layers.1.experts.gate",
        "layers.1.attention.sink",
    }


def test_a_step_clips_updates_at_its_rates_and_drops_gradients() -> None:
    network = random_network(SMALL)
    optimizer = backbone_optimizer(network, config(clip=0.5, muon_weight_decay=0.0))
    parameters = dict(network.named_parameters())
    before = {name: value.detach().clone() for name, value in parameters.items()}
    for name, value in parameters.items():
        value.grad = torch.ones_like(value) if INDEXER not in name else None
    optimizer.set_rates(0.25)
    norm = optimizer.step()
    count = sum(value.numel() for name, value in parameters.items() if INDEXER not in name)
    assert float(norm) == pytest.approx(count**0.5, rel=1e-5)
    for name, value in parameters.items():
        assert value.grad is None
        if INDEXER in name:
            assert torch.equal(value, before[name])
    # The first step of AdamW is its rate against the sign of the gradient.
    moved = before["head.weight"] - parameters["head.weight"]
    torch.testing.assert_close(
        moved, torch.full_like(moved, 0.25 * optimizer.config.adam_lr), rtol=1e-3, atol=0
    )
    matrix = before["layers.1.attention.wq_a"] - parameters["layers.1.attention.wq_a"]
    size = float(torch.linalg.svdvals(matrix.detach())[0]) / (0.25 * optimizer.config.muon_lr)
    assert NEAR_ONE[0] < size < NEAR_ONE[1]


def test_rate_zero_moves_nothing() -> None:
    network = random_network(SMALL)
    optimizer = backbone_optimizer(network, config())
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for value in optimizer.parameters:
        value.grad = torch.randn_like(value)
    optimizer.set_rates(0.0)
    optimizer.step()
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("step", "progress", "factor"),
    [
        (0, 0.0, 0.25),
        (2, 0.0, 0.75),
        (3, 0.2, 1.0),
        (9, 0.6, 1.0),
        (9, 0.8, 0.5),
        (9, 0.98, 0.1),
        (9, 1.0, 0.1),
    ],
)
def test_rates_warm_up_stay_and_fall(step: int, progress: float, factor: float) -> None:
    settings = config(warmup_steps=4, decay_from=0.6, final_lr=0.1)
    assert rate_factor(settings, step=step, progress=progress) == pytest.approx(factor)


def test_edges_of_the_schedule() -> None:
    assert rate_factor(config(warmup_steps=0), step=0, progress=0.0) == 1.0
    assert rate_factor(config(decay_from=1.0, final_lr=0.1), step=9, progress=1.0) == 0.1
    assert rate_factor(config(warmup_steps=4, final_lr=0.1), step=0, progress=1.0) == pytest.approx(0.025)
