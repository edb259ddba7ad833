"""Which parameter is trained how, and at what rate: one object that steps and can be saved.

Rates are device tensors that are filled before a step, so that a captured graph follows the schedule.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from forepage.training.backbone.config import OptimizerConfig
from forepage.training.backbone.muon import Muon

MUON_NAMES = ("wq_a", "wq_b", "wkv", "wgate", "wo_a", "wo_b", "w13", "w2")
INDEXER = ".indexer."
ADAM_EPS = 1e-10


class Optimizer:
    """Muon on attention, compressor and expert matrices, AdamW on the rest; a common clip."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        """`named` are the parameters to train; all others keep their values."""
        parameters = dict(named)
        muon = [value for name, value in parameters.items() if name.split(".")[-1] in MUON_NAMES]
        adam = [value for name, value in parameters.items() if name.split(".")[-1] not in MUON_NAMES]
        device = adam[0].device
        self.config = config
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.muon_lr = torch.zeros((), device=device)
        self.adam_lr = torch.zeros((), device=device)
        self.muon = Muon(
            muon, lr=self.muon_lr, momentum=config.muon_momentum, weight_decay=config.muon_weight_decay
        )
        cuda = device.type == "cuda"
        self.adam = torch.optim.AdamW(
            adam,
            lr=self.adam_lr if cuda else 0.0,
            betas=config.adam_betas,
            eps=ADAM_EPS,
            weight_decay=0.0,
            capturable=cuda,
            fused=cuda,
        )

    def set_rates(self, factor: float) -> None:
        """Rates for the coming steps, as a share of the config's."""
        self.muon_lr.fill_(self.config.muon_lr * factor)
        self.adam_lr.fill_(self.config.adam_lr * factor)
        for group in self.adam.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = self.config.adam_lr * factor

    def step(self) -> Tensor:
        """Clip, update, drop the gradients; the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip, foreach=True)
        self.muon.step()
        self.adam.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        tensors = {f"muon.{idx}": buffer for idx, buffer in enumerate(self.muon.buffers)}
        for idx, parameter in enumerate(self.adam.param_groups[0]["params"]):
            for name, value in self.adam.state.get(parameter, {}).items():
                tensors[f"adam.{idx}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave. What is missing starts anew: momentum builds up within some steps."""
        for idx, buffer in enumerate(self.muon.buffers):
            if f"muon.{idx}" in tensors:
                buffer.copy_(tensors[f"muon.{idx}"])
        for idx, parameter in enumerate(self.adam.param_groups[0]["params"]):
            names = [name for name in ("step", "exp_avg", "exp_avg_sq") if f"adam.{idx}.{name}" in tensors]
            if names:
                device = {
                    "step": parameter.device if self.adam.defaults["capturable"] else torch.device("cpu")
                }
                self.adam.state[parameter] = {
                    name: tensors[f"adam.{idx}.{name}"].to(device.get(name, parameter.device)).float().clone()
                    for name in names
                }


def rate_factor(config: OptimizerConfig, *, step: int, progress: float) -> float:
    """Linear warm-up over the first steps, then flat, then linear to `final_lr` at progress 1."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    left = (1 - progress) / max(1 - config.decay_from, 1e-9)
    return warm * max(config.final_lr, min(1.0, left))
