"""What one kind of layer attends in a packed batch, and the attention over it: flex on a GPU, dense on a CPU.

Rows are [compressed entries, padded to a fixed number | the tokens' own]; keys and values are the same. All
kinds of layers have the same shapes, so one compiled kernel serves them. A sink adds to the softmax
denominator only: the output is that without it, times sigmoid(log-sum-exp - sink).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from forepage.training.backbone.selection import Selection


@dataclass(frozen=True)
class LayerRows:
    """Of n packed tokens and a layer kind with N entries (ratio 0: none), in P >= N places."""

    cos: Tensor  # f32 [n, rope / 2]
    sin: Tensor
    entry_cos: Tensor  # f32 [N, rope / 2]
    entry_sin: Tensor
    first_entries: Tensor  # bool [N]: the first of a document
    flattening: Tensor  # f32 [n]: attention logits are multiplied by it
    fp8_share: Tensor  # f32 scalar: 1 rounds rows as an FP8 cache does
    places: int
    visible: BlockMask | Tensor  # which rows each token sees; a dense bool [n, P + n] on a CPU
    selection: Selection | None = None  # narrows `visible` to the entries that each token's indexer chooses

    def stored(self, entries: Tensor | None, own: Tensor) -> Tensor:
        """entries [N, d], own [n, d] -> [P + n, d]; places without an entry are never seen."""
        if entries is None:
            return torch.cat((own.new_zeros(self.places, own.shape[1]), own))
        missing = self.places - entries.shape[0]
        if not missing:
            return torch.cat((entries, own))
        return torch.cat((entries, own.new_zeros(missing, own.shape[1]), own))


def attend(query: Tensor, stored: Tensor, sink: Tensor, visible: BlockMask | Tensor) -> tuple[Tensor, Tensor]:
    """query [n, H, d], stored [P + n, d], sink f32 [H] -> output [n, H, d], lse f32 [n, H] with the sink."""
    scale = query.shape[-1] ** -0.5
    if isinstance(visible, Tensor):
        output, lse = _dense(query, stored, visible, scale)
    else:
        # Every head gets the rows as its own: the gradient's programs are then spread over heads too.
        shared = stored.expand(1, query.shape[1], -1, -1)
        output, aux = flex_attention(
            query.transpose(0, 1).unsqueeze(0),
            shared,
            shared,
            block_mask=visible,
            scale=scale,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        output, lse = output[0].transpose(0, 1), aux.lse[0].transpose(0, 1)
    kept = torch.sigmoid(lse - sink)
    return (output.float() * kept.unsqueeze(-1)).to(query.dtype), torch.logaddexp(lse, sink)


def _dense(query: Tensor, stored: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("thd,nd->thn", query, stored).float() * scale
    logits = logits.masked_fill(~visible.unsqueeze(1), float("-inf"))
    shares = torch.softmax(logits, dim=-1).to(stored.dtype)
    return torch.einsum("thn,nd->thd", shares, stored), logits.logsumexp(-1)
