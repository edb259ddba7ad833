"""A model split over ranks against the same model on one: cases and what is measured, for tests and table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage.kv.geometry import KvFormat, KvGeometry
from forepage.model.experts import DENSE_EXPERTS
from forepage.model.kv_pools import KvPools, PoolCapacity, PrefillChunk
from forepage.model.rank_group import ALONE, RankGroup
from forepage.model.spec import ModelSpec
from forepage.model.transformer import Transformer
from forepage.model.weights import seeded_weights
from rigs.parity import SEED, Subject, decode_from, prefill
from rigs.parity_configs import MIXED
from rigs.ranks import CPU, on_ranks
from rigs.tie_breaker import TieBreaker

NUM_TOKENS = 400
FOUR_WAYS = MIXED | {"o_groups": 4}
MANY_EXPERTS = FOUR_WAYS | {"n_routed_experts": 2 * DENSE_EXPERTS, "num_experts_per_tok": 3}
"""More than run densely: tokens are sorted by expert, and a rank has only some of the experts."""


@dataclass(frozen=True)
class Case:
    """A config, how many entries its indexers take, and over how many ranks it is split."""

    id: str
    config: dict[str, object]
    index_topk: int
    num_ranks: int
    chunks: tuple[int, ...] = (NUM_TOKENS, 64, 100)

    @property
    def full_config(self) -> dict[str, object]:
        return self.config | {"index_topk": self.index_topk}


CASES = [
    Case("two ranks", MIXED, 256, 2, chunks=(NUM_TOKENS, 7, 64, 100)),
    Case("two ranks, top 32", MIXED, 32, 2),
    Case("four ranks", FOUR_WAYS, 256, 4),
    Case("four ranks, sorted experts", MANY_EXPERTS, 256, 4),
]


def split_model(case: Case, ranks: RankGroup, *, kv: KvFormat = KvFormat.FP32) -> Transformer:
    """One rank's model."""
    spec = ModelSpec.from_config(case.full_config)
    weights = seeded_weights(
        spec, SEED, dtype=torch.float32, device=CPU, rank=ranks.rank, num_ranks=ranks.num_ranks
    )
    geometry = KvGeometry.from_config(case.full_config, kv)
    return Transformer(spec, geometry, weights, CPU, target_layers=(2,), ranks=ranks)


def text(case: Case) -> Tensor:
    """Random tokens, the same each time."""
    vocab = ModelSpec.from_config(case.full_config).vocab_size
    return torch.randint(vocab, (NUM_TOKENS,), generator=torch.Generator().manual_seed(SEED))


def whole_text_logits(case: Case) -> Tensor:
    """What one rank says at every position, prefilled at once."""
    model, tokens = split_model(case, ALONE), text(case)
    blocks = model.geometry.num_blocks(NUM_TOKENS)
    pools = KvPools.poisoned(model.geometry, PoolCapacity(1, blocks, blocks, blocks), CPU)
    table = torch.arange(blocks, dtype=torch.int32)
    chunk = PrefillChunk(0, 0, table, table, table)
    with torch.inference_mode():
        return model.prefill(tokens, chunk, pools, all_logits=True).logits


def rank_differences(case: Case) -> list[dict[str, float]]:
    """By rank: the largest difference of any logit to one rank's, for each way to take the text in."""
    expected, tokens = whole_text_logits(case), text(case)

    def differences(ranks: RankGroup) -> dict[str, float]:
        subject = Subject(split_model(case, ranks), tokens, expected, TieBreaker([], []))
        how = {_prefilled(n): prefill(subject, chunk=n) for n in case.chunks}
        how["decode, full"] = decode_from(subject, prompts=(1, 127, 255, 390), steps=6, paged=False)
        how["decode, exact"] = decode_from(subject, prompts=(300, 390), steps=6, paged=True)
        return how

    return on_ranks(case.num_ranks, differences)


def _prefilled(chunk: int) -> str:
    return "prefill at once" if chunk == NUM_TOKENS else f"prefill in chunks of {chunk}"
