"""The dump: its texts, what the served model's pass keeps of them, and the files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forepage.errors import ModelFormatError, RequestError
from forepage.kv.geometry import C4_RATIO
from forepage.model.memory_indexer import IndexerConfig, seeded_tensors
from forepage.model.spec import ModelSpec
from forepage.model.weights import load_or_seed
from forepage.settings import SEEDED_MODEL
from forepage.training.indexer.config import Start
from forepage.training.indexer.dump import DumpOrder, DumpTotals, dump, dump_part
from forepage.training.indexer.encoder import DualEncoder, decoded_keys
from forepage.training.indexer.features import Features
from forepage.training.indexer.shards import open_dump, read_features, read_header, stored_texts
from forepage.training.indexer.stages import encoder_of
from forepage.training.indexer.start import NATIVE, first_tensors, spread
from forepage.training.indexer.synthetic import sizes_of, synthetic_features
from forepage.training.indexer.texts import make_text, text_ids
from rigs.indexer_training import CPU, MODEL_CONFIG, small_config, small_dump

CONFIG = small_config(
    dump={"lengths": [1024], "texts": [3], "validation_share": 0.4, "rows": 60, "target_layers": [0, 1, 2]}
)
SPEC = ModelSpec.from_config(MODEL_CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of the bundled model, made in three calls: no time, the second text, then what is missing."""
    out: Path = tmp_path_factory.mktemp("dump")
    order = DumpOrder(SEEDED_MODEL, CONFIG, out, CPU)
    assert dump(replace(order, minutes=0.0)) == (DumpTotals(), False)
    dump_part(order, [1], float("inf"))
    before = (out / "shard-00001.safetensors").stat().st_mtime_ns
    totals, done = dump(order)
    assert (totals.texts, done) == (2, True)
    assert (out / "shard-00001.safetensors").stat().st_mtime_ns == before
    return out


def features_in(folder: Path) -> list[Features]:
    return [read_features(folder, text, CPU) for text in stored_texts(folder)]


def test_dump_has_every_text_of_the_config_in_order(folder: Path) -> None:
    assert [text.id for text in stored_texts(folder)] == list(text_ids(CONFIG.dump))
    assert {text.id.is_validation for text in stored_texts(folder)} == {False, True}


def test_a_complete_dump_is_not_made_again(folder: Path) -> None:
    assert dump(DumpOrder(SEEDED_MODEL, CONFIG, folder, CPU)) == (DumpTotals(), True)


def test_several_processes_write_the_same_dump(folder: Path, tmp_path: Path) -> None:
    totals, done = dump(DumpOrder(SEEDED_MODEL, CONFIG, tmp_path, CPU, processes=2))
    assert (totals.texts, done) == (3, True)
    for mine, other in zip(features_in(folder), features_in(tmp_path), strict=True):
        assert mine.text == other.text
        assert torch.equal(mine.golden.counts, other.golden.counts)


def test_rows_are_the_tokens_before_an_answers_tokens(folder: Path) -> None:
    for features in features_in(folder):
        text = make_text(features.text, max_rows=CONFIG.dump.rows)
        places = np.flatnonzero(text.answers >= 0)
        assert features.positions.tolist() == places.tolist()
        assert features.num_rows <= CONFIG.dump.rows
        assert features.num_entries == len(text.tokens) // C4_RATIO
        ends = [row for row in range(features.num_rows) if row == 0 or text.answers[places[row] - 1] < 0]
        assert all(text.tokens[places[row]] == 262 for row in ends)  # the assistant's turn has just begun


def native_encoder(folder: Path) -> DualEncoder:
    """An indexer of twice the heads and rank with the bundled model's own weights."""
    header = read_header(folder)
    fit = replace(CONFIG.fit, heads=2 * SPEC.index_heads, rank=2 * SPEC.q_lora_rank)
    weights = load_or_seed(SEEDED_MODEL, SPEC, dtype=torch.float32, device=CPU)
    drawn = seeded_tensors(SPEC, IndexerConfig((0, 1, 2), 0.5, heads=fit.heads, rank=fit.rank, seed=3))
    tensors = {}
    for layer in header.target_layers:
        prefix = f"layers.{SPEC.c4_layers[layer]}."
        native = {short: weights[prefix + name] for short, name in NATIVE.items()}
        for name, value in spread(native, drawn, SPEC, fit, layer).items():
            tensors[f"retrievers.l{layer}.{name}"] = value
    return encoder_of(header, tensors, CPU)


def test_golden_entries_are_those_of_the_models_own_indexer_over_the_stored_keys(folder: Path) -> None:
    """An indexer with the model's own weights scores as the model did: labels, keys and states agree."""
    encoder, layout = native_encoder(folder), read_header(folder).key_layout
    features = features_in(folder)[0]
    keys = decoded_keys(features.keys, layout, torch.float32)
    scores = encoder.all_logits(encoder.queries(features.hidden.float(), features.positions), keys)
    ends = features.golden.counts.long().cumsum(0).tolist()
    rounding = 0.03  # of a score: hidden states are kept in bf16, and q is rounded to it
    for place, end in enumerate(ends):
        row, layer = divmod(place, 3)
        mine = slice(ends[place - 1] if place else 0, end)
        entries, masses = features.golden.entries[mine].long(), features.golden.masses[mine]
        visible = scores[layer, row, : (int(features.positions[row]) + 1) // C4_RATIO]
        found = visible[entries]
        assert len(entries) > 0
        torch.testing.assert_close(found - found[0], (masses / masses[0]).log(), rtol=0.0, atol=rounding)
        assert float(found.min()) >= float(visible.topk(SPEC.index_topk).values[-1]) - rounding
        assert float(found[0]) >= float(visible.max()) - rounding


def test_features_survive_the_round_trip(tmp_path: Path) -> None:
    config = small_config()
    small_dump(tmp_path, config)
    header = read_header(tmp_path)
    for stored in stored_texts(tmp_path):
        made = synthetic_features(stored.id, sizes_of(header), config.dump)
        read = read_features(tmp_path, stored, CPU)
        assert read.text == made.text
        assert read.num_entries == made.num_entries == stored.num_entries
        for name, tensor in made.tensors().items():
            assert torch.equal(read.tensors()[name], tensor), name


def test_a_shard_without_its_list_does_not_count(tmp_path: Path) -> None:
    config = small_config()
    small_dump(tmp_path, config)
    before = stored_texts(tmp_path)
    (tmp_path / "shard-00000.msgpack").unlink()
    assert len(stored_texts(tmp_path)) < len(before)


def test_a_dump_of_another_config_is_refused(tmp_path: Path) -> None:
    config = small_config()
    small_dump(tmp_path, config)
    other = small_config(dump={"seed": 4})
    with pytest.raises(ModelFormatError, match="another model or config"):
        small_dump(tmp_path, other)
    header = replace(read_header(tmp_path), model_fingerprint="another")
    with pytest.raises(ModelFormatError, match="another model or config"):
        open_dump(tmp_path, header)


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    small_dump(tmp_path, small_config())
    path = tmp_path / "header.msgpack"
    path.write_bytes(path.read_bytes().replace(b"schema_version\x01", b"schema_version\x02"))
    with pytest.raises(ModelFormatError, match="version 1"):
        read_header(tmp_path)


def test_native_start_needs_a_model_that_fits() -> None:
    native = replace(CONFIG.fit, start=Start.NATIVE)
    with pytest.raises(RequestError, match="model"):
        first_tensors(SPEC, native, (0,), None)
    with pytest.raises(RequestError, match="multiple of 64"):
        first_tensors(SPEC, replace(native, rank=96), (0,), SEEDED_MODEL)
    with pytest.raises(ModelFormatError, match=r"layers\.2\.attn\.wq_a\.weight is missing"):
        first_tensors(SPEC, native, (0,), SEEDED_MODEL)  # a seed makes its weights: there is no file
