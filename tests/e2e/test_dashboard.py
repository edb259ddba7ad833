"""The page in a real browser over real processes: empty, busy, answered and failed, on a desk and on a phone.

Skipped only where no Chromium is found (`apt install chromium`). Each view leaves a picture: `--basetemp`
says where.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Route

from forepage.gateway.residency_feed import live_worker
from forepage.rpc import worker_pb2 as pb
from forepage.settings import TINY_MODEL
from rigs.browser import DESK, PHONE, Opened, find_chromium, opened
from rigs.stack import Stack, running_stack
from rigs.watching import resident_bits

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt install chromium")
ANSWER_MS = 240_000
NEEDLE = "The locker code of Nora is 3069."
PIXELS = "document.querySelector('#map').toDataURL()"
Scheme = Literal["dark", "light"]


def go_on(route: Route) -> None:
    """The same question, decoded for six intervals whatever the model says."""
    body = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**body, "max_tokens": 384, "ignore_eos": True}))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The bundled model, which finds things; its tokens are bytes."""
    settings = {"FOREPAGE_MODEL__PATH": str(TINY_MODEL), "FOREPAGE_WORKER__KV_BYTES": str(256 << 20)}
    with running_stack(tmp_path_factory.mktemp("logs"), settings=settings) as running:
        yield running


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


def picture(view: Opened, folder: Path, name: str) -> None:
    view.page.screenshot(path=folder / f"{name}.png", full_page=True)
    assert view.overflow() == 0, "the page is wider than its window"


def wait_live(view: Opened) -> None:
    view.page.wait_for_selector('#status[data-kind="live"]')


@pytest.mark.parametrize(
    ("size", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")]
)
def test_an_empty_page_teaches(stack: Stack, pictures: Path, size: tuple[int, int], scheme: Scheme) -> None:
    with opened(stack.url, size=size, scheme=scheme) as view:
        wait_live(view)
        assert view.page.is_visible("text=Nothing is running.")
        assert view.page.is_visible("text=Ask something below")
        assert "forepage-tiny" in view.page.inner_text("#load")
        picture(view, pictures, f"empty-{size[0]}-{scheme}")
        assert view.errors == []


def test_a_question_asked_with_the_keyboard_shows_what_was_read(stack: Stack, pictures: Path) -> None:
    with opened(stack.url) as view:
        page = view.page
        wait_live(view)
        page.focus("#doc")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "example"
        page.keyboard.press("Enter")
        page.focus("#question")
        page.keyboard.press("Enter")
        page.wait_for_selector("tr[aria-current=true] .tag")
        assert page.inner_text("tr[aria-current=true] .tag") == "yours"
        page.wait_for_selector("#map-block:has-text('Reading the prompt')")
        picture(view, pictures, "prefill")
        page.wait_for_selector("#read-panel:not([hidden])", timeout=ANSWER_MS)
        assert "3069" in page.inner_text("#answer")
        passages = page.locator("#passages li").all_inner_texts()
        assert any(NEEDLE in passage for passage in passages[:3])
        assert not any(NEEDLE in passage for passage in passages[3:])
        picture(view, pictures, "answered")
        page.focus("#read-map")
        for _ in range(13):
            page.keyboard.press("ArrowRight")
        assert page.inner_text("#read-block").startswith("Block 13:")
        page.click("#whole")
        assert NEEDLE in "".join(page.locator("#document mark").all_inner_texts())
        assert (
            page.inner_text("#document").split()
            == (page.input_value("#doc") + " " + page.input_value("#question")).split()
        )
        picture(view, pictures, "whole-document")
        assert view.errors == []


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "dark"), (PHONE, "light")])
def test_a_busy_page_moves_with_the_decode(
    stack: Stack, pictures: Path, size: tuple[int, int], scheme: Scheme
) -> None:
    """Curves, map and list follow a sequence over several intervals, and the map keeps its last state."""
    with opened(stack.url, size=size, scheme=scheme) as view:
        page = view.page
        wait_live(view)
        page.click("#example")
        page.route("**/v1/chat/completions", go_on)
        page.click("#send")
        page.wait_for_selector("#map-block:has-text('Interval 2')", timeout=ANSWER_MS)
        assert page.inner_text("#recall-now").endswith("%")
        assert page.inner_text("#latency-now").endswith("ms")
        assert page.inner_text("#footprint-now").endswith("%")
        picture(view, pictures, f"busy-{size[0]}-{scheme}")
        page.focus("#map")
        page.keyboard.press("End")
        assert "always resident" in page.inner_text("#map-block")
        before = page.evaluate(PIXELS)
        page.wait_for_selector("#map-summary:has-text('ended')", timeout=ANSWER_MS)
        assert page.evaluate(PIXELS) != before
        assert view.errors == []


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")])
@pytest.mark.parametrize("num_blocks", [60, 4_096])
def test_every_state_is_shown_up_to_a_million_tokens(
    stack: Stack, pictures: Path, size: tuple[int, int], scheme: Scheme, num_blocks: int
) -> None:
    """A feed of our own: what a small model seldom does, and cannot at this length."""
    held = {*range(num_blocks - 8, num_blocks), *range(0, num_blocks, 7)}
    view = pb.WatchedSequence(
        request_id="0123456789abcdef",
        phase=pb.SEQUENCE_PHASE_DECODE,
        mode=pb.RESIDENCY_MODE_GUARDED,
        prompt_tokens=256 * num_blocks - 40,
        num_blocks=num_blocks,
        pinned_from=num_blocks - 8,
        resident=resident_bits(held, num_blocks),
        prefetched_block_idx=[7, 14],
        missed_block_idx=[9, 10],
        loading_block_idx=[16, 17],
        read_block_idx=[0, 21],
        evidence_recall=0.8,
        escalations=1,
    )
    with opened("about:blank", size=size, scheme=scheme) as shown:
        page = shown.page
        page.route(
            "**/dashboard/feed",
            lambda route: route.fulfill(body=event_of(view), content_type="text/event-stream"),
        )
        page.goto(stack.url)
        page.wait_for_selector(f"#map-summary:has-text('{len(held)} of {num_blocks} blocks resident')")
        assert "2 just prefetched, 2 loading, 2 missed" in page.inner_text("#map-summary")
        assert page.inner_text("#list td.low") == "80 %"
        picture(shown, pictures, f"states-{num_blocks}-{size[0]}-{scheme}")
        for press, words in (("Home", "read at the newest step"), ("End", "always resident")):
            page.focus("#map")
            page.keyboard.press(press)
            assert words in page.inner_text("#map-block")
        box = page.locator("#map").bounding_box()
        assert box is not None
        assert box["height"] < 900


def event_of(view: pb.WatchedSequence) -> str:
    worker = pb.DescribeReply(
        worker_id="w", model_name="m", running=1, row_blocks_free=10, row_blocks_total=90
    )
    frame = pb.WatchFrame(worker=worker, sequences=[view])
    return f"data: {json.dumps({'block_tokens': 256, 'num_listed': 1, 'workers': [live_worker(frame)]})}\n\n"


def test_stopping_frees_the_sequence(stack: Stack, pictures: Path) -> None:
    with opened(stack.url) as view:
        page = view.page
        wait_live(view)
        page.click("#example")
        page.route("**/v1/chat/completions", go_on)
        page.click("#send")
        page.wait_for_selector("tr[aria-current=true]")
        page.click("#stop")
        page.wait_for_selector("text=Stopped.")
        page.wait_for_selector("#list-empty:not([hidden])")
        assert stack.worker().running == 0
        picture(view, pictures, "stopped")
        assert view.errors == []


def test_a_question_too_long_says_what_the_model_takes(stack: Stack, pictures: Path) -> None:
    with opened(stack.url) as view:
        page = view.page
        wait_live(view)
        page.evaluate("document.querySelector('#doc').value = 'x'.repeat(1100000)")
        page.fill("#question", "What is this?")
        page.click("#send")
        page.wait_for_selector("#notice:not([hidden])")
        assert "too long for this model" in page.inner_text("#notice")
        assert "1048576" in page.inner_text("#notice")
        picture(view, pictures, "too-long")


def test_what_a_lost_gateway_showed_is_not_shown_as_running(stack: Stack, pictures: Path) -> None:
    with opened(stack.url) as view:
        page = view.page
        wait_live(view)
        page.click("#example")
        page.route("**/v1/chat/completions", go_on)
        page.click("#send")
        page.wait_for_selector("#map-block:has-text('Interval 1')", timeout=ANSWER_MS)
        stack.kill("gateway")
        page.wait_for_selector("#map-summary:has-text('(last seen)')")
        assert page.is_visible("#list-empty")
        assert page.is_visible("#map")
        picture(view, pictures, "last-seen")
        stack.start("gateway")
        page.wait_for_selector("#map-summary:has-text('(last seen)')", state="detached")
        wait_live(view)


def test_lost_processes_are_named_with_what_to_do(stack: Stack, pictures: Path) -> None:
    """The last test of this module: it kills the worker, then the gateway."""
    with opened(stack.url) as view:
        page = view.page
        wait_live(view)
        stack.kill("worker")
        page.wait_for_selector('#status[data-kind="bad"]')
        assert "no worker" in page.inner_text("#status")
        assert "forepage worker" in page.inner_text("#map-empty")
        page.fill("#question", "Is anybody there?")
        page.click("#send")
        page.wait_for_selector("#notice:not([hidden])")
        assert "a process is missing" in page.inner_text("#notice")
        picture(view, pictures, "no-worker")
        stack.signal("gateway", signal.SIGKILL)
        page.wait_for_selector("text=The gateway does not answer.")
        assert page.inner_text("#status") == "gateway lost"
        assert page.is_visible("text=Not connected.")
        assert "forepage up" in page.inner_text("#notice")
        picture(view, pictures, "no-gateway")
