"""The mass of selected entries is what attention gives them: rebuilt from the attention's own output."""

import pytest
import torch

from forepage.model.attention_mass import attention_mass
from forepage_kernels.prefill_attention.reference import prefill_attention

WINDOW = 4
SCALE = 0.5


@pytest.mark.parametrize(("start", "num_tokens", "num_entries"), [(0, 3, 0), (7, 1, 2), (40, 5, 11)])
def test_mass_is_the_share_that_attention_gives(start: int, num_tokens: int, num_entries: int) -> None:
    """Of rows that are unit vectors, attention's output holds every row's weight in a place of its own."""
    generator = torch.Generator().manual_seed(start)
    num_window = num_tokens + min(start, WINDOW - 1)
    dims = num_entries + num_window
    unit = torch.eye(dims)
    q = torch.randn(num_tokens, 3, dims, generator=generator)
    sinks = torch.randn(3, generator=generator)
    closed = [min((start + token + 1) // 4, num_entries) for token in range(num_tokens)]
    selected = torch.full((num_tokens, 6), -1)
    for token, visible in enumerate(closed):
        chosen = torch.randperm(visible, generator=generator)[:4].sort().values
        selected[token, : len(chosen)] = chosen
    rows, window = unit[:num_entries], unit[num_entries:]
    out = prefill_attention(
        q, rows, selected, window, sinks, start=start, ratio=4, window_tokens=WINDOW, softmax_scale=SCALE
    )
    mass = attention_mass(q, rows, selected, window, sinks, window_tokens=WINDOW, softmax_scale=SCALE)
    wanted = torch.zeros(num_tokens, 6)
    for token in range(num_tokens):
        kept = selected[token] >= 0
        wanted[token, kept] = out[token].mean(dim=0)[selected[token][kept]]
    torch.testing.assert_close(mass, wanted, atol=1e-6, rtol=1e-5)
    assert (mass[selected < 0] == 0).all()
    assert mass.sum() < num_tokens
