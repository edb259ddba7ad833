"""The settings tree as the environment gives it, and the name of each variable.

Names that start with FOREPAGE_ and mean nothing stop the start: a misspelt setting must not be a default.
"""

import json
import os
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_settings import SettingsError as UnreadableSetting

from forepage.settings import ENV_PREFIX, Section, Settings


class SettingsError(Exception):
    """The environment does not make a valid tree; the text names each wrong variable."""


def _meant(name: str, known: Iterable[str]) -> str:
    """The known name that is nearest, if one is near."""
    near = get_close_matches(name.upper(), known, n=1, cutoff=0.85)
    return f" (meant: {near[0]}?)" if near else ""


def load_settings() -> Settings:
    """Read the tree from the environment. Raises: SettingsError naming what is unknown or out of range."""
    known = {name for name, _, _ in setting_names()}
    unknown = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name.upper() not in known)
    if unknown:
        named = ", ".join(name + _meant(name, known) for name in unknown)
        raise SettingsError(f"unknown settings: {named}; `forepage settings-table` lists the known ones")
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"{_env_name(item['loc'])}: {item['msg']}" for item in error.errors()]
        raise SettingsError("; ".join(lines)) from error
    except UnreadableSetting as error:  # a list or a section that is no JSON
        raise SettingsError(f'{error}; lists are written as JSON: ["a", "b"]') from error


def setting_names() -> Iterator[tuple[str, str, str]]:
    """Every leaf of the tree: (environment name, default as one would set it, what it is)."""
    defaults = Settings.model_construct()
    for name, field in Settings.model_fields.items():
        section = getattr(defaults, name)
        if isinstance(section, Section):
            for leaf, info in type(section).model_fields.items():
                yield _env_name((name, leaf)), _written(getattr(section, leaf)), info.description or ""
        else:
            yield _env_name((name,)), _written(section), field.description or ""


def _written(value: object) -> str:
    return json.dumps(value) if isinstance(value, tuple) else str(value)


def _env_name(location: tuple[int | str, ...]) -> str:
    return ENV_PREFIX + "__".join(str(part) for part in location if not isinstance(part, int)).upper()
