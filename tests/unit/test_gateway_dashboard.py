"""The page at `/`: its files need nothing from elsewhere and run nothing inline; who may see what."""

import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from forepage.gateway.api_keys import new_key
from forepage.gateway.dashboard import FEED_PATH, FILES, FOLDER, MEDIA_TYPES, PASSAGES_PATH
from rigs.fake_worker import StartWorker
from rigs.gateways import OpenedGateway, OpenGateway, bearer, chat, key_file

VOID = {"meta", "link", "img", "input", "br"}
SCRIPTS = [path for path in FILES.values() if path.suffix == ".js"]


class Tags(HTMLParser):
    """Every tag with its attributes, and the text inside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.inline = ""
        self.in_label: set[str] = set()
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if "label" in self._open:
            self.in_label.add(dict(attrs).get("id") or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.inline += data.strip()


def page_tags() -> Tags:
    tags = Tags()
    tags.feed((FOLDER / "page.html").read_text())
    return tags


@pytest.fixture
async def gateway(start_worker: StartWorker, open_gateway: OpenGateway) -> OpenedGateway:
    return await open_gateway(await start_worker())


async def test_the_page_and_everything_it_names_is_served(gateway: OpenedGateway) -> None:
    named = {"/"}
    for _, attrs in page_tags().tags:
        named |= {value for name, value in attrs.items() if name in ("src", "href") and value[:1] != "#"}
    for script in SCRIPTS:
        named |= {f"/dashboard/{file}" for file in re.findall(r'from "\./([\w.]+)"', script.read_text())}
    assert {path.rpartition("/")[2] for path in named} == {
        "" if path.suffix == ".html" else path.name for path in FILES.values()
    }
    for path in named:
        reply = await gateway.client.get(path)
        assert reply.status_code == 200
        assert reply.headers["content-type"] in MEDIA_TYPES.values()
        again = await gateway.client.get(path, headers={"if-none-match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


async def test_the_policy_allows_only_our_own_files(gateway: OpenedGateway) -> None:
    headers = (await gateway.client.get("/")).headers
    policy = dict(part.split(maxsplit=1) for part in headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert {policy.pop(name) for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert set(policy) == {"base-uri", "form-action", "frame-ancestors"}
    assert set(policy.values()) == {"'none'"}
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_runs_nothing_inline() -> None:
    tags = page_tags()
    assert tags.inline == ""
    attributes = {name for _, attrs in tags.tags for name in attrs}
    assert not {name for name in attributes if name.startswith("on") or name == "style"}


@pytest.mark.parametrize("path", FILES.values(), ids=lambda path: path.name)
def test_a_file_needs_nothing_from_elsewhere_and_makes_no_markup_of_texts(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// ", ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)


def test_every_control_has_a_name_and_every_reference_a_target() -> None:
    parsed = page_tags()
    tags = parsed.tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    references = [
        value
        for _, attrs in tags
        for name, values in attrs.items()
        if name in ("for", "aria-labelledby", "aria-describedby", "aria-controls")
        for value in values.split()
    ]
    references += [attrs["href"][1:] for _, attrs in tags if attrs.get("href", "").startswith("#")]
    assert set(references) <= set(ids)
    labelled = {attrs["for"] for tag, attrs in tags if tag == "label" and "for" in attrs}
    fields = {attrs["id"] for tag, attrs in tags if tag in ("input", "textarea", "select")}
    assert fields <= labelled | parsed.in_label
    used = {name for script in SCRIPTS for name in re.findall(r'\bat\("([\w-]+)"\)', script.read_text())}
    assert used <= set(ids)


async def test_the_page_can_be_turned_off(start_worker: StartWorker, open_gateway: OpenGateway) -> None:
    gateway = await open_gateway(await start_worker(), dashboard=False)
    for path in ("/", "/dashboard/page.js", FEED_PATH):
        assert (await gateway.client.get(path)).status_code == 404
    assert (await gateway.client.post(PASSAGES_PATH, json=chat())).status_code == 404


async def test_with_keys_the_files_are_open_and_what_they_show_is_not(
    start_worker: StartWorker, open_gateway: OpenGateway, tmp_path: Path
) -> None:
    key, kept = new_key("ours")
    gateway = await open_gateway(await start_worker(), api_keys=key_file(tmp_path, kept))
    for url in FILES:
        assert (await gateway.client.get(url)).status_code == 200
    for reply in (
        await gateway.client.get(FEED_PATH),
        await gateway.client.post(PASSAGES_PATH, json=chat()),
        await gateway.client.get("/dashboard/nothing.js"),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert (await gateway.client.post(PASSAGES_PATH, json=chat(), headers=bearer(key))).status_code == 200
    gateway.admission.close()  # a feed that is closed ends at once
    assert (await gateway.client.get(FEED_PATH, headers=bearer(key))).status_code == 200


async def test_passages_answers_errors_in_our_shape_and_within_the_bound(
    start_worker: StartWorker, open_gateway: OpenGateway
) -> None:
    gateway = await open_gateway(await start_worker(), max_body_bytes=2_000)
    big = await gateway.client.post(PASSAGES_PATH, json=chat("x" * 3_000))
    assert (big.status_code, big.json()["error"]["code"]) == (413, "request_too_large")
    wrong = await gateway.client.post(PASSAGES_PATH, json={"model": "m", "messages": "no"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "messages")
    assert gateway.admission.running == 0


def themes() -> dict[str, dict[str, str]]:
    """Colours by name, light and dark, as the style sheet sets them."""
    style = (FOLDER / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = re.compile(r"--([\w-]+): (#[0-9a-f]{6})")
    return {"light": dict(colours.findall(light)), "dark": dict(colours.findall(dark))}


def linear(colour: str) -> np.ndarray:
    """sRGB to linear light, 0..1."""
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    lights = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


VISION = {
    "usual": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
"""Linear light as it is seen. Source: G. M. Machado et al., IEEE TVCG 15 (2009), severity 1.0."""


def lab(light: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratios = to_xyz @ np.clip(light, 0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(ratios > 0.008856, np.cbrt(ratios), 7.787 * ratios + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_shapes_stand_out(theme: str) -> None:
    colours = themes()["light"] | themes()[theme]
    for text, grounds in (
        ("text", ("ground", "panel", "bad-ground", "warn-ground", "accent-soft")),
        ("muted", ("ground", "panel")),
        ("accent-text", ("ground", "panel", "accent-soft")),
        ("on-accent", ("accent",)),
        ("missed", ("panel",)),
        ("mark-text", ("mark1", "mark2", "mark3")),
    ):
        for ground in grounds:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["resident"], colours["panel"]) >= 3
    assert contrast(colours["read"], colours["panel"]) >= 3


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_states_differ_for_every_kind_of_sight(theme: str, vision: str) -> None:
    """By 20 and more, where 2 can just be told apart; their shapes differ as well (draw.js)."""
    colours = themes()["light"] | themes()[theme]
    names = ("panel", "cold", "resident", "prefetched", "missed")
    seen = {name: lab(VISION[vision] @ linear(colours[name])) for name in names}
    for one, other in combinations(names, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= 20, (one, other)
