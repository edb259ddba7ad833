"""What the page works out in the browser, run in a JavaScript engine without one."""

import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py_mini_racer import MiniRacer

from forepage.gateway.dashboard import FOLDER
from forepage.gateway.residency_feed import live_worker
from forepage.rpc import worker_pb2 as pb
from rigs.watching import resident_bits

NOTHING = "\u2013"
COLD, RESIDENT, PREFETCHED, MISSED, LOADING = range(5)
blocks = st.sets(st.integers(0, 130), max_size=20)


@cache
def engine() -> MiniRacer:
    context = MiniRacer()
    context.eval((FOLDER / "logic.js").read_text().replace("export ", ""))
    return context


def js(expression: str, *arguments: Any) -> Any:
    """The expression's value, with `a`, `b`, `c` as the arguments."""
    names = ", ".join("abc"[: len(arguments)])
    values = ", ".join(json.dumps(argument) for argument in arguments)
    return json.loads(str(engine().eval(f"JSON.stringify((({names}) => ({expression}))({values}))")))


def told(**fields: Any) -> dict[str, Any]:
    """A sequence as the gateway tells the page of it."""
    (view,) = live_worker(pb.WatchFrame(sequences=[pb.WatchedSequence(**fields)]))["sequences"]
    return dict(view)


@settings(deadline=None)
@given(held=blocks, prefetched=blocks, missed=blocks, loading=blocks, num_blocks=st.integers(131, 140))
def test_the_map_shows_the_workers_resident_set(
    held: set[int], prefetched: set[int], missed: set[int], loading: set[int], num_blocks: int
) -> None:
    view = told(
        num_blocks=num_blocks,
        resident=resident_bits(held, num_blocks),
        prefetched_block_idx=sorted(prefetched),
        missed_block_idx=sorted(missed),
        loading_block_idx=sorted(loading),
    )
    states = js("Array.from(blockStates(a))", view)
    assert len(states) == num_blocks
    assert {idx for idx, state in enumerate(states) if state in (RESIDENT, PREFETCHED)} == held
    assert {idx for idx, state in enumerate(states) if state == PREFETCHED} == held & prefetched
    assert {idx for idx, state in enumerate(states) if state == LOADING} == loading - held
    assert {idx for idx, state in enumerate(states) if state == MISSED} == missed - held - loading
    assert sum(js("countStates(a)", states)) == num_blocks


@settings(deadline=None)
@given(count=st.integers(1, 4_200), width=st.integers(20, 1_400))
def test_every_cell_of_the_map_can_be_pointed_at(count: int, width: int) -> None:
    layout = js("layoutCells(a, b)", count, width)
    assert layout["columns"] * layout["rows"] >= count > layout["columns"] * (layout["rows"] - 1)
    assert layout["columns"] == 1 or layout["columns"] * layout["step"] <= width + layout["step"]
    for idx in {0, count // 2, count - 1}:
        x = idx % layout["columns"] * layout["step"] + layout["side"] / 2
        y = idx // layout["columns"] * layout["step"] + layout["side"] / 2
        assert js("cellAt(a, ...b)", layout, [x, y, count]) == idx
    assert js("cellAt(a, ...b)", layout, [layout["columns"] * layout["step"] + 1, 1, count]) == -1


@pytest.mark.parametrize(
    ("key", "start", "end"),
    [
        ("ArrowRight", 4, 5),
        ("ArrowLeft", 0, 0),
        ("ArrowDown", 4, 14),
        ("ArrowUp", 14, 4),
        ("ArrowDown", 20, 24),
        ("Home", 9, 0),
        ("End", 9, 24),
        ("Tab", 9, None),
    ],
)
def test_arrow_keys_go_from_block_to_block_and_never_off_the_map(
    key: str, start: int, end: int | None
) -> None:
    assert js("moveCursor(a, ...b)", key, [start, 10, 25]) == end


def test_a_block_is_named_with_its_tokens_and_all_that_holds_of_it() -> None:
    view = told(num_blocks=4, pinned_from=3, resident=resident_bits({1, 3}, 4), read_block_idx=[3])
    line = js("blockLine(a, blockStates(a), 3, 256)", view)
    assert line == "Block 3, tokens 768 to 1023: resident, always resident, read at the newest step"
    assert js("blockLine(a, blockStates(a), 0, 256)", view) == "Block 0, tokens 0 to 255: cold"
    assert js("summaryOf(a, blockStates(a))", view) == "2 of 4 blocks resident"
    assert js("summaryOf(a, blockStates(a))", told()) == "holds nothing yet"


def test_figures_are_the_worst_recall_the_slowest_plan_and_the_mean_footprint() -> None:
    one = told(evidence_recall=0.5, prefetch_latency_ms=8.0, kv_footprint=0.25)
    other = told(evidence_recall=1.0, kv_footprint=0.75)
    assert js("figuresOf(a)", [one, other]) == {"recall": 0.5, "latency": 8.0, "footprint": 0.5}
    assert js("figuresOf(a)", [told()]) == {"recall": None, "latency": None, "footprint": None}


def test_a_series_forgets_after_five_minutes_and_breaks_where_nothing_was_measured() -> None:
    points = [[0, 1], [1_000, 2], [2_000, None], [3_000, 3], [9_000, 4], [300_500, 5]]
    script = (
        "(() => { const s = []; for (const [t, v] of a) addPoint(s, t, v); return [s.length, runsOf(s)]; })()"
    )
    length, runs = js(script, points)
    assert length == 5
    assert [[point["value"] for point in run] for run in runs] == [[2], [3], [4], [5]]


@settings(deadline=None)
@given(
    datas=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), max_size=6),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    pings=st.booleans(),
)
def test_events_are_read_wherever_the_stream_is_cut(datas: list[str], sizes: list[int], pings: bool) -> None:
    datas = [json.dumps(data) for data in datas]
    stream = "".join((": ping\r\n\r\n" if pings else "") + f"data: {data}\n\n" for data in datas)
    pieces: list[str] = []
    at = 0
    while at < len(stream):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream[at : at + size])
        at += size
    read = js(
        "(() => { const r = new EventReader(); return a.flatMap((piece) => r.feed(piece)); })()", pieces
    )
    assert read == datas


@settings(deadline=None)
@given(
    text=st.text(st.sampled_from("ab 🙂\n"), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    read=st.dictionaries(st.integers(0, 9), st.floats(0.001, 1.0), max_size=6),
)
def test_marked_pieces_are_the_whole_text_in_order(
    text: str, cuts: list[int], read: dict[int, float]
) -> None:
    length = len(text.encode("utf-16-le")) // 2
    ends = [0, *sorted(min(cut, length) for cut in cuts), length]
    spans = [[begin, end] for begin, end in pairwise(ends)]
    script = (
        "(() => { const found = readPassages(a, b, c[0], c[1]); const pieces = markedPieces(a, found);"
        " return [found, pieces, pieces.map((piece) => piece.text).join('') === a]; })()"
    )
    found, pieces, is_whole = js(script, text, spans, [list(read), list(read.values())])
    assert is_whole
    named = {idx for idx in read if idx < len(spans) and spans[idx][1] > spans[idx][0]}
    assert {passage["block"] for passage in found} == named
    assert {piece["block"] for piece in pieces if piece["level"]} == named
    shares = [passage["share"] for passage in found]
    assert shares == sorted(shares, reverse=True)
    if named == set(read) and read:
        assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ({"status": 401, "code": "invalid_api_key", "message": "no"}, "API key"),
        ({"status": 0, "code": "", "message": "TypeError"}, "forepage up"),
        (
            {"status": 400, "code": "context_length_exceeded", "message": "takes 100 tokens"},
            "Takes 100 tokens.",
        ),
        (
            {"status": 503, "code": "capacity_exhausted", "message": "full; try again", "retryAfter": "5"},
            "Full. Try again in 5 s.",
        ),
        ({"status": 429, "code": "rate_limit_exceeded", "message": "slow down"}, "in a moment"),
        ({"status": 413, "code": "request_too_large", "message": "big"}, "MAX_BODY_BYTES"),
        ({"status": 500, "code": "internal_error", "message": "a mistake"}, "A mistake."),
    ],
)
def test_every_refusal_says_what_to_do(refusal: dict[str, Any], words: str) -> None:
    advice = js("adviceFor(a)", refusal)
    assert words in advice["title"] + advice["advice"]
    assert advice["advice"]
    assert bool(advice.get("needsKey")) == (refusal["status"] == 401)


def test_figures_are_worded_alike() -> None:
    assert js("[percent(0.953), percent(0.953, 1), percent(null)]") == ["95 %", "95.3 %", NOTHING]
    words = js("[0.4, 22.14, 250.2, 64000, null].map(milliseconds)")
    assert words == ["0.4 ms", "22.1 ms", "250 ms", "64 s", NOTHING]
    assert js("[counted(1, 'late plan'), counted(2, 'late plan')]") == ["1 late plan", "2 late plans"]
    assert js("[count(999), count(1048576)]") == ["999", "1\u202f048\u202f576"]


def test_the_example_holds_what_it_asks_for_once() -> None:
    example = js("example()")
    assert "Nora" in example["question"]
    assert example["document"].count("The locker code of Nora is ") == 1
    assert 14_000 < len(example["document"]) < 18_000
