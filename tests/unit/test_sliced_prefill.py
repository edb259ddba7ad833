"""A chunk done part by part, with decode steps of others between: it changes no bit of either."""

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from forepage.model.kv_pools import KvPools
from forepage.worker.commands import ALL_PARTS
from rigs.decode import DecodeRig, prompts

STEPS, LAST_STEPS = 16, 3
LENGTHS = (300, 700, 1_100)


@dataclass(frozen=True)
class Seen:
    """Logits of two sequences beside the prefill of a third, then of all three, and all KV bytes."""

    beside: Tensor  # f32 [steps, 2, vocab]
    together: Tensor  # f32 [steps, 3, vocab]
    pools: list[Tensor]
    num_between: int


def seen(device: torch.device, *, parts_at_once: int, max_graphs: int) -> Seen:
    """The third sequence's prompt is one chunk; a step of the two others comes between two slices of it."""
    rig = DecodeRig(device, num_sequences=3, blocks_each=6, max_graphs=max_graphs)
    try:
        *others, third = (text[:length] for text, length in zip(prompts(3, 1_200), LENGTHS, strict=True))
        held = [rig.add(prompt) for prompt in others]
        steps: list[Tensor] = []

        def step() -> None:
            steps.append(rig.launch(held).logits[:2].clone())

        rig.add(third, parts_at_once=parts_at_once, between=step)
        num_between = len(steps)
        while len(steps) < STEPS:
            step()
        together = [rig.launch().logits[:3].clone() for _ in range(LAST_STEPS)]
        pools = [getattr(rig.memory.pools, item.name).view(torch.uint8).cpu() for item in fields(KvPools)]
        return Seen(torch.stack(steps).cpu(), torch.stack(together).cpu(), pools, num_between)
    finally:
        rig.close()


def check_same(sliced: Seen, whole: Seen) -> None:
    assert not whole.num_between
    assert not whole.together.isnan().any()
    assert torch.equal(sliced.beside, whole.beside)
    assert torch.equal(sliced.together, whole.together)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sliced.pools, whole.pools, strict=True))


def test_a_chunk_in_slices_is_the_chunk() -> None:
    with torch.inference_mode():
        whole = seen(torch.device("cpu"), parts_at_once=ALL_PARTS, max_graphs=0)
        sliced = seen(torch.device("cpu"), parts_at_once=3, max_graphs=0)
    assert sliced.num_between == 4, "14 parts"
    check_same(sliced, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("parts_at_once", [1, 3])
def test_slices_between_replayed_graphs_change_no_bit(parts_at_once: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    with torch.inference_mode():
        whole = seen(device, parts_at_once=ALL_PARTS, max_graphs=16)
        check_same(seen(device, parts_at_once=parts_at_once, max_graphs=16), whole)
