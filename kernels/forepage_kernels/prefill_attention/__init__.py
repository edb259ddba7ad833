"""Attention of consecutive tokens of one sequence: selected or all closed compressed rows, and the window."""

import torch
from torch import Tensor

from forepage_kernels.checks import check_tensor
from forepage_kernels.errors import ShapeError
from forepage_kernels.prefill_attention import reference


def prefill_attention(
    q: Tensor,
    rows: Tensor,
    selected: Tensor | None,
    window: Tensor,
    sinks: Tensor,
    *,
    start: int,
    ratio: int,
    window_tokens: int,
    softmax_scale: float,
) -> Tensor:
    """Attend as `sparse_decode` does, for tokens start..start + T - 1 over decoded rows they share.

    Shapes: q f32|bf16 [T, H, d], rows [N, d] one compressed row per `ratio` tokens (N = 0: none),
    selected i64 [T, K] entries to attend (negative: none), None for all; window [b + T, d] the rows of
    tokens start - b onwards; sinks f32 [H] -> q's dtype [T, H, d]. Entries not closed at a token,
    n >= (t + 1) // ratio, are never attended; of the window the last `window_tokens`, its own included.
    Rows and window have q's dtype, or are fp32. No row is read that no token of the call may attend.
    Source: DeepSeek-V4 inference/model.py, Attention; the sink has no value row.
    """
    check_tensor("q", q, dtype=(torch.float32, torch.bfloat16), shape=[None, None, None])
    num_tokens, heads, dims = q.shape
    wide = (q.dtype, torch.float32)
    check_tensor("rows", rows, dtype=wide, shape=[None, dims], device=q.device)
    check_tensor("window", window, dtype=rows.dtype, shape=[None, dims], device=q.device)
    check_tensor("sinks", sinks, dtype=torch.float32, shape=[heads], device=q.device)
    if selected is not None:
        check_tensor("selected", selected, dtype=torch.int64, shape=[num_tokens, None], device=q.device)
    before = window.shape[0] - num_tokens
    if not 0 <= before <= start or ratio < 1 or window_tokens < 1:
        raise ShapeError(f"window: {before} rows before token {start}, ratio {ratio}, window {window_tokens}")
    if q.is_cuda and rows.dtype == q.dtype:
        from forepage_kernels.prefill_attention.kernel import prefill_attention as launch

        attend = launch
    else:
        attend = reference.prefill_attention
    return attend(
        q,
        rows,
        selected,
        window,
        sinks,
        start=start,
        ratio=ratio,
        window_tokens=window_tokens,
        softmax_scale=softmax_scale,
    )
