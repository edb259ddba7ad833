"""Hyper-connections around a sublayer: four residual streams into its input, its output back into them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.mix_streams import reference

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class MixParameters:
    """One site's parameters for S streams: base f32 [(2+S)*S], scale f32 [3], and the model's constants."""

    base: Tensor
    scale: Tensor
    eps: float
    norm_eps: float
    iterations: int


def project_streams(streams: Tensor, fn: Tensor) -> Tensor:
    """The streams of a token times a site's matrix, in fp32, in P parts of the columns whose sum it is.

    Shapes: streams f32|bf16 [n, S, D], fn f32 [W, S*D] -> f32 [P, n, W]; P depends on S*D alone.
    """
    check_tensor("streams", streams, dtype=DTYPES, shape=[None, None, None])
    columns = streams.shape[1] * streams.shape[2]
    check_tensor("fn", fn, dtype=torch.float32, shape=[None, columns], device=streams.device)
    if streams.is_cuda and streams.dtype == torch.bfloat16:
        from forepage_kernels.mix_streams.projection import project_streams as launch

        return launch(streams, fn)
    return reference.project_streams(streams, fn)


def collapse_streams(
    streams: Tensor, projected: Tensor, norm_weight: Tensor | None, how: MixParameters
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's input [n, D], and the way back: post f32 [n, S], comb f32 [n, S, S].

    Shapes: streams f32|bf16 [n, S, D], projected f32 [P, n, (2+S)*S] (`project_streams`' parts, P > 0, not
    yet divided by the streams' root mean square), norm_weight f32 [D]: the input's RMS norm, none: it has
    none. comb is made doubly stochastic by `iterations` Sinkhorn steps, columns first and last. S is a power
    of two. All in fp32; the input is rounded to the streams' dtype before its norm and after it.
    Source: DeepSeek-V4 inference/model.py, hc_pre and hc_split_sinkhorn.
    """
    check_tensor("streams", streams, dtype=DTYPES, shape=[None, None, None])
    num_tokens, num_streams, dims = streams.shape
    if num_streams & (num_streams - 1) or num_streams == 0:
        raise ShapeError(f"streams: {num_streams} streams is no power of two")
    device, width = streams.device, (2 + num_streams) * num_streams
    check_tensor("projected", projected, dtype=torch.float32, shape=[None, num_tokens, width], device=device)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, dtype=torch.float32, shape=[dims], device=device)
    check_tensor("base", how.base, dtype=torch.float32, shape=[width], device=device)
    check_tensor("scale", how.scale, dtype=torch.float32, shape=[3], device=device)
    if streams.is_cuda:
        from forepage_kernels.mix_streams.kernel import collapse_streams as launch

        return launch(streams, projected, norm_weight, how)
    return reference.collapse_streams(streams, projected, norm_weight, how)


def expand_streams(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """stream k <- post_k * output + sum_j comb[j, k] * stream_j, in fp32, in the streams' dtype.

    Shapes: output f32|bf16 [n, D], streams f32|bf16 [n, S, D], post f32 [n, S], comb f32 [n, S, S].
    Source: DeepSeek-V4 inference/model.py, hc_post.
    """
    check_tensor("streams", streams, dtype=DTYPES, shape=[None, None, None])
    num_tokens, num_streams, dims = streams.shape
    device = streams.device
    check_tensor("output", output, dtype=DTYPES, shape=[num_tokens, dims], device=device)
    check_tensor("post", post, dtype=torch.float32, shape=[num_tokens, num_streams], device=device)
    check_tensor(
        "comb", comb, dtype=torch.float32, shape=[num_tokens, num_streams, num_streams], device=device
    )
    if streams.is_cuda:
        from forepage_kernels.mix_streams.kernel import expand_streams as launch

        return launch(output, streams, post, comb)
    return reference.expand_streams(output, streams, post, comb)
