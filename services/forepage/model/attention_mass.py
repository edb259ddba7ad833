"""How much of a token's attention its selected entries got: what an indexer's scores only estimate.

For measuring, beside a prefill; one token at a time, so that a long context needs little memory.
"""

import torch
from torch import Tensor


def attention_mass(
    q: Tensor,
    rows: Tensor,
    selected: Tensor,
    window: Tensor,
    sinks: Tensor,
    *,
    window_tokens: int,
    softmax_scale: float,
) -> Tensor:
    """Softmax weights of the selected rows, mean over heads; window and sink take part in the sum.

    Shapes: q [n, H, d], rows [N, d], selected i64 [n, k] (below 0: none), window [W, d] whose last n rows are
    the tokens' own, sinks f32 [H] -> f32 [n, k].
    """
    mass = q.new_zeros(selected.shape, dtype=torch.float32)
    num_tokens = q.shape[0]
    for token in range(num_tokens):
        is_entry = selected[token] >= 0
        newest = window.shape[0] - num_tokens + token + 1
        chosen = rows[selected[token][is_entry]].float()  # [c, d]
        recent = window[max(0, newest - window_tokens) : newest].float()  # [w, d]
        scores = q[token].float() @ torch.cat((chosen, recent)).mT * softmax_scale  # [H, c + w]
        scores = torch.cat((scores, sinks.float().unsqueeze(1)), dim=1)
        mass[token][is_entry] = scores.softmax(dim=1)[:, : chosen.shape[0]].mean(dim=0)
    return mass
