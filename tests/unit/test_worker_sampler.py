"""Sampling depends on nothing but logits, parameters, seed and position."""

import torch

from forepage.worker.sampler import Sampling, sample, uniform

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)
PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)


def draws(how: Sampling, logits: torch.Tensor, count: int = 4000) -> list[int]:
    rows = logits.expand(count, -1)
    return sample(rows, [how] * count, range(count))


def test_sampler_greedy_takes_the_largest() -> None:
    assert sample(torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]]), [GREEDY] * 2, [0, 1]) == [1, 0]


def test_sampler_follows_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.2, 0.2, 0.1])
    counts = torch.bincount(torch.tensor(draws(PLAIN, probs.log())), minlength=4) / 4000
    assert (counts - probs).abs().max() < 0.03  # 3.8 standard deviations of the largest


def test_sampler_temperature_sharpens() -> None:
    probs = torch.tensor([0.5, 0.5 * 0.5, 0.25])
    cold = Sampling(0.25, 1.0, 0, 0.0, 0)
    wanted = (probs.log() / 0.25).softmax(-1)
    counts = torch.bincount(torch.tensor(draws(cold, probs.log())), minlength=3) / 4000
    assert (counts - wanted).abs().max() < 0.03


def test_sampler_cuts_by_top_k_top_p_and_min_p() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draws(Sampling(1.0, 1.0, 2, 0.0, 0), logits)) == {0, 1}
    assert set(draws(Sampling(1.0, 0.65, 0, 0.0, 0), logits)) == {0, 1}
    assert set(draws(Sampling(1.0, 0.75, 0, 0.0, 0), logits)) == {0, 1, 2}
    assert set(draws(Sampling(1.0, 1.0, 0, 0.6, 0), logits)) == {0, 1}
    assert set(draws(Sampling(1.0, 1e-6, 0, 0.0, 0), logits)) == {0}


def test_sampler_rows_do_not_disturb_each_other() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    hows = [PLAIN, GREEDY, Sampling(0.7, 0.9, 10, 0.0, 5)]
    together = sample(logits, hows, [7, 8, 9])
    alone = [sample(logits[row : row + 1], [hows[row]], [7 + row])[0] for row in range(3)]
    assert together == alone


def test_uniform_is_a_function_of_seed_and_position() -> None:
    values = {(seed, position): uniform(seed, position) for seed in range(40) for position in range(40)}
    assert values == {pair: uniform(*pair) for pair in values}
    assert len(set(values.values())) == len(values)
    assert all(0.0 <= value < 1.0 for value in values.values())
    assert abs(sum(values.values()) / len(values) - 0.5) < 0.03
