"""Names of DeepSeek-V4's control tokens; without a tokenizer, for whoever only writes or looks for them."""

from enum import StrEnum


class ControlToken(StrEnum):
    """The control tokens that we use, by DeepSeek-V4's names (U+FF5C bars, U+2581 underscores)."""

    BOS = "<｜begin▁of▁sentence｜>"  # noqa: RUF001
    EOS = "<｜end▁of▁sentence｜>"  # noqa: RUF001
    USER = "<｜User｜>"  # noqa: RUF001
    ASSISTANT = "<｜Assistant｜>"  # noqa: RUF001
    THINK = "<think>"
    END_THINK = "</think>"
    DSML = "｜DSML｜"  # noqa: RUF001
    LATEST_REMINDER = "<｜latest_reminder｜>"  # noqa: RUF001
    ACTION = "<｜action｜>"  # noqa: RUF001
    QUERY = "<｜query｜>"  # noqa: RUF001
    AUTHORITY = "<｜authority｜>"  # noqa: RUF001
    DOMAIN = "<｜domain｜>"  # noqa: RUF001
    TITLE = "<｜title｜>"  # noqa: RUF001
    EXTRACTED_URL = "<｜extracted_url｜>"  # noqa: RUF001
    READ_URL = "<｜read_url｜>"  # noqa: RUF001


REQUIRED = (
    ControlToken.BOS,
    ControlToken.EOS,
    ControlToken.USER,
    ControlToken.ASSISTANT,
    ControlToken.THINK,
    ControlToken.END_THINK,
)
"""Without these there is no chat; what needs another one is refused where a file lacks it."""
