"""The settings tree: documented, named with units, bounded, and strict about what it does not know."""

from pathlib import Path

import annotated_types
import pytest
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from forepage.settings import Settings
from forepage.settings_environment import SettingsError, load_settings, setting_names
from forepage.settings_report import resolved_table, settings_markdown

ROOT = Path(__file__).parents[2]
BOUNDS = (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)
UNITS = ("_bytes", "_bytes_per_s", "_s", "_ms", "_tokens", "_steps", "_blocks", "_share", "_recall", "port")
# Counts of what the name says.
COUNTS = {
    "plan_stream_maxlen",
    "directory_queue",
    "random_audits",
    "audit_layers",
    "clean_intervals",
    "tensor_parallel",
    "decode_graphs",
}
PURE = {"threshold"}


def sections() -> dict[str, type[BaseModel]]:
    found = {}
    for name, info in Settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found[name] = info.annotation
    return found


def numbers() -> list[tuple[str, FieldInfo]]:
    return [
        (f"{section}.{name}", info)
        for section, model in sections().items()
        for name, info in model.model_fields.items()
        if info.annotation in (int, float)
    ]


def test_docs_equal_the_generated_table() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_markdown(), "run `make settings-table`"


def test_docs_name_no_path_of_the_machine_that_wrote_them() -> None:
    assert str(ROOT) not in settings_markdown()


def test_every_setting_is_described() -> None:
    assert [name for name, _, text in setting_names() if not text] == []


@pytest.mark.parametrize(
    ("name", "info"), numbers(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_number_has_a_unit_in_its_name_and_a_range(name: str, info: FieldInfo) -> None:
    leaf = name.partition(".")[2]
    assert leaf.endswith(UNITS) or leaf.startswith("max_") or leaf in COUNTS | PURE
    assert any(isinstance(item, BOUNDS) for item in info.metadata)


@pytest.mark.parametrize(
    "name", ["FOREPAGE_TYPO", "FOREPAGE_WORKER__TYPO", "FOREPAGE_WORKERS__MAX_RUNNING", "FOREPAGE_WORKER"]
)
def test_unknown_name_stops_the_start_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=name):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FOREPAGE_GATEWAY__PORT", "65536"),
        ("FOREPAGE_WORKER__MIN_RECALL", "1.1"),
        ("FOREPAGE_WORKER__RECENT_TOKENS", "255"),
        ("FOREPAGE_WORKER__PREFILL_CHUNK_TOKENS", "200"),
        ("FOREPAGE_COLDPOOL__CAPACITY_BYTES", "lots"),
        ("FOREPAGE_INSTANCE", "a/b"),
        ("FOREPAGE_INSTANCE", ""),
        ("FOREPAGE_MODEL__DEVICE", "tpu"),
        ("FOREPAGE_COLDPOOL__TIERS", '["tape"]'),
    ],
)
def test_value_out_of_range_stops_the_start_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        load_settings()


def test_every_documented_name_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, default, _ in setting_names():
        if default != "None":
            monkeypatch.setenv(name, default)
    load_settings()


def test_environment_names_are_taken_by_foreign_tools_only_outside_our_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    load_settings()


def test_secrets_are_masked_everywhere() -> None:
    settings = Settings(redis_url=SecretStr("redis://user:hush@host"))
    assert "hush" not in resolved_table(settings) + repr(settings) + str(settings)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().worker.max_running = 3  # type: ignore[misc]
