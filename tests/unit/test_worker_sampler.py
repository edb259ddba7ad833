"""Sampling depends on nothing but logits, parameters, seed and position."""

import pytest
import torch

from forepage.worker.sampler import Row, Sampling, sample, uniform

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)
PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)


def draws(how: Sampling, logits: torch.Tensor, count: int = 4000) -> list[int]:
    rows = logits.expand(count, -1)
    return [pick.token for pick in sample(rows, [Row(how, position) for position in range(count)])]


def test_sampler_greedy_takes_the_largest() -> None:
    picks = sample(torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]]), [Row(GREEDY, 0), Row(GREEDY, 1)])
    assert [pick.token for pick in picks] == [1, 0]


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
    rows = [Row(how, 7 + at) for at, how in enumerate(hows)]
    assert sample(logits, rows) == [sample(logits[at : at + 1], [row])[0] for at, row in enumerate(rows)]


def test_sampler_penalties_follow_their_definitions() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    how = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}

    def pick(generated: dict[int, int], seen: set[int], **penalties: float) -> int:
        return sample(logits, [Row(Sampling(**how, **penalties), 0, generated, seen)])[0].token  # type: ignore[arg-type]

    assert pick({0: 3}, {0}) == 0, "without a penalty the past does not matter"
    assert pick({0: 1}, {0}, presence_penalty=0.2) == 1
    assert pick({0: 1}, {0}, frequency_penalty=0.05) == 0
    assert pick({0: 3}, {0}, frequency_penalty=0.05) == 1
    assert pick({}, {0}, repetition_penalty=1.2) == 1, "the prompt counts"
    assert pick({}, {0, 1, 2}, repetition_penalty=100.0) == 0, "2/100 > 1.9/100 > -100"


def test_sampler_masks_are_never_left() -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(3))
    mask = (1 << 4 | 1 << 17).to_bytes(4, "little")
    for how in (GREEDY, PLAIN):
        rows = [Row(how, position, mask=mask) for position in range(50)]
        assert {pick.token for pick in sample(logits.expand(50, -1), rows)} <= {4, 17}


def test_sampler_logprobs_are_the_models_own() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(2))
    how = Sampling(0.0, 1.0, 0, 0.0, 0, presence_penalty=2.0, num_logprobs=3)
    pick = sample(logits, [Row(how, 0, {int(logits.argmax()): 1})])[0]
    wanted = logits[0].log_softmax(-1)
    assert pick.logprob == pytest.approx(float(wanted[pick.token]))
    assert [token for token, _ in pick.top] == wanted.topk(3).indices.tolist()


def test_uniform_is_a_function_of_seed_and_position() -> None:
    values = {(seed, position): uniform(seed, position) for seed in range(40) for position in range(40)}
    assert values == {pair: uniform(*pair) for pair in values}
    assert len(set(values.values())) == len(values)
    assert all(0.0 <= value < 1.0 for value in values.values())
    assert abs(sum(values.values()) / len(values) - 0.5) < 0.03
