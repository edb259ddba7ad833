"""Training on synthetic features: it learns, uses what it mines, goes on where it stopped, and is served."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forepage.errors import ModelFormatError
from forepage.kv.geometry import BLOCK_ENTRIES, KvFormat
from forepage.model.memory_indexer import MemoryIndexer, read_indexer_config
from forepage.model.spec import ModelSpec
from forepage.training.backbone.journal import journal, read_log
from forepage.training.indexer.config import IndexerTrainingConfig
from forepage.training.indexer.fitting import Fitting
from forepage.training.indexer.stages import FitOrder, encoder_of, run_calibration, run_fit
from forepage.training.indexer.start import first_tensors
from forepage.training.indexer.text_store import TextStore
from forepage.training.indexer.validation import block_logits
from forepage_kernels.memory_indexer import memory_indexer
from rigs.indexer_training import CPU, MODEL_CONFIG, shorter, small_config, small_dump

SPEC = ModelSpec.from_config(MODEL_CONFIG)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dump(tmp_path_factory.mktemp("dump"), small_config())


def trained(dump: Path, folder: Path, config: IndexerTrainingConfig) -> list[dict[str, object]]:
    run_fit(FitOrder(dump, config, folder, CPU), folder.parent)
    return read_log(folder)


@pytest.fixture(scope="module")
def run(dump: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its export."""
    folder: Path = tmp_path_factory.mktemp("run")
    order = FitOrder(dump, small_config(), folder / "indexer", CPU)
    assert run_fit(order, folder)
    run_calibration(order, folder / "export", folder)
    return folder


def test_a_planted_rule_is_learned(run: Path) -> None:
    log = read_log(run / "indexer")
    shares = [row["share_for_recall"] for row in log if "share_for_recall" in row]
    assert min(shares[0].values()) > 0.8  # untrained: nearly all blocks for 90 % of the evidence
    assert max(shares[-1].values()) < 0.68


@pytest.mark.parametrize(
    "part",
    [
        {"label": {"granularity": "entry"}, "fit": {"hard_negatives": 16, "random_negatives": 128}},
        {"label": {"rule": "vote"}, "fit": {}},
        {"label": {"rule": "union"}, "fit": {"loss": "mass"}},
        {"label": {"rule": "own_layer"}, "fit": {"joint_share": 0.0}},
        {"label": {}, "fit": {"jitter_share": 0.5, "jitter_tokens": 100_000}},
    ],
    ids=["entries", "vote", "mass", "own-layer", "jitter"],
)
def test_every_kind_of_label_learns_the_rule(
    dump: Path, tmp_path: Path, part: dict[str, dict[str, object]]
) -> None:
    log = trained(dump, tmp_path / "run", small_config(**part))
    shares = [row["share_for_recall"] for row in log if "share_for_recall" in row]
    assert max(shares[-1].values()) < 0.9 * min(shares[0].values())  # type: ignore[attr-defined]


def test_hard_negatives_are_learned_from(dump: Path, tmp_path: Path) -> None:
    part = {"hard_negatives": 6, "random_negatives": 0}
    mined = trained(dump, tmp_path / "mined", shorter(small_config(fit=part), 20))
    late = trained(dump, tmp_path / "late", shorter(small_config(fit=part | {"mine_from": 99}), 20))
    assert sum(row.get("mined", 0) for row in mined) > 20  # type: ignore[misc]
    assert sum(row.get("mined", 0) for row in late) == 0  # type: ignore[misc]


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(dump: Path, tmp_path: Path) -> None:
    config = shorter(small_config(fit={"validate_every": 100}), 12)
    ticks = iter(range(1000))
    trained(dump, tmp_path / "at_once", config)
    store = TextStore(dump, config, CPU, torch.float32)

    def fitting() -> Fitting:
        first = first_tensors(SPEC, config.fit, store.header.target_layers, None)
        (tmp_path / "parts").mkdir(exist_ok=True)
        return Fitting(encoder_of(store.header, first, CPU), store, config, tmp_path / "parts")

    with journal(tmp_path / "parts", 12) as notes:
        first = fitting()
        assert not first.train(notes, until=6.0, clock=lambda: float(next(ticks)))
        assert 0 < first.state.step < 12
        assert fitting().train(notes, until=float("inf"))
    whole = load_file(tmp_path / "at_once" / "checkpoint.safetensors")
    parts = load_file(tmp_path / "parts" / "checkpoint.safetensors")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_a_run_of_another_config_is_not_gone_on_with(dump: Path, tmp_path: Path) -> None:
    trained(dump, tmp_path / "run", shorter(small_config(), 2))
    with pytest.raises(ModelFormatError, match="another config"):
        trained(dump, tmp_path / "run", shorter(small_config(fit={"lr": 1e-4}), 2))


def test_the_best_weights_are_kept_not_the_last(run: Path) -> None:
    state = json.loads((run / "indexer" / "state.json").read_text())
    log = [row for row in read_log(run / "indexer") if "share_for_recall" in row]
    means = {row["step"]: sum(row["share_for_recall"].values()) / len(row["share_for_recall"]) for row in log}
    assert state["best_share"] == pytest.approx(min(means.values()))
    assert means[state["best_step"]] == pytest.approx(min(means.values()))


def test_the_saved_indexer_scores_as_the_trained_one(dump: Path, run: Path) -> None:
    config = small_config()
    served = MemoryIndexer.load(run / "export", SPEC, KvFormat.FP8, CPU)
    store = TextStore(dump, config, CPU, torch.float32)
    places = [store.header.target_layers.index(layer) for layer in served.target_layers]
    whole = encoder_of(store.header, load_file(run / "indexer" / "best.safetensors"), CPU)
    text = store.load(store.texts(validation=True)[0])
    trained_logits = block_logits(whole, text, text.served)[places].amax(0)  # [P, M]
    planes = text.features.keys[places].transpose(0, 1).contiguous()  # [M, L, plane bytes]
    blocks, layers, plane_bytes = planes.shape
    offsets = (torch.arange(blocks * layers) * plane_bytes).view(1, blocks, layers)
    differences = []
    for plan in range(len(text.served)):
        row = int(text.served.rows[plan])
        hidden = text.features.hidden[row, places].float()
        q, weights = served.queries(hidden, int(text.features.positions[row]))
        scores = memory_indexer(
            q.unsqueeze(0),
            weights.unsqueeze(0),
            planes.flatten(),
            layout=store.header.key_layout,
            plane_offsets=offsets,
            threshold=0.0,
        )
        found = scores.view(blocks, BLOCK_ENTRIES).amax(1)
        # q is rounded to bf16 on both sides: products summed in another order may round a tie the other way.
        torch.testing.assert_close(found, torch.sigmoid(trained_logits[plan]), rtol=0.0, atol=4e-3)
        differences.append((found - torch.sigmoid(trained_logits[plan])).abs())
    assert float(torch.cat(differences).median()) < 1e-6


def test_the_calibrated_file_says_what_it_was_calibrated_for(run: Path) -> None:
    config = read_indexer_config(run / "export", SPEC)
    assert config.calibration is not None
    assert config.calibration.interval_steps == 16
    assert config.calibration.recent_tokens == 512
    assert config.calibration.evidence_recall >= 0.9
    body = json.loads((run / "export" / "calibration.json").read_text())
    assert config.threshold == body["calibration"]["threshold"]
    assert {row["length_tokens"] for row in body["rows"]} == {2048, 4096}
    assert (run / "export" / "calibration.png").stat().st_size > 1000
    assert (run / "indexer" / "indexer.png").stat().st_size > 1000


def test_every_stage_has_its_row(run: Path) -> None:
    rows = json.loads((run / "training.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["indexer", "calibrate"]
    assert all(row["seconds"] > 0 and row["samples_per_s"] > 0 for row in rows)
