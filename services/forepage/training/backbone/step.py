"""One training step: forward, backward, both optimisers, routing balance, counts; a CUDA graph on a GPU.

Sums stay on the device until `read`; nothing in a step waits for the GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.training.backbone.batches import KINDS
from forepage.training.backbone.experts import Experts
from forepage.training.backbone.indexer_fit import Fitting
from forepage.training.backbone.network import Backbone, Inputs
from forepage.training.backbone.optimizer import Optimizer
from forepage.training.backbone.packing import Packing

WARMUP_RUNS = 2
LOSS, ANSWER_LOSS, NORM, IMBALANCE, STEPS = range(5)


@dataclass(frozen=True)
class Reading:
    """Means over the steps since the last reading."""

    loss: float
    answer_loss: float
    gradient_norm: float
    imbalance: float  # of the busiest expert: its share over an even one, worst layer
    accuracy: dict[str, float]  # of answers' decisive tokens, by kind
    steps: int


class TrainingStep:
    """Steps of one number of tokens. `inputs` and `packing` are filled by the caller, then `run`.

    With an optimiser of `indexers` c4 layers attend what these choose; each `run` gets their `Fitting`.
    """

    def __init__(
        self, network: Backbone, optimizer: Optimizer, num_tokens: int, *, indexers: Optimizer | None = None
    ) -> None:
        device = network.embedding.device
        spec = network.spec
        self.network = network
        self.optimizer = optimizer
        self.indexers = indexers
        self.inputs = Inputs.empty(num_tokens, device)
        self.packing = Packing(
            num_tokens, spec.compress_ratios, window_tokens=spec.window_tokens, device=device
        )
        self._sums = torch.zeros(5, device=device)
        self._answers = torch.zeros(len(KINDS), 2, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """On a GPU, make the graph; inputs and packing hold a batch, rates are 0: weights stay."""
        if not self._sums.is_cuda:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_RUNS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()
        self.reset()

    def rehearse(self, fitting: Fitting | None = None) -> None:
        """Forward and backward of what the inputs hold, so that all is compiled; nothing is changed by it."""
        self._gradients(fitting)
        for parameter in self.network.parameters():
            parameter.grad = None

    def run(self, fitting: Fitting | None = None) -> None:
        """One step."""
        if self._graph is None:
            self._step(fitting)
        else:
            self._graph.replay()

    def reset(self) -> None:
        """Forget what was counted."""
        self._sums.zero_()
        self._answers.zero_()

    def read(self) -> Reading:
        """What was counted since the last reading. Raises: RuntimeError when the loss is no number."""
        sums, answers = self._sums.tolist(), self._answers.tolist()
        self.reset()
        steps = max(int(sums[STEPS]), 1)
        if not sums[LOSS] == sums[LOSS]:
            raise RuntimeError("the loss is not a number")
        accuracy = {kind: right / count for kind, (right, count) in zip(KINDS, answers, strict=True) if count}
        accuracy.pop(KINDS[0], None)
        means = [value / steps for value in sums]
        return Reading(
            means[LOSS], means[ANSWER_LOSS], means[NORM], means[IMBALANCE], accuracy, int(sums[STEPS])
        )

    def _step(self, fitting: Fitting | None = None) -> None:
        inputs = self.inputs
        loss, losses, right, loads = self._gradients(fitting)
        norm = self.optimizer.step()
        if self.indexers is not None:
            self.indexers.step()
        with torch.no_grad():
            asked = inputs.kinds > 0
            answer_loss = (losses * asked).sum() / asked.sum().clamp(min=1)
            busiest = torch.stack(loads).max() * self.network.spec.num_experts
            self._balance(loads)
            one = torch.ones_like(norm)
            self._sums += torch.stack((loss, answer_loss, norm, busiest, one))
            counted = torch.stack((right.float(), torch.ones_like(losses)), dim=1)
            self._answers.index_add_(0, inputs.kinds * inputs.decisive, counted)

    def _gradients(self, fitting: Fitting | None) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Forward and backward: the loss, that of each token, which are right, the experts' loads.

        The language model's loss reaches no indexer, since a choice has no gradient, and the indexers' loss
        nothing else, since their inputs are detached: one backward pass serves both.
        """
        inputs = self.inputs
        streams, loads = self.network(inputs, self.packing, sparse=self.indexers is not None, watch=fitting)
        losses, right = self.network.head.losses(streams, inputs.targets)
        loss = (losses * inputs.weights).sum() / inputs.weights.sum()
        (loss if fitting is None else loss + fitting.loss()).backward()
        return loss.detach(), losses.detach(), right, loads

    def _balance(self, loads: list[Tensor]) -> None:
        """Move each expert's selection bias against its load, as the release was trained (no loss term)."""
        even = 1 / self.network.spec.num_experts
        for layer, load in zip(self.network.layers, loads, strict=True):
            experts = layer.experts
            assert isinstance(experts, Experts)
            if not experts.hashed:
                experts.bias += self.optimizer.config.balance_rate * torch.sign(even - load.detach())
