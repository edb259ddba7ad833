"""Scores, plans and audits straight from an arena, against dense numpy computations."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forepage.coldpool.records import SlotRef
from forepage.errors import DeadlineError, DependencyError
from forepage.index.audit import AuditOutcome, audit_layer
from forepage.index.key_store import KeyStore, MappedKeys
from forepage.index.planner import Planner
from forepage.index.question import AuditQuestion, QuestionLimits
from forepage.index.scorer import BlockScores, Scorer
from forepage.kv.geometry import BLOCK_ENTRIES, KvFormat
from forepage.model.memory_indexer import MemoryIndexer
from forepage.rpc import index_pb2 as pb
from forepage.settings import SEEDED_MODEL
from rigs.key_arena import F64, SPEC, KeyArena, indexer_logits

HIDDEN = torch.randn(3, SPEC.hidden_size, generator=torch.Generator().manual_seed(4))
POSITION = 5_000
CPU = torch.device("cpu")
each_format = pytest.mark.parametrize("kv_format", list(KvFormat))


def patient() -> None:
    """A `check` that never gives up."""


def opened(made: KeyArena) -> MappedKeys:
    return KeyStore(made.arena.path, made.geometry, CPU).current()


def scorer(made: KeyArena) -> Scorer:
    return Scorer(load_indexer(made), made.geometry, CPU)


def load_indexer(made: KeyArena) -> MemoryIndexer:
    return MemoryIndexer.load(SEEDED_MODEL, SPEC, made.geometry.format, CPU)


def dense_scores(made: KeyArena, slots: list[int]) -> F64:
    """The best probability of each block over layers and entries."""
    q, weights = load_indexer(made).queries(HIDDEN, POSITION)
    if made.geometry.format is KvFormat.FP8:
        q = q.bfloat16()  # beside quantised keys
    logits = np.stack(
        [
            indexer_logits(
                q[layer].double().numpy(), weights[layer].double().numpy(), made.keys[slots, layer]
            )
            for layer in range(3)
        ]
    )  # [L, n, entries]
    best: F64 = (1 / (1 + np.exp(-logits))).max(axis=(0, 2))
    return best


def score(made: KeyArena, refs: list[SlotRef], threshold: float = 0.0) -> BlockScores:
    return scorer(made).score_blocks(
        opened(made), refs, hidden=HIDDEN, position=POSITION, threshold=threshold, check=patient
    )


@each_format
def test_block_scores_equal_a_dense_computation(tmp_path: Path, kv_format: KvFormat) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=300, kv_format=kv_format)
    slots = np.random.default_rng(1).permutation(300)[:280].tolist()  # more than one chunk, out of order
    refs = [made.complete(slot, generation=7 + slot) for slot in slots]
    found = score(made, refs)
    np.testing.assert_allclose(found.scores, dense_scores(made, slots), atol=1e-5)
    assert found.num_scored == 280


def test_block_scores_at_or_below_the_threshold_are_zero(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=40)
    refs = [made.complete(slot) for slot in range(40)]
    want = dense_scores(made, list(range(40)))
    threshold = float(np.median(want))
    found = np.array(score(made, refs, threshold).scores)
    np.testing.assert_allclose(found, np.where(want > threshold, want, 0.0), atol=1e-5)
    assert 10 < (found > 0).sum() < 30


def test_blocks_of_another_generation_state_or_slot_are_not_scored(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=6)
    refs = [made.complete(slot) for slot in range(6)]
    made.complete(1, generation=2)
    made.rewrite(2, generation=1)
    refs[3] = SlotRef(refs[3].arena_id, 2**63)
    refs[4] = SlotRef(type(refs[4].arena_id)(0xFFFFFFFF), 1)
    found = score(made, refs)
    assert [value > 0 for value in found.scores] == [True, False, False, False, False, True]
    assert found.num_scored == 2


def test_block_evicted_while_it_is_scored_is_not_scored(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=4)
    refs = [made.complete(slot) for slot in range(4)]
    found = scorer(made).score_blocks(
        opened(made),
        refs,
        hidden=HIDDEN,
        position=POSITION,
        threshold=0.0,
        check=lambda: made.rewrite(2, generation=2),
    )
    assert [value > 0 for value in found.scores] == [True, True, False, True]
    assert found.num_scored == 3


def test_damaged_keys_are_never_wanted(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=2)
    refs = [made.complete(slot) for slot in range(2)]
    for layer in range(3):
        made.damage(1, layer)
    assert [value > 0 for value in score(made, refs).scores] == [True, False]


def test_scoring_nothing_is_empty(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=1)
    assert score(made, []) == BlockScores((), 0)


QUERY = torch.randn(SPEC.index_heads, SPEC.index_dims, generator=torch.Generator().manual_seed(17))
QUERY = QUERY.bfloat16().float()  # as a model with quantised keys asks
WEIGHTS = torch.randn(SPEC.index_heads, generator=torch.Generator().manual_seed(18))
CLOSING = QUERY[:1].repeat(SPEC.index_heads, 1)
"""All heads ask the same, so the ReLU closes all or none: with negative weights half of the entries tie at
a zero, and no score is above it."""


@dataclass(frozen=True)
class Scene:
    """A sequence of blocks in an arena, some of them absent from a GPU, at a step that is audited."""

    made: KeyArena
    slots: list[int]
    refs: tuple[SlotRef, ...]
    absent: list[int]
    position: int
    layer: int
    topk: int
    query: torch.Tensor = QUERY
    weights: torch.Tensor = WEIGHTS

    @classmethod
    def make(cls, path: Path, *, kv_format: KvFormat = KvFormat.FP8, tokens: int, topk: int = 32) -> "Scene":
        num_blocks = -(-tokens // 256)
        made = KeyArena.create(path, num_slots=num_blocks + 3, kv_format=kv_format)
        rng = np.random.default_rng(8)
        slots = rng.permutation(num_blocks + 3)[:num_blocks].tolist()
        absent = np.flatnonzero(rng.random(num_blocks) < 0.6).tolist()
        refs = tuple(made.complete(slot) for slot in slots)
        return cls(made, slots, refs, absent, position=tokens - 1, layer=1, topk=topk)

    def scores(self) -> F64:
        """Of every entry, -inf where not visible: [blocks, 64]."""
        logits = indexer_logits(
            self.query.double().numpy(),
            self.weights.double().numpy(),
            self.made.keys[self.slots, self.layer],
        )
        is_visible = np.arange(logits.size).reshape(logits.shape) < (self.position + 1) // 4
        masked: F64 = np.where(is_visible, logits, -np.inf)
        return masked

    def true_top(self) -> list[int]:
        """The entries that the model selects, by falling score, equal ones by entry."""
        scores = self.scores().ravel().tolist()
        visible = [entry for entry, score in enumerate(scores) if score > -np.inf]
        return sorted(visible, key=lambda entry: (-scores[entry], entry))[: self.topk]

    def ask(self, check: Callable[[], None] = patient) -> AuditOutcome:
        scores = self.scores()
        scores[self.absent] = -np.inf
        ranked = np.argsort(-scores.ravel(), kind="stable")[: min(self.topk, (scores > -np.inf).sum())]
        question = AuditQuestion(
            layer_idx=self.layer,
            position=self.position,
            query=self.query,
            weights=self.weights,
            absent_blocks=tuple(self.absent),
            resident=tuple(zip(ranked.tolist(), scores.ravel()[ranked].tolist(), strict=True)),
            topk=self.topk,
        )
        return audit_layer(opened(self.made), self.refs, question, check)


@each_format
@pytest.mark.parametrize(
    ("tokens", "topk"), [(256 * 200, 32), (256 * 9 + 130, 32), (300, 512), (3, 32), (2000, 2**32 - 1)]
)
def test_audit_equals_a_dense_ranking(tmp_path: Path, kv_format: KvFormat, tokens: int, topk: int) -> None:
    scene = Scene.make(tmp_path / "arena", kv_format=kv_format, tokens=tokens, topk=topk)
    check_against_a_dense_ranking(scene)


@pytest.mark.parametrize(("tokens", "topk"), [(256 * 200, 64), (256 * 40, 600), (256 * 9 + 130, 2000)])
def test_audit_resolves_ties_as_the_model_does(tmp_path: Path, tokens: int, topk: int) -> None:
    made = Scene.make(tmp_path / "arena", tokens=tokens, topk=topk)
    scene = replace(made, query=CLOSING, weights=-WEIGHTS.abs())
    owners = np.array(scene.true_top()) // BLOCK_ENTRIES
    assert (scene.scores().ravel()[scene.true_top()] == 0).sum() >= min(topk, 200), "ties"
    assert 0.1 < np.isin(owners, scene.absent).mean() < 0.9, "on both sides"
    check_against_a_dense_ranking(scene)


def check_against_a_dense_ranking(scene: Scene) -> None:
    """The audit of the scene says what a ranking of all entries says."""
    scores, top = scene.scores(), np.array(scene.true_top(), dtype=np.int64)
    softmax = np.exp(scores.ravel()[top] - scores.max()) if len(top) else np.zeros(0)
    softmax /= softmax.sum() if len(top) else 1.0
    is_absent = np.isin(top // BLOCK_ENTRIES, scene.absent)
    missed = softmax * is_absent * (softmax >= 0.01)
    mass = np.bincount(top // BLOCK_ENTRIES, weights=missed, minlength=len(scene.refs))

    outcome = scene.ask()
    verdict = outcome.verdict
    assert outcome.num_unread == 0
    assert verdict.num_evidence == (softmax >= 0.01).sum()
    assert verdict.num_evidence_resident == (softmax[~is_absent] >= 0.01).sum()
    assert verdict.missed_mass == pytest.approx(softmax[is_absent].sum(), abs=1e-5)
    assert verdict.recall_at_k == (pytest.approx((~is_absent).mean()) if len(top) else 1.0)
    assert [block for block, _ in verdict.missing] == sorted(np.flatnonzero(mass), key=lambda b: -mass[b])
    np.testing.assert_allclose([m for _, m in verdict.missing], np.sort(mass[mass > 0])[::-1], atol=1e-5)


def test_audit_counts_blocks_it_could_not_read(tmp_path: Path) -> None:
    scene = Scene.make(tmp_path / "arena", tokens=256 * 12)
    whole = scene.ask().verdict
    first, second, third = (scene.slots[block] for block in scene.absent[:3])
    scene.made.rewrite(first, generation=2)
    scene.made.complete(second, generation=2)
    scene.made.damage(third, scene.layer)
    outcome = scene.ask()
    assert outcome.num_unread == 3
    assert not set(scene.absent[:3]) & {block for block, _ in outcome.verdict.missing}
    assert outcome.verdict.missed_mass < whole.missed_mass


def test_damage_in_another_layer_does_not_matter(tmp_path: Path) -> None:
    scene = Scene.make(tmp_path / "arena", tokens=256 * 12)
    whole = scene.ask()
    scene.made.damage(scene.slots[scene.absent[0]], layer=0)
    assert scene.ask() == whole


def test_audit_of_a_block_evicted_meanwhile_is_partial(tmp_path: Path) -> None:
    scene = Scene.make(tmp_path / "arena", tokens=256 * 12)
    victim = scene.absent[0]

    def evict() -> None:
        scene.made.complete(scene.slots[victim], generation=9)

    outcome = scene.ask(check=evict)
    assert outcome.num_unread == 1
    assert victim not in {block for block, _ in outcome.verdict.missing}


def test_audit_gives_up_when_told_to(tmp_path: Path) -> None:
    scene = Scene.make(tmp_path / "arena", tokens=256 * 12)

    def impatient() -> None:
        raise DeadlineError("too late")

    with pytest.raises(DeadlineError):
        scene.ask(impatient)


def test_planner_cuts_to_the_budget_and_counts_what_was_above(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=20)
    refs = [made.complete(slot) for slot in range(20)]
    want = dense_scores(made, list(range(20)))
    threshold = float(np.sort(want)[5] + np.sort(want)[6]) / 2
    limits = QuestionLimits.of_model(SPEC, made.geometry, num_target_layers=3, threshold=threshold)
    request = pb.LookaheadRequest(
        stamp=pb.Stamp(sequence_id="s", incarnation=3, interval=2),
        arena_ids=np.array([ref.arena_id for ref in refs], dtype="<u4").tobytes(),
        generations=np.array([ref.generation for ref in refs], dtype="<u8").tobytes(),
        predict=pb.Predict(
            num_candidates=18, budget_blocks=4, position=POSITION, hidden=HIDDEN.numpy().tobytes()
        ),
    )
    found = Planner(scorer(made), limits).answer(request, opened(made), patient).plan
    assert found is not None
    ranked = sorted(range(18), key=lambda block: -want[block])
    assert list(found.plan.blocks) == ranked[:4]
    np.testing.assert_allclose(found.plan.scores, want[ranked[:4]], atol=1e-5)
    assert found.plan.num_above_threshold == (want[:18] > threshold).sum()
    assert found.num_scored == 18
    assert (found.plan.stamp.sequence_id, found.plan.stamp.interval) == ("s", 2)


def test_store_without_an_arena_says_what_to_do(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=1)
    store = KeyStore(tmp_path / "elsewhere", made.geometry, CPU)
    with pytest.raises(DependencyError, match="cold pool manager"):
        store.current()
    assert not store.is_mapped


def test_store_refuses_slots_of_another_model(tmp_path: Path) -> None:
    made = KeyArena.create(tmp_path / "arena", num_slots=1, kv_format=KvFormat.FP32)
    other = KeyArena.create(tmp_path / "other", num_slots=1)
    with pytest.raises(DependencyError, match="FOREPAGE_MODEL"):
        KeyStore(made.arena.path, other.geometry, CPU).current()
