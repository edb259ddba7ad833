"""Where a prompt's last tokens looked, by brute force; and that plans keep it, within its share."""

from dataclasses import replace

import torch

from forepage.kv.evidence import EVIDENCE_PROBABILITY
from forepage.kv.geometry import BLOCK_ENTRIES
from forepage.kv.ids import BlockIdx
from forepage.kv.plan_source import PlanSource
from forepage.model.indexer import IndexerTap
from forepage.model.prompt_evidence import SURROUNDINGS, prompt_evidence
from forepage.rpc import index_pb2 as pb
from forepage.settings import ResidencyMode
from forepage.worker.residency import PROMPT_SCORE, PROMPT_SHARE, _best
from rigs.worker import plan_reply, text_tokens, worker_rig

TOKENS, TOPK, BLOCKS = 7, 12, 5


def random_tap(seed: int) -> IndexerTap:
    """Ascending entries, padded with -1 as a short history pads them; peaked scores."""
    generator = torch.Generator().manual_seed(seed)
    selected = torch.full((TOKENS, TOPK), -1)
    scores = torch.full((TOKENS, TOPK), float("-inf"))
    for token in range(TOKENS):
        count = int(torch.randint(0, TOPK + 1, (1,), generator=generator))
        entries = torch.randperm(BLOCKS * BLOCK_ENTRIES, generator=generator)[:count].sort().values
        selected[token, :count] = entries
        scores[token, :count] = torch.randn(count, generator=generator) * 3
    return IndexerTap(torch.zeros(TOKENS, 1, 1), torch.zeros(TOKENS, 1), selected, scores)


def brute_force(tap: IndexerTap, num_tokens: int) -> list[float]:
    best = [0.0] * BLOCKS
    for token in range(TOKENS - num_tokens, TOKENS):
        entries, scores = tap.chosen(token)
        for entry, share in zip(entries.tolist(), scores.softmax(0).tolist(), strict=True):
            if share < EVIDENCE_PROBABILITY:
                continue
            for near in range(entry - SURROUNDINGS, entry + SURROUNDINGS + 1):
                if 0 <= near < BLOCKS * BLOCK_ENTRIES:
                    best[near // BLOCK_ENTRIES] = max(best[near // BLOCK_ENTRIES], share)
    return best


def test_blocks_near_evidence_have_its_largest_share() -> None:
    for seed in range(40):
        tap = random_tap(seed)
        for num_tokens in (1, 3, TOKENS):
            expected = torch.tensor(brute_force(tap, num_tokens))
            torch.testing.assert_close(prompt_evidence(tap, num_tokens, BLOCKS), expected)


def test_the_best_come_first_lower_block_at_equal_mass_none_beyond_the_tail() -> None:
    mass = {BlockIdx(4): 0.5, BlockIdx(1): 0.5, BlockIdx(9): 0.9, BlockIdx(2): 0.7}
    assert list(_best(mass, PROMPT_SCORE, 2, below=9)) == [(2, 1.7), (1, 1.5)]
    assert list(_best(mass, PROMPT_SCORE, 0, below=9)) == []


PROMPT = text_tokens(2_100)
BUDGET = 4


def planning(request: pb.LookaheadRequest) -> pb.LookaheadReply:
    """An index that always wants blocks 1 and 3."""
    return plan_reply(request, [1, 3])


def test_the_first_set_holds_what_the_prompts_tail_looked_at_and_the_plan_beside_it() -> None:
    with worker_rig(prompt_tokens=256) as rig:
        rig.index.auto = planning
        running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=12, budget_blocks=BUDGET)
        rig.run_until(lambda: len(running.tokens) >= 3)
        resident, prompt = running.sequence.resident, running.sequence.lookahead.prompt
        far = sorted((-share, idx) for idx, share in prompt.items() if idx < resident.pinned_from)
        best = [idx for _, idx in far[: int(BUDGET * PROMPT_SHARE)]]
        assert len(best) == 3, "the seeded model looks everywhere"
        planned = [idx for idx in (1, 3) if idx not in best]
        assert resident.chosen == sorted([*best, *planned[: BUDGET - len(best)]])
        rig.run(running)


def test_a_resumed_prompt_is_asked_again_and_says_the_same() -> None:
    with worker_rig(prompt_tokens=256) as rig:
        rig.index.auto = planning
        seen = []
        for _ in range(2):
            running = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=4, budget_blocks=BUDGET)
            rig.run(running)
            assert running.finished is not None
            seen.append((running.finished.cached_tokens, running.tokens, running.sequence.lookahead.prompt))
        (fresh, *first), (cached, *second) = seen
        assert (fresh, cached) == (0, 1_792), "2100 - 256 lies in the block from 1792 on"
        assert first == second


def test_baselines_and_full_sequences_have_none() -> None:
    with worker_rig(prompt_tokens=256) as rig:
        rig.index.auto = planning
        lookahead = rig.submit(PROMPT, mode=ResidencyMode.LOOKAHEAD, max_tokens=2, name="a")
        request = replace(lookahead.sequence.request, request_id="b", plan_source=PlanSource.RECENCY)
        baseline = rig.submit_request(request)
        full = rig.submit(PROMPT, mode=ResidencyMode.FULL, max_tokens=2, name="c")
        rig.run(lookahead, baseline, full)
        assert lookahead.sequence.lookahead.prompt
        assert not baseline.sequence.lookahead.prompt
        assert not full.sequence.lookahead.prompt
