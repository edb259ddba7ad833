"""The sentences that the chat layout adds by itself: how to call tools, how to format, how hard to think.

The model was trained on fixed ones, which belong to its release and are not part of this repository.
A model folder that holds a file of the same name replaces ours, letter by letter; the one for
`reasoning_effort: max` has no substitute.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from forepage.errors import ModelFormatError

TOOLS_FILE = "tools_prompt.txt"
FORMAT_FILE = "response_format_prompt.txt"
MAX_EFFORT_FILE = "reasoning_effort_max.txt"
SCHEMAS_MARK = "{tool_schemas}"
SCHEMA_MARK = "{schema}"
OURS = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Wording:
    """Templates. Control tokens spelled in them are control tokens: they are the operator's, no client's."""

    tools: str
    response_format: str
    max_effort: str | None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The model folder's files, ours where it has none.

        Raises: ModelFormatError naming a file that can't be read or lacks its placeholder.
        """
        return cls(
            tools=_template(folder, TOOLS_FILE, SCHEMAS_MARK),
            response_format=_template(folder, FORMAT_FILE, SCHEMA_MARK),
            max_effort=_text(folder / MAX_EFFORT_FILE) if (folder / MAX_EFFORT_FILE).exists() else None,
        )


def _template(folder: Path, name: str, mark: str) -> str:
    theirs = folder / name
    if not theirs.exists():
        return _text(OURS / name).removesuffix("\n")  # a text file ends a line, a prompt doesn't
    text = _text(theirs)
    if text.count(mark) != 1:
        raise ModelFormatError(f"{theirs}: needs {mark} exactly once")
    return text


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFormatError(f"{path}: {type(error).__name__}: {error}") from error
