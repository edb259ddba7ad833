"""The sparse stage attends what the served model would: the same entries, and so the same logits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from forepage.kv.geometry import KvFormat
from forepage.training.backbone.network import Backbone, Layer, Watched
from forepage.training.backbone.official import export, start_from
from forepage.training.backbone.packing import Packing
from forepage.training.backbone.rows import attend
from forepage.training.backbone.selection import Selection, best_entries
from rigs.tiny_training import (
    CPU,
    MODEL,
    packed_inputs,
    random_network,
    random_tokens,
    served_outputs,
    training_logits,
)

TOP_K = 24
NUM_TOKENS = 1024
SAME = 2e-5
"""As in test_training_network: fp32 sums in another order."""
TIE_MARGIN = 1e-5
"""Entries whose scores are closer may be selected either way."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported network that selects few of its entries."""
    folder = tmp_path_factory.mktemp("selecting")
    model = MODEL | {"index_topk": TOP_K}
    export(random_network(model), model, folder)
    return folder


def network(folder: Path, top_k: int) -> Backbone:
    network = random_network(MODEL | {"index_topk": top_k})
    start_from(network, folder)
    return network


@torch.no_grad()
def sparse_pass(network: Backbone, documents: list[Tensor]) -> tuple[Tensor, list[Watched]]:
    """Logits f32 [n, vocab], and what each c4 layer attended."""
    inputs, packing = packed_inputs(documents)
    seen: list[Watched] = []
    streams, _ = network(inputs, packing, sparse=True, watch=seen.append)
    logits: Tensor = network.head(streams)
    return logits, seen


def marked(selected: Tensor, num_entries: int) -> Tensor:
    """i64 [n, k], -1 where there is none -> bool [n, N], one by one."""
    marks = torch.zeros(selected.shape[0], num_entries, dtype=torch.bool)
    for token, entries in enumerate(selected.tolist()):
        for entry in entries:
            if entry >= 0:
                marks[token, entry] = True
    return marks


def apart(watched: Watched, differ: Tensor) -> float:
    """How far the scores of one token's swapped entries lie apart, at most."""
    indexer, rows = watched.attention.indexer, watched.rows
    assert indexer is not None
    with torch.no_grad():
        keys = indexer.keys(watched.x, rows)
        scores = indexer.scores(watched.x, watched.attention.latent(watched.x), keys, (rows.cos, rows.sin))
    token = int(differ.any(1).nonzero()[0])
    swapped = scores[token][differ[token]]
    return float(swapped.max() - swapped.min())


@pytest.mark.parametrize(("length", "seed"), [(NUM_TOKENS, 0), (777, 1), (513, 2), (NUM_TOKENS, 5)])
def test_the_entries_attended_and_the_logits_are_the_served_ones(
    folder: Path, length: int, seed: int
) -> None:
    """Odd lengths too: what follows a token, here as if it were padding, changes nothing for it.

    Where two entries tie (of seed 5, by 9e-10), either may be taken; tokens after that are not compared.
    """
    tokens = random_tokens(NUM_TOKENS, seed)
    logits, seen = sparse_pass(network(folder, TOP_K), [tokens])
    (served,) = served_outputs(folder, tokens[:length], KvFormat.FP32, chunk=length)
    same = length
    for watched, tap in zip(seen, served.indexer, strict=True):
        assert watched.chosen is not None
        differ = watched.chosen[:same] ^ marked(tap.selected[:same], NUM_TOKENS // 4)
        if differ.any():
            assert apart(watched, differ) < TIE_MARGIN
            same = int(differ.any(1).nonzero()[0])
        counts = watched.chosen.sum(1).tolist()
        assert counts == [min(TOP_K, (token + 1) // 4) for token in range(NUM_TOKENS)]
    assert same > 8 * TOP_K, "or too little was selected from more than the best"
    torch.testing.assert_close(logits[:same], served.logits[:same], rtol=0, atol=SAME)


def test_a_selection_changes_the_logits_once_there_is_more_than_the_best(folder: Path) -> None:
    """Dense and sparse passes differ from the first token that must leave an entry out."""
    tokens = random_tokens(NUM_TOKENS)
    chooser = network(folder, TOP_K)
    sparse, _ = sparse_pass(chooser, [tokens])
    dense = training_logits(chooser, [tokens])
    off = (sparse - dense).abs().amax(1)
    first = 4 * (TOP_K + 1) - 1
    assert off[:first].max() == 0
    assert off[first:].median() > 10 * SAME


@pytest.mark.parametrize("top_k", [NUM_TOKENS // 4, NUM_TOKENS])
def test_more_than_there_are_entries_is_dense_attention_bit_for_bit(folder: Path, top_k: int) -> None:
    tokens = random_tokens(NUM_TOKENS)
    chooser = network(folder, top_k)
    sparse, seen = sparse_pass(chooser, [tokens])
    assert torch.equal(sparse, training_logits(chooser, [tokens]))
    for watched in seen:
        assert watched.chosen is not None
        assert watched.chosen.sum() == sum((token + 1) // 4 for token in range(NUM_TOKENS))


def test_packed_documents_choose_as_they_do_alone(folder: Path) -> None:
    first, second = random_tokens(512, seed=1), random_tokens(1024, seed=2)
    chooser = network(folder, TOP_K)
    together, seen = sparse_pass(chooser, [first, second])
    alone = [sparse_pass(chooser, [document]) for document in (first, second)]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), rtol=0, atol=SAME)
    for layer, watched in enumerate(seen):
        of_first, of_second = (parts[layer].chosen for _, parts in alone)
        assert watched.chosen is not None
        assert of_first is not None
        assert of_second is not None
        assert torch.equal(watched.chosen, torch.block_diag(of_first, of_second))


def test_equal_scores_go_to_the_lower_entry() -> None:
    nothing = float("-inf")
    scores = torch.tensor([[1.0, 3.0, 1.0, 1.0], [0.0, -0.0, 0.0, nothing], [nothing] * 4])
    best = best_entries(scores, 2)
    assert best.tolist() == [[True, True, False, False], [True, True, False, False], [False] * 4]


def test_scores_in_tiles_choose_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of one row's scores, then of a few: as when a long document does not fit at once."""
    tokens = [random_tokens(512, seed=1), random_tokens(512, seed=2)]
    chooser = network(folder, TOP_K)
    _, whole = sparse_pass(chooser, tokens)
    for tile in (1, 77 * 128):
        monkeypatch.setattr("forepage.training.backbone.selection.TILE_SCORES", tile)
        _, tiled = sparse_pass(chooser, tokens)
        for one, other in zip(whole, tiled, strict=True):
            assert one.chosen is not None
            assert other.chosen is not None
            differ = one.chosen ^ other.chosen
            assert not differ.any() or apart(one, differ) < TIE_MARGIN


def test_a_choice_has_no_gradient() -> None:
    packing = Packing(512, (4,), window_tokens=128, device=CPU)
    query, weights, keys = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for shape in ((512, 2, 16), (512, 2), (128, 16))
    )
    chosen = Selection(packing, 8).chosen(query, weights, keys)
    assert chosen.dtype == torch.bool
    assert not chosen.requires_grad


@torch.no_grad()
def test_the_attention_kernels_form_of_a_choice_is_compiled_once_and_equals_the_dense_one() -> None:
    """As on a GPU, but for the backend: every layer of every step brings another choice."""
    generator = torch.Generator().manual_seed(0)
    query, stored = (torch.randn(*shape, generator=generator) for shape in ((1024, 2, 32), (1280, 32)))
    sink = torch.randn(2, generator=generator)
    blocked, dense = (
        Packing(1024, (0, 4), window_tokens=128, device=CPU, in_blocks=each) for each in (True, False)
    )
    for packing in (blocked, dense):
        packing.pack([512, 512])
    closed = dense.visible(4)
    assert isinstance(closed, Tensor)
    torch._dynamo.reset()
    graphs = CompileCounter()
    attend_compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend=graphs)
    for share in (0.1, 0.0, 1.0, 0.5):
        chosen = closed[:, :256] & (torch.rand(1024, 256, generator=generator) < share)
        got = attend_compiled(query, stored, sink, blocked.narrowed(4, chosen))
        want = attend(query, stored, sink, dense.narrowed(4, chosen))
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert graphs.frame_count == 1


def test_only_layers_with_an_indexer_are_narrowed_and_watched(folder: Path) -> None:
    chooser = network(folder, TOP_K)
    _, seen = sparse_pass(chooser, [random_tokens(512)])
    indexed = [layer.attention for layer in chooser.layers if isinstance(layer, Layer) and layer.ratio == 4]
    assert [watched.attention for watched in seen] == indexed
    assert not any(each.requires_grad for watched in seen for each in (watched.x, watched.lse))
