"""The page of a server with API keys, in a real browser over a real gateway: what it asks for, what it shows.

Skipped only where no Chromium is found (`apt install chromium`). Each view leaves a picture: `--basetemp`
says where.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from forepage.gateway.api_keys import new_key
from forepage.gateway.tenancy import new_request_id
from forepage.rpc import worker_pb2 as pb
from rigs.browser import DESK, PHONE, Opened, find_chromium, opened
from rigs.fake_worker import FakeWorker
from rigs.gateway_thread import gateway_thread
from rigs.gateways import key_file
from rigs.watching import resident_bits

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt install chromium")
OURS, KEPT = new_key("ann", tenant="ours")
OTHERS, KEPT_OTHERS = new_key("bob", tenant="others")
NUM_BLOCKS = 40


def held_by(tenant: str, num_held: int) -> pb.WatchedSequence:
    """A sequence of a tenant."""
    return pb.WatchedSequence(
        request_id=new_request_id(tenant),
        phase=pb.SEQUENCE_PHASE_DECODE,
        mode=pb.RESIDENCY_MODE_GUARDED,
        num_blocks=NUM_BLOCKS,
        pinned_from=NUM_BLOCKS - 1,
        resident=resident_bits(set(range(num_held)), NUM_BLOCKS),
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = key_file(tmp_path_factory.mktemp("keys"), KEPT, KEPT_OTHERS)
    shown = [held_by("ours", 7), held_by("others", 9)]
    with gateway_thread(lambda: FakeWorker(shown=shown), api_keys=keys) as served:
        yield served


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


def picture(view: Opened, folder: Path, name: str) -> None:
    view.page.screenshot(path=folder / f"{name}.png", full_page=True)
    assert view.overflow() == 0, "the page is wider than its window"


def enter(view: Opened, key: str) -> None:
    """As somebody types it."""
    view.page.fill("#key", key)
    view.page.keyboard.press("Enter")


@pytest.mark.parametrize("size", [DESK, PHONE])
def test_the_page_asks_for_a_key_and_says_when_it_is_wrong(
    url: str, pictures: Path, size: tuple[int, int]
) -> None:
    with opened(url, size=size) as view:
        page = view.page
        page.wait_for_selector("#key-form:not([hidden])")
        assert page.inner_text("#status") == "key needed"
        assert page.is_visible("text=This server asks for an API key.")
        assert page.evaluate("document.activeElement.id") == "key"
        picture(view, pictures, f"asks-{size[0]}")
        enter(view, "fp-wrong")
        page.wait_for_selector("text=The server does not know this API key.")
        assert page.inner_text("#status") == "key refused"
        assert page.get_attribute("#key", "aria-invalid") == "true"
        picture(view, pictures, f"wrong-{size[0]}")
        enter(view, OURS)
        page.wait_for_selector('#status[data-kind="live"]')
        assert page.is_hidden("#key-form")
        page.wait_for_selector(f"#map-summary:has-text('7 of {NUM_BLOCKS} blocks resident')")
        assert page.locator("#list tr").count() == 1, "another tenant's sequence is not shown"
        picture(view, pictures, f"in-{size[0]}")


def test_the_key_goes_with_every_request_and_lasts_as_long_as_the_tab(url: str, pictures: Path) -> None:
    with opened(url) as view:
        page = view.page
        page.wait_for_selector("#key-form:not([hidden])")
        enter(view, OURS)
        page.wait_for_selector('#status[data-kind="live"]')
        page.reload()
        page.wait_for_selector('#status[data-kind="live"]')
        view.errors.clear()
        page.fill("#question", "What is the answer?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#facts div")
        assert page.inner_text("#answer").startswith("The answer is 42")
        picture(view, pictures, "answered")
        assert view.errors == []
        assert page.evaluate("localStorage.length") == 0
        assert page.evaluate("document.cookie") == ""
    with opened(url) as other:
        other.page.wait_for_selector("#key-form:not([hidden])")


def test_another_key_takes_over_at_once_and_a_refused_one_is_not_tried_again(url: str) -> None:
    with opened(url) as view:
        page = view.page
        page.clock.install()
        page.reload()
        asked: list[str] = []
        page.on("request", lambda one: asked.append(one.headers.get("authorization", "")))
        page.wait_for_selector("#key-form:not([hidden])")
        enter(view, OURS)
        page.wait_for_selector(f"#map-summary:has-text('7 of {NUM_BLOCKS} blocks resident')")
        page.click("#key-open")
        enter(view, OTHERS)
        page.wait_for_selector(f"#map-summary:has-text('9 of {NUM_BLOCKS} blocks resident')")
        page.click("#key-open")
        enter(view, "fp-wrong")
        page.wait_for_selector("text=The server does not know this API key.")
        page.clock.fast_forward(60_000)  # a lost feed tries again long before
        page.evaluate("fetch('/ping')")
        assert asked.count("Bearer fp-wrong") == 1
