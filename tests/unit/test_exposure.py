"""What listens beyond this host without a guard says so."""

import pytest
from structlog.testing import capture_logs

from forepage.exposure import is_loopback, warn_if_open
from forepage.rpc.edge import serving


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:7101", True),
        ("127.0.0.1", True),
        ("127.9.9.9:0", True),
        ("[::1]:7101", True),
        ("::1", True),
        ("localhost:80", True),
        ("0.0.0.0:7101", False),
        ("0.0.0.0", False),
        ("[::]:7101", False),
        ("::", False),
        ("10.0.0.3:7101", False),
        ("worker-0:7103", False),
        ("", False),
    ],
)
def test_loopback(listen: str, expected: bool) -> None:
    assert is_loopback(listen) is expected


@pytest.mark.parametrize(
    ("listen", "lacks", "lines"), [("0.0.0.0:1", "TLS", 1), ("0.0.0.0:1", None, 0), ("127.0.0.1:1", "TLS", 0)]
)
def test_only_what_is_open_and_unguarded_is_said(listen: str, lacks: str | None, lines: int) -> None:
    with capture_logs() as logs:
        warn_if_open(listen, lacks=lacks)
    assert len(logs) == lines
    assert all(line["listen"] == listen and line["lacks"] == lacks for line in logs)


async def test_a_server_on_every_interface_without_tls_says_so() -> None:
    with capture_logs() as logs:
        async with serving("0.0.0.0:0", lambda _: None, tls=None, drain_s=0.1):
            pass
        async with serving("127.0.0.1:0", lambda _: None, tls=None, drain_s=0.1):
            pass
    assert [line["lacks"] for line in logs if line["log_level"] == "warning"] == ["FOREPAGE_TLS__*"]
