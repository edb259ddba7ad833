"""The settings tree as text: what this environment resolves to, and the table of docs/settings.md.

`forepage check` and `forepage settings-table` print these; a contract test compares the file. Secrets are
masked here, once.
"""

from collections.abc import Iterator

from pydantic import BaseModel

from forepage.settings import ENV_PREFIX, TINY_MODEL, Settings
from forepage.settings_environment import setting_names

SHOWN_BUNDLED_MODEL = "the bundled `tiny` model"
_HEAD = """\
# Settings

Read from the environment, checked at the start: an unknown `FOREPAGE_*` name or a value out of range stops
the process with exit code 2. `forepage check` prints what the current environment resolves to. Lists are
JSON (`'["redis", "disk"]'`). Exporters of traces and metrics are set by OpenTelemetry's own `OTEL_*`.

Written by `forepage settings-table > docs/settings.md`; a contract test keeps the two equal.

| variable | default | what it is |
|---|---|---|
"""


def settings_markdown() -> str:
    """docs/settings.md: every variable, its default and what it is."""
    rows = (
        f"| `{name}` | {_shown(default)} | {text.replace('|', chr(92) + '|')} |\n"
        for name, default, text in setting_names()
    )
    return _HEAD + "".join(rows)


def resolved_table(settings: Settings) -> str:
    """The tree in aligned columns: variable, value (secrets masked), whether the environment set it."""
    rows = list(_resolved(settings))
    name_width = max(len(name) for name, _, _ in rows)
    value_width = min(48, max(len(value) for _, value, _ in rows))
    return "\n".join(
        f"{name:<{name_width}}  {value:<{value_width}}  {origin}" for name, value, origin in rows
    )


def _resolved(settings: Settings) -> Iterator[tuple[str, str, str]]:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            for leaf in type(value).model_fields:
                origin = "set" if leaf in value.model_fields_set else "default"
                yield f"{ENV_PREFIX}{name}__{leaf}".upper(), _text(getattr(value, leaf)), origin
        else:
            origin = "set" if name in settings.model_fields_set else "default"
            yield f"{ENV_PREFIX}{name}".upper(), _text(value), origin


def _text(value: object) -> str:
    """One line; a SecretStr masks itself."""
    if isinstance(value, tuple):
        return "[" + ", ".join(str(item) for item in value) + "]"
    return "-" if value is None else str(value)


def _shown(default: str) -> str:
    """A default for the docs: no path of the machine that wrote them."""
    if default == str(TINY_MODEL):
        return SHOWN_BUNDLED_MODEL
    return "none" if default == "None" else f"`{default}`"
