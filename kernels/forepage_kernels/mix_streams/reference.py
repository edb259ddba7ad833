"""Plain torch mix_streams.

Sinkhorn's sums are products with 0/1 matrices [S*S, S*S]: one operation gives every element the sum of its
row (or column) plus eps, which halves the number of small operations: that loop is most of what this costs.
"""

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from forepage_kernels.mix_streams import MixParameters


def project_streams(streams: Tensor, fn: Tensor) -> Tensor:
    """See the package."""
    return torch.nn.functional.linear(streams.flatten(-2).float(), fn).unsqueeze(0)


def collapse_streams(
    streams: Tensor, projected: Tensor, norm_weight: Tensor | None, how: "MixParameters"
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package."""
    num_streams = streams.shape[1]
    flat = streams.flatten(-2).float()  # [n, S*D]
    mixed = projected.sum(0) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + how.norm_eps)
    sizes = [num_streams, num_streams, num_streams * num_streams]
    pre_x, post_x, comb_x = mixed.split_with_sizes(sizes, dim=-1)
    pre_b, post_b, comb_b = how.base.split_with_sizes(sizes)
    pre = torch.sigmoid(pre_x * how.scale[0] + pre_b) + how.eps
    post = 2 * torch.sigmoid(post_x * how.scale[1] + post_b)
    comb = (comb_x * how.scale[2] + comb_b).view(-1, num_streams, num_streams)
    x = torch.bmm(pre.unsqueeze(-2), streams.float()).squeeze(-2).to(streams.dtype)  # [n, D]
    if norm_weight is not None:
        unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + how.norm_eps)
        x = (unit * norm_weight).to(x.dtype)
    return x, post, _balance(comb, how)


def expand_streams(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See the package."""
    spread = post.unsqueeze(-1) * output.float().unsqueeze(-2)  # [n, S, D]
    return torch.baddbmm(spread, comb.transpose(-1, -2), streams.float()).to(streams.dtype)


def _balance(logits: Tensor, how: "MixParameters") -> Tensor:
    """[n, S, S] -> rows and columns sum to about 1. The column step comes first and last."""
    num_streams = logits.shape[-1]
    row_sums, column_sums = _sums(num_streams, logits.device)
    eps = logits.new_full((num_streams * num_streams,), how.eps)
    comb = torch.softmax(logits, dim=-1).flatten(-2) + eps  # [n, S*S]
    comb = comb / torch.addmm(eps, comb, column_sums)
    for _ in range(how.iterations - 1):
        comb = comb / torch.addmm(eps, comb, row_sums)
        comb = comb / torch.addmm(eps, comb, column_sums)
    return comb.view(logits.shape)


@cache
def _sums(num_streams: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0/1 matrices that give every element of a flattened S x S matrix its row's and its column's sum."""
    with torch.inference_mode(False):
        ones, eye = torch.ones(num_streams, num_streams), torch.eye(num_streams)
        return torch.kron(eye, ones).to(device), torch.kron(ones, eye).to(device)
