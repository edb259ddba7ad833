"""Routing: equal beginnings meet, workers that come or go move only their share, overload spills."""

import pytest

from forepage.gateway.routing import PREFIX_TOKENS, WorkerLoad, rank_workers


def workers(*names: str, load: int = 0) -> list[WorkerLoad]:
    return [WorkerLoad(name, load, 4) for name in names]


def first(prompt: list[int], known: list[WorkerLoad], salt: str = "") -> str:
    return rank_workers(prompt, salt, known)[0].worker_id


def test_prompts_with_the_same_first_block_meet() -> None:
    known = workers("a", "b", "c", "d", "e")
    prefix = list(range(PREFIX_TOKENS))
    assert len({first([*prefix, tail], known) for tail in range(50)}) == 1
    assert len({first([tail, *prefix], known) for tail in range(50)}) == 5


def test_order_of_workers_does_not_matter() -> None:
    known = workers("a", "b", "c")
    assert rank_workers([1], "", known) == rank_workers([1], "", known[::-1])


def test_salts_spread_the_same_prompt() -> None:
    known = workers("a", "b", "c")
    assert len({first([1], known, str(salt)) for salt in range(50)}) == 3


def test_leaving_worker_moves_only_its_share() -> None:
    known = workers("a", "b", "c", "d")
    rest = [worker for worker in known if worker.worker_id != "b"]
    for prompt in range(200):
        before = first([prompt], known)
        if before != "b":
            assert first([prompt], rest) == before


def test_shares_are_even() -> None:
    known = workers("a", "b", "c", "d")
    chosen = [first([prompt], known) for prompt in range(2000)]
    assert all(400 < chosen.count(worker.worker_id) < 600 for worker in known)


@pytest.mark.parametrize(
    ("load", "least", "spills"), [(4, 0, False), (5, 4, True), (5, 5, False), (9, 8, True)]
)
def test_overload_spills_to_the_least_loaded(load: int, least: int, spills: bool) -> None:
    home, second, third = rank_workers([7], "", workers("a", "b", "c"))
    known = [
        WorkerLoad(home.worker_id, load, 4),
        WorkerLoad(second.worker_id, least + 1, 4),
        WorkerLoad(third.worker_id, least, 4),
    ]
    ranked = [worker.worker_id for worker in rank_workers([7], "", known)]
    normal = [home.worker_id, second.worker_id, third.worker_id]
    assert ranked == ([normal[2], *normal[:2]] if spills else normal)


def test_no_workers_no_choice() -> None:
    assert rank_workers([1], "", []) == []
