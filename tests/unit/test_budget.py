"""The budget of a sequence where nobody names one, and that a request which names one is paged as it asks."""

from itertools import pairwise
from typing import Any

import pytest

from forepage.kv.budget import POINTS, budget_for
from forepage.rpc import index_pb2, worker_pb2
from forepage.settings import WorkerSettings
from forepage.worker.request import Request

BLOCK_TOKENS = 256


def request(num_tokens: int, *, settings: WorkerSettings | None = None, **residency: Any) -> Request:
    message = worker_pb2.GenerateRequest(
        prompt_token_ids=[1] * (num_tokens - 1),
        sampling=worker_pb2.Sampling(max_tokens=2),
        residency=worker_pb2.Residency(**residency),
    )
    return Request.parse(message, settings or WorkerSettings(), vocab_size=256, eos=0)


def test_the_budget_is_the_measured_one_at_each_length_and_never_falls() -> None:
    assert [budget_for(blocks) for blocks, _ in POINTS] == [budget for _, budget in POINTS]
    budgets = [budget_for(blocks) for blocks in range(10_000)]
    assert all(after >= before for before, after in pairwise(budgets))
    assert min(budgets) == POINTS[0][1]


def test_beyond_the_last_length_its_share_is_kept() -> None:
    blocks, budget = POINTS[-1]
    assert budget_for(4 * blocks) == 4 * budget


@pytest.mark.parametrize(("num_tokens", "budget"), [(100, 8), (65_536, 24), (131_072, 36), (98_304, 30)])
def test_a_request_that_names_none_has_the_budget_of_its_length(num_tokens: int, budget: int) -> None:
    asked = request(num_tokens)
    assert asked.budget_blocks == budget
    assert not asked.asks_to_page


def test_a_servers_budget_goes_before_the_lengths_and_a_requests_before_both() -> None:
    settings = WorkerSettings(budget_blocks=7)
    assert request(65_536, settings=settings).budget_blocks == 7
    named = request(65_536, settings=settings, budget_blocks=3)
    assert (named.budget_blocks, named.asks_to_page) == (3, True)


def test_a_baselines_plans_are_paged_too() -> None:
    assert request(65_536, plan_source=index_pb2.PLAN_SOURCE_RECENCY).asks_to_page
